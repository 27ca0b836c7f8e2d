"""From the bytes of a PNG, JPEG or WebP file of any size to one upright grey image.

Scope: file formats, orientation, declared sizes. Independent of digits, models and HTTP.

The format is found by the first bytes, never by a media type or a name. Every size is checked in the header, before
memory for the pixels exists. PNG is checked chunk by chunk by `app.images.png`, and JPEG segment by segment by
`app.images.jpeg`.
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

from PIL import Image, WebPImagePlugin

from app.images import jpeg, png
from app.images.background import compose
from app.images.limits import check_shape
from app.images.orientation import exif_orientation, orientation_of
from app.problems import AnimatedImage, CorruptImage, EmptyBody, UnsupportedFormat

FORMATS = ("PNG", "JPEG", "WebP")
"""Formats that `read` decodes."""

_PNG, _JPEG, _RIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF"
_EXIF = b"Exif\0\0"
_FOREIGN = (
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif", "HEIC"),
    (4, b"ftypavi", "AVIF"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML"),
    (0, b"\0\0\1\0", "ICO"),
)
"""Offset, bytes and name of formats that people send most; the problem names the format."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)


class Picture(NamedTuple):
    """An image as a viewer shows it.

    Attributes:
        image: mode L, upright; a JPEG may be decoded at a fraction of its size.
        width, height: of the upright image in full size.
    """

    image: Image.Image
    width: int
    height: int


def read(content: bytes, max_pixels: int, least_side: int) -> Picture:
    """Decode a file as one upright grey image.

    Args:
        content: the whole file.
        max_pixels: a header that declares more is rejected before anything is decompressed.
        least_side: a JPEG is decoded at a fraction of its size as long as both sides keep so many pixels.

    Raises:
        InvalidImage: its subclass describes the cause.
        EmptyBody: the content is empty.
    """
    if not content:
        raise EmptyBody("the image has no bytes")
    if content.startswith(_PNG):
        image, orientation = png.decode_any(content, max_pixels), orientation_of(content)
        width, height = image.size
    elif content.startswith(_JPEG):
        image, orientation, (width, height) = jpeg.decode(content, max_pixels, least_side)
    elif content.startswith(_RIFF) and content[8:12] == b"WEBP":
        image, orientation = _webp(content, max_pixels)
        width, height = image.size
    else:
        raise _foreign(content)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
        if orientation >= 5:
            width, height = height, width
    return Picture(image, width, height)


def _foreign(content: bytes) -> UnsupportedFormat:
    for at, start, name in _FOREIGN:
        if content[at : at + len(start)] == start:
            return UnsupportedFormat(f"the file is {name}; fit=mnist decodes {', '.join(FORMATS)}")
    return UnsupportedFormat(f"the first bytes are not those of {', '.join(FORMATS)}")


def _webp(content: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    # libwebp allocates two canvases of the declared size when it opens a file, so the header is read here first.
    size = _webp_size(content)
    if size is None:
        raise CorruptImage("the WebP header cannot be read")
    check_shape(*size, max_pixels)
    try:
        with WebPImagePlugin.WebPImageFile(io.BytesIO(content)) as image:
            if image.size != size:
                raise CorruptImage("the WebP contradicts its own header")
            if image.n_frames > 1:
                raise AnimatedImage("the WebP has several frames")
            exif = image.info.get("exif", b"")
            return _grey(image), exif_orientation(exif.removeprefix(_EXIF))
    except _UNREADABLE as error:
        raise CorruptImage("the WebP cannot be decoded") from error


def _webp_size(content: bytes) -> tuple[int, int] | None:
    """Return the size that the header of a WebP declares (RFC 9649, 2.5 to 2.7)."""
    kind, head = content[12:16], content[20:30]
    if len(head) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L" and head[0] == 0x2F:
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 6)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _grey(image: Image.Image) -> Image.Image:
    if image.mode == "RGBA":
        return compose(image.convert("RGB").convert("L"), image.getchannel("A"))
    return image.convert("L")
