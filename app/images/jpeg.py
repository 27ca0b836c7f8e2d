"""From the bytes of a JPEG file to a grey image.

The segments before the first scan are read here: Pillow takes them byte by byte in Python, so 2 MB of fill bytes, of
small segments or of EXIF entries would take it a second. It gets only the segments that define pixels.
"""

from __future__ import annotations

import io
import re
import struct

from PIL import Image, JpegImagePlugin

from app.images.limits import check_shape
from app.images.orientation import exif_orientation
from app.problems import CorruptImage

_MAX_SCANS = 40
"""Scans of a progressive JPEG. Encoders write 10 or fewer; each one costs a pass over all pixels."""
_MAX_SEGMENTS = 300
"""Segments before the first scan. A colour profile has up to 255, and cameras write a few others."""
_MAX_TABLES = 128 * 1024
"""Bytes of the segments that define pixels. Quantization and Huffman tables need 3,000."""
_MAX_FILL = 4096
"""Bytes between the segments before the first scan. Encoders write none."""
_START, _SCAN = b"\xff\xd8", b"\xff\xda"
_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_STANDALONE = range(0xD0, 0xDA)
_SOS, _APP0, _APP1 = 0xDA, 0xE0, 0xE1
_TABLES = frozenset((*range(0xC0, 0xD0), *range(0xDB, 0xE0), 0xEE))
"""Frame header, tables, restart interval, and the colour transform of Adobe (ITU-T T.81, table B.1)."""
_JFIF, _EXIF = b"JFIF\0", b"Exif\0\0"
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)


def decode(content: bytes, max_pixels: int, least_side: int) -> tuple[Image.Image, int, tuple[int, int]]:
    """Decode a JPEG as a grey image in the orientation of the file.

    Args:
        content: the whole file.
        max_pixels: a header that declares more is rejected before anything is decompressed.
        least_side: the image is decoded at a fraction of its size as long as both sides keep so many pixels.

    Returns:
        The image in mode L, its EXIF orientation, and its full width and height.

    Raises:
        CorruptImage: it cannot be decoded.
        InvalidImage: its size is not allowed.
    """
    if content.count(_SCAN) > _MAX_SCANS:
        raise CorruptImage(f"the JPEG has more than {_MAX_SCANS} scans")
    needed, orientation = _needed(content)
    try:
        with JpegImagePlugin.JpegImageFile(io.BytesIO(needed)) as image:
            size = image.size
            check_shape(*size, max_pixels)
            # libjpeg decodes only the luma, at 1/2, 1/4 or 1/8 of the size, for a fraction of the time and memory.
            image.draft("L", (least_side, least_side))
            return image.convert("L"), orientation, size
    except _UNREADABLE as error:
        raise CorruptImage("the JPEG cannot be decoded") from error


def _needed(content: bytes) -> tuple[bytes, int]:
    """Return a JPEG without what does not define pixels, and its EXIF orientation."""
    pieces, size, fill, orientation, at = [_START], 0, _MAX_FILL, None, len(_START)
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(content, at, at + fill + 2)
        if found is None or (code := found[1][0]) < 0xC0:
            raise CorruptImage("the JPEG cannot be decoded: its image data is missing")
        fill -= found.start() - at
        start, at = found.span()
        if code == _SOS:
            return b"".join((*pieces, content[start:])), orientation or 1
        if code in _STANDALONE:
            continue
        length = int.from_bytes(content[at : at + 2], "big")
        if length < 2 or at + length > len(content):
            raise CorruptImage("the JPEG cannot be decoded: a segment is cut short")
        body = at + 2
        at += length
        if code in _TABLES or (code == _APP0 and content.startswith(_JFIF, body)):
            size += length
            pieces.append(content[start:at])
        elif code == _APP1 and orientation is None and content.startswith(_EXIF, body):
            orientation = exif_orientation(content[body + len(_EXIF) : at])
        if size > _MAX_TABLES:
            raise CorruptImage(f"the JPEG has more than {_MAX_TABLES} bytes of tables")
    raise CorruptImage(f"the JPEG has more than {_MAX_SEGMENTS} segments")
