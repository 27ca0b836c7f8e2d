"""Reads the EXIF orientation of an image."""

from __future__ import annotations

import struct

from app.images.chunks import CHUNK
from app.images.formats import SIGNATURE

_ORIENTATION, _SHORT = 0x0112, 3
"""The EXIF tag of the orientation, and the TIFF type of its value."""


def orientation_of(png: bytes) -> int:
    """Return the EXIF orientation, 1 to 8, that a checked PNG has in its chunk eXIf; 1 where it has none."""
    start = len(SIGNATURE)
    while start + 12 <= len(png):
        length, kind = CHUNK.unpack_from(png, start)
        if kind == b"eXIf":
            return exif_orientation(png[start + 8 : start + 8 + length])
        start += 12 + length
    return 1


def exif_orientation(exif: bytes) -> int:
    """Return the orientation, 1 to 8, of an EXIF block that begins with its TIFF header; 1 where it is not stated.

    Only the entries of the first directory are read, so a damaged block takes no time and raises no error.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    (at,) = struct.unpack_from(f"{order}I", exif, 4)
    if at + 2 > len(exif):
        return 1
    (count,) = struct.unpack_from(f"{order}H", exif, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
        if (tag, kind) == (_ORIENTATION, _SHORT):
            return value if 1 <= value <= 8 else 1
    return 1
