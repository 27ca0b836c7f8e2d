"""The IDX format of MNIST-like data sets: four files, gzipped or not, in the layouts of common tools."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import DataError

IMAGES = ("train-images-idx3", "t10k-images-idx3")
LABELS = ("train-labels-idx1", "t10k-labels-idx1")

_GZIP = b"\x1f\x8b"


def has_idx(folder: Path) -> bool:
    """Return whether a folder contains IDX files."""
    return any(path.is_file() for stem in (*IMAGES, *LABELS) for path in _candidates(folder, stem))


def torchvision_folder(folder: Path, name: str) -> Path:
    """Return the folder of the IDX files: `folder` itself, or the one that torchvision made in it.

    Args:
        folder: folder that the user has given.
        name: name of the data set in torchvision, such as `MNIST`.
    """
    for inner in (folder / name / "raw", folder / "raw"):
        if not has_idx(folder) and has_idx(inner):
            return inner
    return folder


def read_idx(folder: Path, stem: str) -> NDArray[np.uint8]:
    """Read one file, gzipped or not.

    Args:
        folder: folder of the file.
        stem: file name without `-ubyte`; its last character is the number of dimensions.

    Raises:
        DataError: the file is missing or damaged.
    """
    for path in _candidates(folder, stem):
        if path.is_file():
            try:
                return _parse(_content(path), dimensions=int(stem[-1]))
            except (ValueError, EOFError, OSError, zlib.error) as error:
                raise DataError(f"{path} is damaged: {error}") from error
    name = f"{stem}-ubyte"
    raise DataError(f"{folder} has neither {name}.gz nor {name}; give a folder with the four IDX files of the data set")


def _candidates(folder: Path, stem: str) -> Iterator[Path]:
    """Yield the paths that a file may have.

    7-Zip and other unpackers write a dot for the last hyphen of the stem, which the header of the gzip file contains,
    and put a file into a folder of the archive's name.
    """
    names = (f"{stem}-ubyte", f"{stem[:-5]}.{stem[-4:]}-ubyte")
    for name in names:
        yield folder / f"{name}.gz"
        yield folder / name
    for outer in names:
        for inner in names:
            yield folder / outer / inner


def _content(path: Path) -> bytes:
    """Return the unpacked content. The first bytes decide, because browsers unpack files without renaming them."""
    content = path.read_bytes()
    if content.startswith(_GZIP):
        return gzip.decompress(content)
    if content.lstrip()[:1] == b"<":
        raise ValueError("it is a web page and not an IDX file; download the file again")
    return content


def _parse(content: bytes, dimensions: int) -> NDArray[np.uint8]:
    """Parse an IDX file of unsigned bytes.

    Source: http://yann.lecun.com/exdb/mnist: two zero bytes, type 8 (unsigned byte), number of dimensions, sizes as
    big-endian 32-bit integers, data.
    """
    if not content:
        raise ValueError("it is empty")
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("it is not an IDX file of unsigned bytes")
    if content[3] != dimensions:
        raise ValueError(f"it has {content[3]} dimensions, not {dimensions}")
    header = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:header], ">u4").astype(int)
    size = int(np.prod(shape))
    if len(content) - header != size:
        raise ValueError(f"it has {len(content) - header:,} bytes of data; its header says {size:,}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(*shape)
