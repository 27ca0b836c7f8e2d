"""Turn every form of image that the client accepts into the bytes of a PNG. Imports neither numpy nor Pillow."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from anomaly.client.errors import UnreadableImage

_ORIENTATION = 0x0112
"""The EXIF tag."""


class Array(Protocol):
    """A numpy array."""

    @property
    def dtype(self) -> Any:
        """Type of the elements."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""

    def tobytes(self) -> bytes:
        """Return the elements in C order."""

    def __getitem__(self, key: Any, /) -> Any: ...


class Picture(Protocol):
    """A Pillow image."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:  # noqa: A002 - Pillow's own name
        """Write the image to a file object."""

    def getexif(self) -> Any:
        """Return the EXIF tags."""


Image = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Array | Picture
"""A PNG as a path, bytes or a file object in binary mode, a numpy array of type uint8 and shape [height, width], or a
Pillow image."""


def read(image: Image) -> bytes:
    """Return the bytes of an image.

    Raises:
        TypeError: the value is not one of the forms of `Image`.
        UnreadableImage: the file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return _read_path(Path(image))
    if hasattr(image, "save") and hasattr(image, "getexif"):
        return _encode_picture(image)
    if hasattr(image, "dtype") and hasattr(image, "tobytes"):
        return _encode_array(image)
    if hasattr(image, "read"):
        return _read_stream(image)
    raise TypeError(
        "an image is a path, bytes, a binary file object, a numpy array or a Pillow image, "
        f"not {type(image).__name__}"
    )  # fmt: skip


def npy(images: Array) -> bytes:
    """Return an array as an npy file of version 1.0.

    Raises:
        TypeError: the argument is not a uint8 array of shape [N, 28, 28].
    """
    _check_bytes(images)
    count, height, width = images.shape
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, {height}, {width}), }}".encode()
    # The format aligns the data to 64 bytes and ends the header with a line feed.
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + images.tobytes()


def check_stack(images: object) -> None:
    """Raise `TypeError` unless this is a uint8 array of shape [N, height, width]."""
    if not hasattr(images, "dtype") or not hasattr(images, "tobytes") or not hasattr(images, "shape"):
        raise TypeError(f"images must be a numpy array, not {type(images).__name__}; numpy.stack joins several")
    _check_bytes(images)
    if len(images.shape) != 3:
        raise TypeError(f"images must have the shape [N, 28, 28], not {list(images.shape)}")


def _read_path(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: the name contains a null byte
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            reason = "the link leads to a file that does not exist"
        raise UnreadableImage(f"{path} cannot be read: {reason}") from error
    if not content:
        raise UnreadableImage(f"{path} is empty")
    return content


def _read_stream(stream: Any) -> bytes:
    if isinstance(stream, io.TextIOBase):
        raise TypeError("the file object is open in text mode; open it with mode='rb'")
    try:
        content = stream.read()
    except (OSError, ValueError) as error:
        raise UnreadableImage(f"the file object cannot be read: {error}") from error
    if not isinstance(content, bytes | bytearray | memoryview):
        raise TypeError(f"read() of the file object returned {type(content).__name__}, not bytes")
    return bytes(content)


def _encode_picture(picture: Any) -> bytes:
    tags, options = picture.getexif(), {}
    if tags.get(_ORIENTATION, 1) != 1:
        # The service turns the pixels. All other tags stay here: a place, a camera, a name.
        kept = type(tags)()
        kept[_ORIENTATION] = tags[_ORIENTATION]
        options["exif"] = kept
    buffer = io.BytesIO()
    try:
        picture.save(buffer, "PNG", **options)
    except (OSError, ValueError) as error:
        raise UnreadableImage(f"the Pillow image cannot be written as a PNG: {error}") from error
    return buffer.getvalue()


def _encode_array(array: Any) -> bytes:
    _check_bytes(array)
    if len(array.shape) != 2 or 0 in array.shape:
        raise TypeError(f"an array must have the shape [28, 28], not {list(array.shape)}; score_array takes several")
    height, width = array.shape
    pixels = array.tobytes()
    rows = b"".join(b"\0" + pixels[start : start + width] for start in range(0, height * width, width))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _check_bytes(array: Any) -> None:
    if str(array.dtype) != "uint8":
        raise TypeError(
            f"an array must have the type uint8 (0 is background, 255 is full ink), not {array.dtype}; "
            "values from 0 to 1 have to be multiplied by 255 first"
        )
