"""Reads the headers of npy and IDX files."""

from __future__ import annotations

import math

from app.http.npy import array_header
from app.images.png import SIDE
from app.problems import MalformedArray, WrongArray

LONGEST_START = 4108
"""Bytes that contain every header."""
_IDX_IMAGES = b"\0\0\x08\x03"
_IDX_HEADER = 16


def header(kind: str, content: bytes) -> tuple[int, int]:
    """Return the number of images of an array and the offset of the first one.

    Args:
        kind: `npy` or `idx`.
        content: the first `LONGEST_START` bytes of the file, or the whole file.

    Raises:
        MalformedArray: the file does not have the format.
        WrongArray: the values are not uint8 [N, 28, 28].
    """
    if kind == "idx":
        return _idx(content)
    found = array_header(content)
    if found is None:
        raise MalformedArray("the file ends inside its header")
    return found


def _idx(content: bytes) -> tuple[int, int]:
    """Read an IDX header: two zero bytes, type, number of dimensions, and the sizes as big-endian 32-bit integers.

    Source: http://yann.lecun.com/exdb/mnist.
    """
    if content[:4] != _IDX_IMAGES or len(content) < _IDX_HEADER:
        raise MalformedArray("the file is not an IDX file of unsigned bytes with three dimensions")
    sizes = [int.from_bytes(content[place : place + 4], "big") for place in (4, 8, 12)]
    if sizes[1:] != [SIDE, SIDE]:
        raise WrongArray(f"the IDX file has the shape {sizes}, {math.prod(sizes)} values")
    return sizes[0], _IDX_HEADER
