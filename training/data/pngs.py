"""Folders of 28x28 greyscale PNGs, decoded by the code of the service."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import DataError
from training.data.folders import search


def read_pngs(folder: Path) -> tuple[NDArray[np.uint8], int]:
    """Read the distinct images of a folder, in the order of their file names.

    Copies are left out: otherwise the same image could be in the training, calibration and test sets.

    Returns:
        The images, uint8 [n, 28, 28], and the number of copies that were left out.

    Raises:
        DataError: the folder is missing or contains no PNG, or the service rejects a file; the message names the file.
    """
    paths = png_paths(folder)
    if not paths:
        raise DataError(explain_no_pngs(folder))
    distinct = dict.fromkeys(_read_png(path) for path in paths)
    images = np.stack([np.frombuffer(pixels, np.uint8).reshape(28, 28) for pixels in distinct])
    return images, len(paths) - len(images)


def png_paths(folder: Path) -> list[Path]:
    """Return the PNG files of a folder, sorted by name. Hidden files and subfolders are ignored."""
    return search(folder).images


def explain_no_pngs(folder: Path, also_missing: str = "") -> str:
    """Return an error message for a folder without PNGs: what it contains, and what to do.

    Args:
        folder: the folder, which need not exist.
        also_missing: what else the folder could have contained, in words that continue "has no PNG files".
    """
    if not folder.exists():
        return f"there is no folder {folder}"
    if not folder.is_dir():
        return f"{folder} is not a folder; give the folder that contains it"
    missing = f"{folder} has no PNG files{also_missing}"
    if any(search(path).images for path in folder.glob("*") if path.is_dir()):
        return (
            f"{missing}, but its subfolders contain PNGs: give one of them, or put the PNGs of one class in one folder"
        )
    kinds = sorted({path.suffix.lower() or path.name for path in folder.glob("*") if path.is_file()})
    content = f"it contains {', '.join(kinds[:5])}" if kinds else "it is empty"
    return f"{missing}, {content}: give a folder of 28x28 grey PNGs"


def _read_png(path: Path) -> bytes:
    from app.images.png import decode
    from app.problems import Problem

    try:
        return decode(path.read_bytes())
    except Problem as problem:
        raise DataError(f"{path}: {problem.title[0].lower()}{problem.title[1:]}: {problem}") from problem
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
