"""From PNG bytes to grey pixels, and from pixels to the pictures that people look at.

Knows: PNG, grey, pictures. Does not know: models, stores, HTTP.

A PNG is checked chunk by chunk before anything is decompressed: signature, declared size, checksums, order, end. What
the service does not need (text, profiles, timestamps) is dropped unread, so only pixels are ever inflated: 28x28 of
them, or as many as the caller of `decode_any` allows.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageStat, PngImagePlugin

from app.problems import (
    AnimatedPng,
    BlankImage,
    CorruptPng,
    EmptyBody,
    ExtremeShape,
    ImageTooLarge,
    NotAPng,
    NotGrey,
    Transparent,
    TruncatedPng,
    WrongSize,
)

SIDE = 28
MAX_PIXELS = 4096 * 4096
"""A header that declares more is refused as hostile, whatever the wanted size."""

MAX_LENGTH = 8192
"""Longest side, in pixels, of an image of any size."""
MAX_RATIO = 32
"""Largest ratio of the sides of an image of any size: a 1 cropped to its strokes has 20 or less."""

_ORIENTATION, _SHORT = 0x0112, 3
"""The EXIF tag of the orientation, and the TIFF type of its value."""
_SOLID_ONLY = [0] * 250 + [255] * 6
"""Table that leaves only pixels that are opaque but for rounding."""
_PAGE_FILL = 0.9
"""Share of the box around all opaque pixels that a page fills; a slanted stroke fills far less."""
_STROKE_LEVELS = 24
"""Grey levels by which strokes differ from their page."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")
_CRC = struct.Struct(">I")
_IHDR = struct.Struct(">IIBBBBB")
_HEADER_AT = len(_SIGNATURE) + _CHUNK.size
_DEPTH_AT = _HEADER_AT + 8
_PALETTE_AT = _HEADER_AT + _IHDR.size + _CRC.size
"""Where PLTE begins in a file that was checked and has one."""
_KEPT = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_ORDER = re.compile(rb"IHDR(PLTE)?(tRNS)?(IDAT)+IEND")
_PALETTE = 3
"""The colour type of pixels that are places in PLTE."""
_DEEP = ("I;16", "I;16B", "I")
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    zlib.error,
    struct.error,
    Image.DecompressionBombError,
)
_PLAIN = (8, 0, 0, 0, 0)
"""Bit depth, colour type, compression, filter, interlace of a plain 8-bit grey PNG."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Numbers of a pixel, by colour type."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of each pass over an interlaced image: its first column and row, and the steps to the next ones."""
_PIECE = 64 * 1024
"""Bytes that are inflated at a time where only their number counts."""


class _Canvas(threading.local):
    """An image that is drawn over again and again, one in each thread: a fresh one is a quarter of the decoding."""

    def __init__(self) -> None:
        self.image = Image.new("L", (SIDE, SIDE))


_canvas = _Canvas()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return _CHUNK.pack(len(content), kind) + content + _CRC.pack(zlib.crc32(kind + content))


_USUAL_START = _SIGNATURE + _chunk(b"IHDR", _IHDR.pack(SIDE, SIDE, *_PLAIN))
_USUAL_END = _chunk(b"IEND", b"")
_USUAL_SIZE = SIDE * (1 + SIDE)


def decode(png: bytes) -> bytes:
    """Read a PNG of 28x28 pixels that means one grey image.

    Grey of 1, 2, 4 and 8 bits is scaled to 0..255 and of 16 bits keeps its high byte; palette and RGB are accepted
    when red, green and blue are equal in every pixel; alpha, and a level declared transparent, when every pixel is
    opaque all the same.

    Args:
        png: the whole file.

    Returns:
        The pixels in rows from the top, uint8 [28, 28], as bytes.

    Raises:
        InvalidImage: one of its kinds says what is wrong.
        EmptyBody: there are no bytes.
    """
    compressed = _usual(png)
    if not compressed:
        compressed, png = _check(png, _only_the_models_size)
    try:
        if compressed:
            # Pillow's own decoder without its PNG reader, which costs twice as much and has nothing left to check.
            _canvas.image.frombytes(compressed, "zip", "L", 0)
            return _canvas.image.tobytes()
        with _opened(png) as image:
            pixels = _grey(image, png[_DEPTH_AT]).tobytes()
    except _UNREADABLE as error:
        raise CorruptPng("the compressed pixels cannot be read") from error
    if len(pixels) != SIDE * SIDE:
        raise CorruptPng("the pixels are not as many as the header declares")
    return pixels


def check_shape(width: int, height: int, max_pixels: int) -> None:
    """Reject the declared size of an image before anything is decompressed.

    Area alone does not bound the cost: 4 million rows of one pixel cost far more than 2,048 rows of 2,048.

    Raises:
        ImageTooLarge: there are more pixels than the limit.
        ExtremeShape: one side is too long, or the sides differ too much.
    """
    if width * height > max_pixels:
        raise ImageTooLarge(f"the header declares {width}x{height} pixels, the limit is {max_pixels} in all")
    if max(width, height) > MAX_LENGTH:
        raise ExtremeShape(f"the header declares {width}x{height} pixels, the longest side is {MAX_LENGTH}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ExtremeShape(f"the header declares {width}x{height} pixels, one side is over {MAX_RATIO} times the other")


def orientation_of(png: bytes) -> int:
    """Return the EXIF orientation, 1 to 8, that a checked PNG has in its chunk eXIf; 1 where it has none."""
    start = len(_SIGNATURE)
    while start + 12 <= len(png):
        length, kind = _CHUNK.unpack_from(png, start)
        if kind == b"eXIf":
            return exif_orientation(png[start + 8 : start + 8 + length])
        start += 12 + length
    return 1


def exif_orientation(exif: bytes) -> int:
    """Return the orientation, 1 to 8, of an EXIF block that begins with its TIFF header; 1 where it is not stated.

    Only the entries of the first directory are read, so a damaged block costs nothing and raises nothing.
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


def decode_any(png: bytes, max_pixels: int) -> Image.Image:
    """Read a PNG of any size as one grey image.

    Colours become their luma (ITU-R 601). Transparent pixels around an opaque page get the page's own colour. Other
    transparent pixels become white when the opaque pixels are dark on average, else black, so that strokes stand out.

    Args:
        png: the whole file.
        max_pixels: a header that declares more is refused before anything is inflated.

    Returns:
        An image of mode L.

    Raises:
        InvalidImage: one of its kinds says what is wrong.
        EmptyBody: there are no bytes.
    """
    _, png = _check(png, lambda width, height: check_shape(width, height, max_pixels))
    try:
        with _opened(png) as image:
            return luma(image, png[_DEPTH_AT])
    except _UNREADABLE as error:
        raise CorruptPng("the compressed pixels cannot be read") from error


def _usual(png: bytes) -> bytes:
    """Return the compressed pixels of a file as most clients write it, else nothing: then `_check` looks closer.

    Such a file is the one possible header of a plain 28x28 image, one chunk IDAT, and the end.
    """
    if not (png.startswith(_USUAL_START) and png.endswith(_USUAL_END)):
        return b""
    start, end = len(_USUAL_START), len(png) - len(_USUAL_END)
    length, kind = _CHUNK.unpack_from(png, start)
    if kind != b"IDAT" or length != end - start - 12 or length > _most_compressed(SIDE, SIDE):
        return b""
    if _CRC.unpack_from(png, end - 4)[0] != zlib.crc32(png[start + 4 : end - 4]):
        return b""
    compressed = png[start + 8 : end - 4]
    return compressed if _inflates_to(compressed, _USUAL_SIZE) else b""


def _most_compressed(width: int, height: int) -> int:
    """Return the bytes that the deepest image, 16-bit RGBA, can need, with room to spare; more is a bomb or padding."""
    return 2 * height * (width * 8 + 1) + 1024


def _check(png: bytes, judge: Callable[[int, int], None]) -> tuple[bytes, bytes]:
    """Return the compressed pixels when they are plain 8-bit grey, and the PNG without the chunks not needed."""
    if not png:
        raise EmptyBody("the image has no bytes")
    if not png.startswith(_SIGNATURE):
        raise NotAPng("the first bytes are not the PNG signature")
    header = _header(png)
    width, height = _IHDR.unpack(header)[:2]
    judge(width, height)
    parts: list[bytes] = [_SIGNATURE]
    kinds: list[bytes] = []
    pixels: list[bytes] = []
    before = b""
    for kind, start, end in _chunks(png):
        if kind == b"acTL":
            raise AnimatedPng("the chunk acTL announces several frames")
        if kind in _KEPT:
            parts.append(png[start:end])
            kinds.append(kind)
            if kind == b"IDAT":
                if pixels and before != b"IDAT":
                    raise CorruptPng("the chunks IDAT do not follow each other")
                pixels.append(png[start + 8 : end - 4])
        elif not kind[0] & 0x20:  # bit 5 of the first letter unset: no reader may skip the chunk
            raise CorruptPng("an unknown chunk claims to be critical")
        before = kind
    compressed = b"".join(pixels)
    if len(compressed) > _most_compressed(width, height):
        raise CorruptPng("there is more compressed data than the declared pixels can need")
    if header[8:] == bytes(_PLAIN) and kinds == [b"IHDR", *[b"IDAT"] * (len(kinds) - 2), b"IEND"]:
        _check_pixels(compressed, header)
        return compressed, b"".join(parts)
    # Pillow obeys the last of several headers, which nobody has judged.
    order = _ORDER.fullmatch(b"".join(kinds))
    if order is None:
        raise CorruptPng("a chunk is there twice, or the chunks are out of order")
    if header[9] == _PALETTE and not order[1]:
        raise CorruptPng("the pixels are places in a palette that is not there")
    _check_pixels(compressed, header)
    return b"", b"".join(parts)


def _check_pixels(compressed: bytes, header: bytes) -> None:
    # Pillow takes the end of the compressed data for the end of the image, and leaves the rest black.
    if not _inflates_to(compressed, _inflated_size(*_IHDR.unpack(header))):
        raise CorruptPng("the compressed pixels are fewer than the header declares, or cannot be read")


def _inflates_to(compressed: bytes, size: int) -> bool:
    """Return whether data can be inflated to so many bytes or more, without keeping any of them."""
    inflater = zlib.decompressobj()
    try:
        while size > 0 and (piece := inflater.decompress(compressed, min(size, _PIECE))):
            size -= len(piece)
            compressed = inflater.unconsumed_tail
    except zlib.error:
        return False
    return size <= 0


def _inflated_size(width: int, height: int, depth: int, colour: int, _: int, __: int, interlace: int) -> int:
    """Return the bytes of all rows, each behind the byte that names its filter. PNG specification, 7.2 and 8.2."""
    bits = depth * _CHANNELS.get(colour, 1)
    size = 0
    for left, top, across, down in _ADAM7 if interlace else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            size += rows * (1 + (columns * bits + 7) // 8)
    return size


def _chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk up to IEND, as its kind, start and end, after comparing its checksum."""
    start, kind = len(_SIGNATURE), b""
    while kind != b"IEND":
        if start + 12 > len(png):
            raise TruncatedPng("the file ends before the chunk IEND")
        length, kind = _CHUNK.unpack_from(png, start)
        end = start + 12 + length
        if end > len(png):
            raise TruncatedPng("the file ends inside a chunk")
        if _CRC.unpack_from(png, end - 4)[0] != zlib.crc32(png[start + 4 : end - 4]):
            raise CorruptPng("a checksum does not match")
        if not kind.isalpha():
            raise CorruptPng("the name of a chunk is not of letters")
        if kind == b"IEND" and length:
            raise CorruptPng("the chunk IEND holds something")
        yield kind, start, end
        start = end


def _header(png: bytes) -> bytes:
    """Return the 13 bytes of IHDR, whose declared size is one that the service may look at."""
    start = len(_SIGNATURE) + _CHUNK.size
    length, kind = _CHUNK.unpack(png[len(_SIGNATURE) : start].ljust(_CHUNK.size))
    if len(png) < start:
        raise TruncatedPng("the file ends inside its header")
    if kind != b"IHDR" or length != _IHDR.size:
        raise CorruptPng("the first chunk is not IHDR")
    content = png[start : start + length]
    if len(content) < length:
        raise TruncatedPng("the file ends inside its header")
    width, height, _, _, compression, filters, _ = _IHDR.unpack(content)
    if width * height > MAX_PIXELS:
        raise ImageTooLarge(f"the header declares {width}x{height} pixels")
    if compression or filters:
        raise CorruptPng("the header names a compression or filtering that no PNG has")
    return content


def _only_the_models_size(width: int, height: int) -> None:
    if (width, height) != (SIDE, SIDE):
        raise WrongSize(f"the image is {width}x{height}, the model takes {SIDE}x{SIDE}")


def _opened(png: bytes) -> PngImagePlugin.PngImageFile:
    """Open a checked PNG, and make sure that Pillow found the very size that was judged."""
    image = PngImagePlugin.PngImageFile(io.BytesIO(png))
    if image.size != _IHDR.unpack_from(png, _HEADER_AT)[:2]:
        raise CorruptPng("the file contradicts its own header")
    if image.mode == "P":
        colours, rest = divmod(_CHUNK.unpack_from(png, _PALETTE_AT)[0], 3)
        if rest or image.getextrema()[1] >= colours:  # Pillow takes a place beyond the palette for black
            raise CorruptPng("a pixel is a place beyond the end of the palette, or the palette ends inside a colour")
    return image


def _grey(image: Image.Image, depth: int) -> Image.Image:
    image, opacity = _apart(image, depth)
    if opacity is not None and opacity.getextrema() != (255, 255):
        raise Transparent("at least one pixel is not opaque")
    if image.mode in _DEEP:
        return _high_bytes(image)
    if image.mode in ("1", "L"):
        return image.convert("L")
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")), 2, 0)
    if not (np.array_equal(red, green) and np.array_equal(green, blue)):
        raise NotGrey("red, green and blue differ in at least one pixel")
    return Image.fromarray(red)


def luma(image: Image.Image, depth: int = 8) -> Image.Image:
    """Return an opened image as grey, its transparent pixels laid on the page or on the contrary of the strokes."""
    image, opacity = _apart(image, depth)
    grey = _high_bytes(image) if image.mode in _DEEP else image.convert("L")
    if opacity is None or opacity.getextrema()[0] == 255:
        return grey
    if opacity.getextrema()[1] == 0:
        raise BlankImage("every pixel is transparent")
    page = _page_level(grey, opacity)
    if page is not None:
        # The pixels of a window's shadow and round corners are black or mixed with it, so they are not blended in.
        return Image.composite(grey, Image.new("L", grey.size, page), opacity.point(_SOLID_ONLY))
    dark = ImageStat.Stat(grey, opacity).mean[0] < 128
    return Image.composite(grey, Image.new("L", grey.size, 255 if dark else 0), opacity)


def _page_level(grey: Image.Image, opacity: Image.Image) -> int | None:
    """Return the grey level of the opaque page that transparent pixels surround; None where strokes lie on nothing.

    A page fills the box around the opaque pixels, up to its round corners, and has strokes of another level on it.
    """
    solid = opacity.point(_SOLID_ONLY)
    box = solid.getbbox()
    if box is None:
        return None
    inside, levels = solid.crop(box), grey.histogram(solid)
    if ImageStat.Stat(inside).mean[0] < 255 * _PAGE_FILL:
        return None
    page = max(range(256), key=levels.__getitem__)
    strokes = sum(count for level, count in enumerate(levels) if abs(level - page) >= _STROKE_LEVELS)
    return page if strokes else None


def _apart(image: Image.Image, depth: int) -> tuple[Image.Image, Image.Image | None]:
    """Return an image without its transparency, and how opaque each pixel is, mode L; None when all are.

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
        # Of 16 bits only the high bytes are left to compare.
        clear = (samples == [each >> 8 if depth == 16 else each & 0xFF for each in level]).all(2)
    elif image.mode == "L":
        most = (1 << depth) - 1
        clear = samples == (level & most) * (255 // most)
    else:
        clear = samples == level
    return image, Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))


def _high_bytes(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


def encode(pixels: NDArray[np.uint8], scale: int = 1) -> bytes:
    """Return pixels, uint8 [height, width] grey or [height, width, 3] RGB, as a PNG with `scale` times the size."""
    return _png(_enlarged(pixels, scale))


def grey_picture(plane: bytes) -> NDArray[np.uint8]:
    """Return a plane of 784 bytes as uint8 [28, 28]."""
    return np.frombuffer(plane, np.uint8).reshape(SIDE, SIDE)


def error_picture(error_map: bytes) -> NDArray[np.uint8]:
    """Return an error map of 784 bytes in colour, uint8 [28, 28, 3]: black is no error, pale yellow the largest."""
    return _COLOURS[grey_picture(error_map)]


def panel(planes: dict[str, NDArray[np.uint8]], caption: str, *, anomalous: bool, scale: int) -> bytes:
    """Return pictures side by side, each under its name, above a line that says the verdict, as a PNG.

    Args:
        planes: pictures, uint8 [28, 28] or [28, 28, 3], by the name to write above each.
        caption: the line below.
        anomalous: colours the line.
        scale: pixels a side for one pixel of a picture; below 4 there is no room for words, and none are written.
    """
    gap, side = 2 * scale, SIDE * scale
    room = 3 * scale if scale >= 4 else 0
    size = (len(planes) * side + (len(planes) + 1) * gap, side + 2 * gap + 2 * room)
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    for place, (name, plane) in enumerate(planes.items()):
        left = gap + place * (side + gap)
        canvas.paste(_enlarged(plane, scale), (left, gap + room))
        if room:
            draw.text((left, gap / 2), name, fill=_INK, font=ImageFont.load_default(2.2 * scale))
    if room:
        draw.text(
            (gap, side + gap + room + gap / 4),
            caption,
            fill=_ALARM if anomalous else _CALM,
            font=ImageFont.load_default(2.2 * scale),
        )
    return _png(canvas)


def _enlarged(pixels: NDArray[np.uint8], scale: int) -> Image.Image:
    image = Image.fromarray(pixels)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) if scale > 1 else image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


_PAPER, _INK, _CALM, _ALARM = "#ffffff", "#1b1f24", "#1a7f37", "#b3261e"
_ANCHORS = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))


def _colours() -> NDArray[np.uint8]:
    """Return 256 colours from black over red to pale yellow, uint8 [256, 3]; lightness only ever rises."""
    at = np.linspace(0, 255, len(_ANCHORS))
    return np.stack([np.interp(np.arange(256), at, channel) for channel in zip(*_ANCHORS, strict=True)], 1).astype(
        np.uint8
    )


_COLOURS = _colours()
