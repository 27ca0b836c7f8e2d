"""Decodes PNGs to grey pixels: exactly 28x28 with `decode`, any size with `decode_any`."""

from __future__ import annotations

import io
import struct
import threading
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

from app.images import chunks
from app.images.background import compose
from app.images.chunks import CHUNK, CRC, DEPTH_AT, HEADER_AT, IHDR, PALETTE_AT, PLAIN
from app.images.formats import SIGNATURE
from app.images.limits import check_shape
from app.problems import CorruptPng, LowBitDepth, NotGrey, Transparent, WrongSize

SIDE = 28
PREPARED = "Prepared", "yes"
"""Keyword and text of the chunk tEXt that marks the pixels that a model scored: they need no further preparation."""

_DEEP = ("I;16", "I;16B", "I")
_LEAST_HIGH_BYTE = 16
"""High byte below which all 16-bit samples fit in 12 bits."""
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    zlib.error,
    struct.error,
    Image.DecompressionBombError,
)
_TO_SCORE = "Convert the image to a greyscale PNG of 28x28 pixels, or to an upright PNG of any size and add fit=mnist."
_TO_FIT = "Convert the image to PNG, upright. Any size is accepted."


class _Canvas(threading.local):
    """A reused image per thread, and its memory, uint8 [28, 28]: copying it takes less time than `Image.tobytes`."""

    def __init__(self) -> None:
        self.pixels = bytearray(SIDE * SIDE)
        self.image = Image.frombuffer("L", (SIDE, SIDE), self.pixels, "raw", "L", 0, 1)


_canvas = _Canvas()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return CHUNK.pack(len(content), kind) + content + CRC.pack(zlib.crc32(kind + content))


_USUAL_START = SIGNATURE + _chunk(b"IHDR", IHDR.pack(SIDE, SIDE, *PLAIN))
_PREPARED_START = _USUAL_START + _chunk(b"tEXt", "\0".join(PREPARED).encode())
_USUAL_END = _chunk(b"IEND", b"")
_IDAT_CRC = zlib.crc32(b"IDAT")
_UNWRITTEN = 1
"""A level that few images have in their last pixel."""
_MOST_COMPRESSED = chunks.most_compressed(SIDE, SIDE)


def decode(png: bytes) -> bytes:
    """Decode a PNG of 28x28 grey pixels.

    * Grey of 1, 2, 4 and 8 bits is scaled to 0..255; of 16 bits the high byte is used.
    * Palette and RGB are accepted if red, green and blue of each pixel differ by one level at most; their
      median is used.
    * Alpha, and a level declared transparent, are accepted if every pixel is opaque.

    Args:
        png: the whole file.

    Returns:
        The pixels in rows from the top, uint8 [28, 28], as bytes.

    Raises:
        InvalidImage: the file is not such a PNG; the subclass gives the reason.
        EmptyBody: the file is empty.
    """
    usual = _usual(png)
    if usual:
        return usual
    compressed, png = chunks.check(png, _only_the_models_size, _TO_SCORE)
    try:
        if compressed:
            # Pillow's PNG reader would double the time of its decoder, and all its checks are done already.
            _canvas.image.frombytes(compressed, "zip", "L", 0)
            return _canvas.image.tobytes()
        with _opened(png) as image:
            pixels = _grey(png, image).tobytes()
    except _UNREADABLE as error:
        raise CorruptPng("the compressed pixels cannot be read") from error
    if len(pixels) != SIDE * SIDE:
        raise CorruptPng("the number of pixels differs from the header")
    return pixels


def decode_any(png: bytes, max_pixels: int) -> Image.Image:
    """Decode a PNG of any size to one grey image.

    Colours become their luma (ITU-R 601). `app.images.background` describes what transparent pixels become.

    Args:
        png: the whole file.
        max_pixels: maximum number of pixels that the header may declare.

    Returns:
        An image of mode L.

    Raises:
        InvalidImage: the file is not such a PNG; the subclass gives the reason.
        EmptyBody: the file is empty.
    """
    _, png = chunks.check(png, lambda width, height: check_shape(width, height, max_pixels), _TO_FIT)
    try:
        with _opened(png) as image:
            return _luma(png, image)
    except _UNREADABLE as error:
        raise CorruptPng("the compressed pixels cannot be read") from error


def encode_prepared(pixels: bytes) -> bytes:
    """Return pixels that a model scored, uint8 [28, 28], as a PNG with the mark `PREPARED`."""
    rows = b"".join(b"\0" + pixels[start : start + SIDE] for start in range(0, SIDE * SIDE, SIDE))
    return _PREPARED_START + _chunk(b"IDAT", zlib.compress(rows)) + _USUAL_END


def is_prepared(content: bytes) -> bool:
    """Return whether an image file was written by `encode_prepared`."""
    return content.startswith(_PREPARED_START)


def _usual(png: bytes) -> bytes:
    """Return the pixels of a file as most clients write it, or nothing if `chunks.check` must read it.

    Such a file is the one possible header of a plain 28x28 image, one chunk IDAT, and the end.
    """
    if not (png.startswith(_USUAL_START) and png.endswith(_USUAL_END)):
        return b""
    start, end = len(_USUAL_START), len(png) - len(_USUAL_END)
    length, kind = CHUNK.unpack_from(png, start)
    if kind != b"IDAT" or length != end - start - 12 or length > _MOST_COMPRESSED:
        return b""
    compressed = png[start + 8 : end - 4]
    if CRC.unpack_from(png, end - 4)[0] != zlib.crc32(compressed, _IDAT_CRC):
        return b""
    canvas = _canvas
    pixels = canvas.pixels
    # Pillow decodes rows in order and accepts data without the last ones. Then it does not write the last pixel.
    pixels[-1] = _UNWRITTEN
    try:
        canvas.image.frombytes(compressed, "zip", "L", 0)
    except _UNREADABLE:
        return b""
    return b"" if pixels[-1] == _UNWRITTEN else bytes(pixels)


def _only_the_models_size(width: int, height: int) -> None:
    if (width, height) != (SIDE, SIDE):
        raise WrongSize(f"the image is {width}x{height}, the model takes {SIDE}x{SIDE}")


def _opened(png: bytes) -> PngImagePlugin.PngImageFile:
    """Open a checked PNG, and check that Pillow finds the same size."""
    image = PngImagePlugin.PngImageFile(io.BytesIO(png))
    if image.size != IHDR.unpack_from(png, HEADER_AT)[:2]:
        raise CorruptPng("the decoded size differs from the header")
    if image.mode == "P":
        colours, rest = divmod(CHUNK.unpack_from(png, PALETTE_AT)[0], 3)
        if rest or image.getextrema()[1] >= colours:  # Pillow draws an index beyond the palette as black.
            raise CorruptPng("a pixel is an index beyond the palette, or the palette ends inside a colour")
    return image


def _grey(png: bytes, image: Image.Image) -> Image.Image:
    image, opacity = _apart(image, png[DEPTH_AT])
    if opacity is not None and opacity.getextrema() != (255, 255):
        raise Transparent("at least one pixel is not opaque")
    _check_depth(png, image, opacity)
    if image.mode in _DEEP:
        return _high_bytes(image)
    if image.mode in ("1", "L"):
        return image.convert("L")
    colours = np.asarray(image.convert("RGB")).astype(np.uint16)
    low, high = colours.min(2), colours.max(2)
    spread = int((high - low).max())
    if spread > 1:
        raise NotGrey(f"red, green and blue of a pixel differ by up to {spread} levels")
    return Image.fromarray((colours.sum(2) - low - high).astype(np.uint8))


def _luma(png: bytes, image: Image.Image) -> Image.Image:
    image, opacity = _apart(image, png[DEPTH_AT])
    _check_depth(png, image, opacity)
    grey = _high_bytes(image) if image.mode in _DEEP else image.convert("L")
    return compose(grey, opacity)


def _check_depth(png: bytes, image: Image.Image, opacity: Image.Image | None) -> None:
    """Raise `LowBitDepth` for opaque 16-bit samples that use 12 bits or fewer and are not all 0.

    Cameras and instruments store 10 or 12 bits this way. The high bytes alone would be an almost black image.
    """
    if png[DEPTH_AT] != 16:
        return
    samples = np.asarray(image)
    if opacity is not None:
        samples = samples[np.asarray(opacity) > 0]
    highest = int(samples.max(initial=0))
    if image.mode not in _DEEP:  # Pillow has dropped the low bytes.
        if highest == 0 and chunks.has_low_bytes(png):
            raise LowBitDepth("the 16-bit samples use only 8 of 16 bits")
        highest <<= 8
    if 0 < highest < _LEAST_HIGH_BYTE << 8:
        raise LowBitDepth(f"the 16-bit samples use only {highest.bit_length()} of 16 bits")


def _apart(image: Image.Image, depth: int) -> tuple[Image.Image, Image.Image | None]:
    """Return an image without its transparency, and the opacity of each pixel, mode L; None if all are opaque.

    Pillow scales samples below 8 bits and cuts those above, but not the level that tRNS declares transparent.
    """
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        return image.convert("RGB"), image.getchannel("A")
    level = image.info.pop("transparency", None)
    if level is None:
        return image, None
    samples = np.asarray(image.convert("L") if image.mode == "1" else image)
    if image.mode == "RGB":
        # Pillow has dropped the low bytes of 16-bit samples.
        clear = (samples == [each >> 8 if depth == 16 else each & 0xFF for each in level]).all(2)
    elif image.mode == "L":
        most = (1 << depth) - 1
        clear = samples == (level & most) * (255 // most)
    else:
        clear = samples == level
    return image, Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))


def _high_bytes(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
