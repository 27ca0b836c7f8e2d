"""PNG files that are built chunk by chunk, so that each file can have exactly one fault."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, content: bytes = b"", *, crc: int | None = None) -> bytes:
    """Return one chunk; its checksum is right unless another is given."""
    checksum = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def header(width: int = 28, height: int = 28, depth: int = 8, colour: int = 0, interlace: int = 0) -> bytes:
    """Return the chunk IHDR."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def rows(pixels: np.ndarray) -> bytes:
    """Return pixels as the compressed content of IDAT, every row with filter 0."""
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))


def plain(pixels: np.ndarray | None = None, *extra: bytes) -> bytes:
    """Return an 8-bit grey PNG with `extra` chunks before its pixels."""
    pixels = gradient() if pixels is None else pixels
    height, width = pixels.shape
    return SIGNATURE + header(width, height) + b"".join(extra) + chunk(b"IDAT", rows(pixels)) + chunk(b"IEND")


def gradient(side: int = 28) -> np.ndarray:
    """Return uint8 [side, side] in which every pixel differs from its neighbours."""
    return (np.arange(side * side) * 37 % 251).astype(np.uint8).reshape(side, side)


def saved(image: Image.Image, **options: Any) -> bytes:
    """Return an image as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def multipart(*parts: tuple[str, str | None, bytes], boundary: str = "b0undary") -> tuple[str, bytes]:
    """Return the content type and body of a form; each part is (name, file name or None, content)."""
    body = b""
    for name, filename, content in parts:
        disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
        body += f"--{boundary}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"
    return f"multipart/form-data; boundary={boundary}", body + f"--{boundary}--\r\n".encode()
