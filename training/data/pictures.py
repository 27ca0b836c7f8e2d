"""Folders of the user's own images, prepared by the code of the service."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomaly.image_files import PNG_ONLY, PREPARED, Found, search
from app.models.manifest import STRICT, Preparation
from training.data.dataset import DataError

MAX_PIXELS = 4096 * 4096
"""Maximum number of pixels of an image: that of the service's decoder."""
_MOST_REFUSED = 0.1
"""Maximum share of images that `fit=mnist` may reject; they are left out, as the service rejects such images too."""


@dataclass(frozen=True)
class Folder:
    """The images of a folder after their preparation.

    Attributes:
        images: the distinct images in the order of their file names, uint8 [n, 28, 28].
        paths: file of each image.
        copies: number of images that were left out because an earlier one has the same pixels.
        refused: number of images without one clear digit, by problem; only with `mnist`.
        formats: number of files by format.
        sizes: width and height of each file's image.
    """

    images: NDArray[np.uint8]
    paths: tuple[Path, ...]
    copies: int
    refused: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    sizes: tuple[tuple[int, int], ...] = ()


def read_folder(folder: Path, preparation: Preparation) -> Folder:
    """Read and prepare the images of a folder.

    Copies are left out: otherwise the same image could be in the training, calibration and test sets.

    Raises:
        DataError: the folder is missing or contains no image, or the service rejects files; the message names one.
    """
    paths = image_paths(folder, preparation)
    if not paths:
        raise DataError(explain_no_images(folder, preparation))
    return _Reading(preparation).read(paths)


class _Reading:
    def __init__(self, preparation: Preparation) -> None:
        self._preparation = preparation
        self._distinct: dict[bytes, Path] = {}
        self._refused: Counter[str] = Counter()
        self._formats: Counter[str] = Counter()
        self._sizes: list[tuple[int, int]] = []
        self._failed: list[str] = []
        self._copies = 0

    def read(self, paths: list[Path]) -> Folder:
        for path in paths:
            self._add(path)
        if self._failed:
            more = f"; so are {len(self._failed) - 1:,} more of {len(paths):,} files" if len(self._failed) > 1 else ""
            raise DataError(self._failed[0] + more + self._advice())
        if sum(self._refused.values()) > _MOST_REFUSED * len(paths):
            reasons = ", ".join(f"{kind} {count:,}" for kind, count in self._refused.items())
            raise DataError(
                f"fit=mnist finds no clear digit on {sum(self._refused.values()):,} of {len(paths):,} images "
                f"({reasons}); for images that are not single digits use --fit resize"
            )
        images = np.frombuffer(bytearray().join(self._distinct), np.uint8).reshape(-1, 28, 28)
        return Folder(
            images, tuple(self._distinct.values()), self._copies, self._refused, self._formats, tuple(self._sizes)
        )

    def _add(self, path: Path) -> None:
        from app.images.png import is_prepared
        from app.images.prepare import prepared_pixels
        from app.problems import AmbiguousImage, BlankImage, Problem

        try:
            content = path.read_bytes()
            # An image of the review queue is what the model scored: a second preparation would change it.
            preparation = STRICT if is_prepared(content) else self._preparation
            pixels = prepared_pixels(content, preparation, MAX_PIXELS)
        except (AmbiguousImage, BlankImage) as refused:
            self._refused[refused.type.rpartition("/")[2]] += 1
            return
        except Problem as problem:
            self._failed.append(f"{path}: {problem.title[0].lower()}{problem.title[1:]}: {problem}")
            return
        except OSError as error:
            dangling = isinstance(error, FileNotFoundError) and path.is_symlink()
            reason = "the link leads to a file that does not exist" if dangling else error.strerror
            raise DataError(f"{path} cannot be read: {reason}") from error
        kind, size = _header(content)
        self._formats[kind] += 1
        self._sizes.append(size)
        if pixels in self._distinct:
            self._copies += 1
        else:
            self._distinct[pixels] = path

    def _advice(self) -> str:
        if self._preparation.fit != "strict":
            return ""
        return ". Add --fit resize for pictures of any size, format and colour, or --fit mnist for handwritten digits"


def _header(content: bytes) -> tuple[str, tuple[int, int]]:
    """Return format and size of an image that the service has accepted."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
        return str(image.format), image.size


def image_paths(folder: Path, preparation: Preparation) -> list[Path]:
    """Return the images of a folder, sorted by name: PNGs, or with a preparation all formats that it decodes.

    Hidden files and subfolders are ignored.
    """
    return content_of(folder, preparation).images


def content_of(folder: Path, preparation: Preparation) -> Found:
    """Return the images and the ignored entries of a folder. Subfolders are not searched: one folder is one class."""
    return search(folder, PNG_ONLY if preparation.fit == "strict" else PREPARED, subfolders=False)


def explain_no_images(folder: Path, preparation: Preparation, also_missing: str = "") -> str:
    """Return an error message for a folder without images: what it contains, and what to do.

    Args:
        folder: the folder, which need not exist.
        preparation: how images would be prepared.
        also_missing: what else the folder could have contained, in words that continue "has no PNG files".
    """
    if not folder.exists():
        return f"there is no folder {folder}"
    if not folder.is_dir():
        return f"{folder} is not a folder; give the folder that contains it"
    strict = preparation.fit == "strict"
    files = "PNG files" if strict else "PNG, JPEG or WebP files"
    missing = f"{folder} has no {files}{also_missing}"
    if any(image_paths(path, preparation) for path in folder.glob("*") if path.is_dir()):
        images = "PNGs" if strict else "images"
        return (
            f"{missing}, but its subfolders contain {images}: give one of them, or put the {images} of one class "
            "in one folder"
        )
    kinds = sorted({path.suffix.lower() or path.name for path in folder.glob("*") if path.is_file()})
    content = f"it contains {', '.join(kinds[:5])}" if kinds else "it is empty"
    if strict and not PREPARED.isdisjoint(kinds):
        return f"{missing}, {content}: add --fit resize for pictures of any size, or --fit mnist for handwritten digits"
    return f"{missing}, {content}: give a folder of {'28x28 grey PNGs' if strict else 'PNG, JPEG or WebP files'}"
