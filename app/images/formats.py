"""Names bytes that do not begin with the PNG signature: other formats, and PNGs that were damaged on the way."""

from __future__ import annotations

import re

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_BINARY = (
    "Line breaks were changed or removed on the way. With curl, use --data-binary instead of -d; "
    "elsewhere, read, write and transfer the file as binary."
)
_AS_TEXT = (
    "The file was read as text. Read it as bytes: open(path, 'rb') in Python, arrayBuffer() in JavaScript, "
    "readFileSync(path) without an encoding in Node.js."
)
_BASE64 = "Decode the base64 text, and send the bytes that it stands for."
_DAMAGED = (
    (b"\x89PNG\x1a", "the PNG signature has lost its CR and LF bytes", _BINARY),
    (b"\x89PNG\n", "the PNG signature has lost its CR byte", _BINARY),
    (b"\x89PNG\r\x1a", "the PNG signature has lost its LF bytes", _BINARY),
    (b"\x89PNG\r\r", "the PNG signature has CR bytes that were added", _BINARY),
    (b"\x89PNG\r\n\x1a\r", "the PNG signature has CR bytes that were added", _BINARY),
    (b"\xc2\x89PNG", "the PNG was encoded as UTF-8 text", _AS_TEXT),
    (b"\xef\xbf\xbdPNG", "the PNG was decoded as UTF-8 text, and bytes were lost", _AS_TEXT),
    (b"?PNG", "the PNG was converted to another character set, and bytes were lost", _AS_TEXT),
    (b"\tPNG", "the PNG has lost the highest bit of its bytes", _AS_TEXT),
    (b"b'\\x89PNG", "the body is the text of a Python bytes literal", "Send the bytes, not their repr()."),
    (b"iVBORw0KGgo", "the body is a PNG as base64 text", _BASE64),
    (b'"iVBORw0KGgo', "the body is a PNG as base64 text in quotes", _BASE64),
    (b"/9j/", "the body is a JPEG as base64 text", _BASE64),
    (b"89504e470d0a1a0a", "the body is a PNG as hexadecimal text", "Decode the hexadecimal text, and send the bytes."),
)
_FORMATS = (
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"),
    (b"GIF89a", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"II+\x00", "a TIFF image"),
    (b"MM\x00+", "a TIFF image"),
    (b"%PDF-", "a PDF document"),
    (b"\x00\x00\x01\x00", "an ICO image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image"),
    (b"\x8aMNG", "an MNG animation"),
    (b"8BPS", "a Photoshop file"),
)
_OTHERS = (
    (b"\x1f\x8b", "gzip-compressed data", "Decompress the data, or add the header Content-Encoding: gzip."),
    (b"\x93NUMPY", "an npy array", "Send arrays to /score/batch, with Content-Type: application/x-npy."),
    (b"PK\x03\x04", "a ZIP archive", "Unpack the archive, and send each image."),
    (b"\x00\x05\x16\x07", "macOS metadata (AppleDouble)", "Send the image itself, not the file that begins with `._`."),
    (b"version https://git-lfs", "a Git LFS pointer", "Run `git lfs pull`, and send the image itself."),
)
_HEIF_BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image"}
_TEXTS = (
    (
        re.compile(rb'"?data:[\w.+-]*+(?:/[\w.+-]*+)?[;,]'),
        "the body is a data URL",
        "Decode the base64 text after the comma, and send the bytes.",
    ),
    (re.compile(rb"<svg|<!doctype svg|<\?xml(?s:.*)<svg"), "the file is an SVG drawing", ""),
    (
        re.compile(rb"<!doctype html|<html"),
        "the file is an HTML page",
        "Download the image itself; the server has sent a page instead.",
    ),
    (
        re.compile(rb"--(?s:.*)content-disposition"),
        "the body is a multipart form",
        "Send it with Content-Type: multipart/form-data and its boundary, which HTTP libraries set by themselves.",
    ),
    (re.compile(rb"[{\[]"), "the body is JSON", "Send the bytes of the PNG as the body, not JSON."),
)
"""Pattern of the first bytes in lower case, detail and hint. An empty hint stands for the conversion to PNG."""


def describe(content: bytes, conversion: str) -> tuple[str, str]:
    """Name bytes that do not begin with the PNG signature.

    Args:
        content: the whole file.
        conversion: the hint for images of another format.

    Returns:
        Description of the bytes, and hint for the client.
    """
    for prefix, detail, hint in _DAMAGED:
        if content.startswith(prefix):
            return detail, hint
    for prefix, name, hint in _OTHERS:
        if content.startswith(prefix):
            return f"the file is {name}", hint
    name = _format(content)
    if name:
        return f"the file is {name}", conversion
    if content.startswith(SIGNATURE[: len(content)]):
        return "the file ends inside the PNG signature", "Send the whole file."
    return _text(content, conversion)


def _format(content: bytes) -> str:
    for prefix, name in _FORMATS:
        if content.startswith(prefix):
            return name
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "a WebP image"
    if content[4:8] == b"ftyp":
        return _HEIF_BRANDS.get(content[8:12], "a HEIC image" if content[8:11] in _HEIC else "an ISO media file")
    return ""


_HEIC = frozenset((b"hei", b"hev", b"mif", b"msf"))


def _text(content: bytes, conversion: str) -> tuple[str, str]:
    head = content[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for pattern, detail, hint in _TEXTS:
        if pattern.match(head):
            return detail, hint or conversion
    at = content.find(SIGNATURE, 0, 4096)
    if at > 0:
        return f"{at} bytes precede the PNG signature", "Remove the bytes before the PNG signature."
    return "the first bytes are not the PNG signature", conversion
