"""Reads npy arrays of images as they arrive, and explains the conversion of arrays of another type."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import AsyncIterator
from typing import NamedTuple

import numpy as np

from app.problems import EmptyBody, MalformedArray, Problem, UnsupportedMediaType, WrongArray
from app.scoring.batch import Chunk

SIDE = 28
PIXELS = SIDE * SIDE
_KEYS = frozenset(("descr", "fortran_order", "shape"))
MAGIC = b"\x93NUMPY"
_TYPE = re.compile(r"[<>|=]?[A-Za-z?][0-9]{0,9}(\[[A-Za-z]{1,2}\])?")
"""The types that numpy writes, without structured ones."""
_LONGEST_HEADER = 4096
_LONGEST_START = _LONGEST_HEADER + 12
_TOO_MANY = 2**63
"""Number of images that no array can have, because numpy counts in signed 64 bits."""
_IMAGE_SHAPES = ((SIDE, SIDE), (1, SIDE, SIDE), (SIDE, SIDE, 1), (PIXELS,))
"""Shapes of one image whose bytes are in the same order."""
_CONTIGUOUS = "Send numpy.ascontiguousarray(images)."
_SCALE = "Scale the values so that 0 is the background and 255 the full stroke, round them, and convert them to uint8."
_OF_ONE = (
    "If the values are scaled to 0..1, multiply by 255 and round: "
    "numpy.rint(images * 255.0).clip(0, 255).astype(numpy.uint8)."
)
_OF_MINUS_ONE = (
    "If the values are scaled to -1..1, shift, scale and round: "
    "numpy.rint((images + 1) / 2 * 255.0).clip(0, 255).astype(numpy.uint8)."
)
_TOLERANCE = 1e-6
"""Rounding error of values that were scaled to 0..1 or -1..1."""


class Header(NamedTuple):
    """The header of an npy file.

    Attributes:
        dtype: type of the values.
        fortran: whether the first axis varies fastest.
        shape: lengths of the axes.
        end: offset of the first value.
    """

    dtype: np.dtype[np.generic]
    fortran: bool
    shape: tuple[int, ...]
    end: int


async def read_array(body: AsyncIterator[bytes], size: int, *, declared: bool = True) -> AsyncIterator[Chunk]:
    """Yield the images of an array in chunks of `size`.

    Args:
        body: the npy file in pieces.
        size: number of images per chunk.
        declared: whether the content type is that of npy. If not, a body that does not begin as npy is a 415.

    Raises:
        UnsupportedMediaType, EmptyBody, MalformedArray, WrongArray: the body is not an array of images.
    """
    buffer = bytearray()
    header: Header | None = None
    async for piece in body:
        buffer += piece
        if not declared and buffer[: len(MAGIC)] != MAGIC[: len(buffer)]:
            raise UnsupportedMediaType("the content type is missing or general, and the body does not begin as npy")
        header = parse_header(bytes(buffer[:_LONGEST_START]))
        if header is not None:
            break
    if header is None:
        raise MalformedArray("the body ends inside its header") if buffer else EmptyBody("the body has no bytes")
    del buffer[: header.end]
    if header.dtype != np.uint8 and header.dtype.kind in "biuf":
        raise await _wrong_type(header, buffer, body)
    count, done = _count(header), 0
    while True:
        while len(buffer) >= size * PIXELS and done + size <= count:
            yield Chunk(size, buffer[: size * PIXELS])
            del buffer[: size * PIXELS]
            done += size
        if len(buffer) > (count - done) * PIXELS:
            raise MalformedArray(f"the body has more bytes than the {count} images that its header declares")
        try:
            buffer += await anext(body)
        except StopAsyncIteration:
            break
    if len(buffer) != (count - done) * PIXELS:
        raise MalformedArray(f"the body has fewer bytes than the {count} images that its header declares")
    if buffer:
        yield Chunk(count - done, buffer)


def array_header(content: bytes) -> tuple[int, int] | None:
    """Read the header of an array of images.

    Args:
        content: the first bytes of the file.

    Returns:
        The number of images and the offset of the first one, or None if the header is incomplete.

    Raises:
        MalformedArray: the file is not npy.
        WrongArray: the values are not uint8 [N, 28, 28] in C order.
    """
    header = parse_header(content)
    return None if header is None else (_count(header), header.end)


def parse_header(content: bytes) -> Header | None:
    """Read the header of an npy file without numpy's reader, which evaluates more than is needed.

    Args:
        content: the first bytes of the file.

    Returns:
        The header, or None if it is incomplete.

    Raises:
        MalformedArray: the file is not npy.
        WrongArray: the values are not plain numbers.
    """
    if content[:6] != MAGIC[: len(content)]:
        raise MalformedArray("the first bytes are not those of an npy file")
    if len(content) < 12:
        return None
    width = {1: 2, 2: 4, 3: 4}.get(content[6])
    if width is None or content[7]:
        raise MalformedArray(f"the npy version is {content[6]}.{content[7]}, not 1.0, 2.0 or 3.0")
    start = 8 + width
    end = start + int.from_bytes(content[8:start], "little")
    if end - start > _LONGEST_HEADER:
        raise MalformedArray(f"the npy header has more than {_LONGEST_HEADER} bytes")
    if len(content) < end:
        return None
    try:
        header = ast.literal_eval(content[start:end].decode("utf-8"))
        if header.keys() != _KEYS:
            raise ValueError
        kind, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    except (ValueError, SyntaxError, AttributeError, TypeError, RecursionError, MemoryError):
        raise MalformedArray("the npy header cannot be parsed") from None
    if not isinstance(shape, tuple) or any(type(length) is not int for length in shape):
        raise WrongArray("the shape of the array is not a tuple of integers")
    if not all(
        0 <= length < _TOO_MANY for length in shape
    ):  # Python raises an error for integers with thousands of digits.
        raise WrongArray("a length of the array is negative or too large")
    if not isinstance(kind, str):
        raise WrongArray("the array has a structured type")
    try:
        # numpy divides by the number in a unit of time: `M8[s/0]` ends the process.
        if not _TYPE.fullmatch(kind):
            raise ValueError
        dtype = np.dtype(kind)
    except (TypeError, ValueError, SyntaxError):
        raise WrongArray("the type of the array is unknown") from None
    return Header(dtype, fortran is not False, shape, end)


def _count(header: Header) -> int:
    """Return the number of images of an array, or raise `WrongArray`."""
    if header.dtype != np.uint8:
        raise WrongArray(f"the array has the type {_type(header)}")
    if header.fortran and header.shape[1:] in _IMAGE_SHAPES:
        raise WrongArray("the array is in Fortran order", hint=_CONTIGUOUS)
    return count_images(header.shape)


def count_images(shape: tuple[int, ...]) -> int:
    """Return the number of images of an array in C order.

    Raises:
        WrongArray: the shape is not one of N images of 28x28 pixels.
    """
    text = f"the array has the shape {list(shape)[:8]}"
    if shape[1:] in _IMAGE_SHAPES:
        return shape[0]
    if shape in _IMAGE_SHAPES:
        raise WrongArray(text, hint="Add an axis for the number of images: images[numpy.newaxis].")
    if shape[:2] == (SIDE, SIDE) and len(shape) == 3:
        hint = "Move the axis of the images to the front: numpy.ascontiguousarray(numpy.moveaxis(images, 2, 0))."
        raise WrongArray(text, hint=hint)
    if 3 in shape[1:] or 4 in shape[1:]:
        raise WrongArray(text, hint="Convert the images to greyscale, and send the shape [N, 28, 28].")
    raise WrongArray(text)


def _type(header: Header) -> str:
    order = "big-endian " if header.dtype.byteorder == ">" else ""
    return order + header.dtype.name


async def _wrong_type(header: Header, buffer: bytearray, body: AsyncIterator[bytes]) -> Problem:
    """Return the problem for numbers that are not uint8, with the conversion that suits their range.

    The range is that of the whole array: a hint from the first images alone could be wrong for the others.
    """
    low, high = math.inf, -math.inf
    item = header.dtype.itemsize
    while True:
        whole = len(buffer) - len(buffer) % item
        if whole:
            values = np.frombuffer(bytes(buffer[:whole]), header.dtype)
            del buffer[:whole]
            if not np.isfinite(values).all():
                detail = f"the array has the type {_type(header)} and values that are not finite"
                return WrongArray(detail, hint=_SCALE)
            low, high = min(low, float(values.min())), max(high, float(values.max()))
        try:
            buffer += await anext(body)
        except StopAsyncIteration:
            break
    if low > high:
        return WrongArray(f"the array has the type {_type(header)} and no values")
    detail = f"the array has the type {_type(header)} and values from {low:g} to {high:g}"
    return WrongArray(detail, hint=_conversion(header.dtype.kind, low, high))


def _conversion(kind: str, low: float, high: float) -> str:
    """Return the hint for values of this kind and range. If the scale is not certain, the hint contains no formula."""
    if kind == "b":
        return "Convert the values: images.astype(numpy.uint8) * 255."
    if low < 0:
        if kind == "f" and -1 - _TOLERANCE <= low < -0.9 and high <= 1 + _TOLERANCE:
            return _OF_MINUS_ONE
        return f"Undo the standardisation or the shift of the values first. {_SCALE}"
    if high <= 1 + _TOLERANCE:
        return _OF_ONE
    if 128 <= high <= 255:
        return "If 255 is the full stroke, round and convert the values: numpy.rint(images).astype(numpy.uint8)."
    deep = kind in "iu" and 2**15 <= high < 2**16
    return "If 65535 is the full stroke, convert the values: (images // 257).astype(numpy.uint8)." if deep else _SCALE
