"""The IDX format of MNIST-like data sets: four files, gzipped or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import DataError

IMAGES = ("train-images-idx3", "t10k-images-idx3")
LABELS = ("train-labels-idx1", "t10k-labels-idx1")


def has_idx(folder: Path) -> bool:
    """Return whether a folder contains IDX files."""
    return any(folder.glob("*-idx[13]-ubyte*"))


def read_idx(folder: Path, stem: str) -> NDArray[np.uint8]:
    """Read one file, gzipped or not.

    Args:
        folder: folder of the file.
        stem: file name without `-ubyte`; its last character is the number of dimensions.

    Raises:
        DataError: the file is missing or damaged.
    """
    name = f"{stem}-ubyte"
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            try:
                content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                return _parse(content, dimensions=int(stem[-1]))
            except (ValueError, EOFError, OSError, zlib.error) as error:
                raise DataError(f"{path} is damaged: {error}") from error
    raise DataError(f"{folder} has neither {name}.gz nor {name}; give a folder with the four IDX files of the data set")


def _parse(content: bytes, dimensions: int) -> NDArray[np.uint8]:
    """Parse an IDX file of unsigned bytes.

    Source: http://yann.lecun.com/exdb/mnist: two zero bytes, type 8 (unsigned byte), number of dimensions, sizes as
    big-endian 32-bit integers, data.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("it is not an IDX file of unsigned bytes")
    if content[3] != dimensions:
        raise ValueError(f"it has {content[3]} dimensions, not {dimensions}")
    header = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:header], ">u4").astype(int)
    return np.frombuffer(content, np.uint8, offset=header).reshape(*shape)
