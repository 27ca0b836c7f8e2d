"""Checks the structure of a PNG, chunk by chunk, before a decoder reads it.

Signature, declared size, checksums, order and end are checked first. Chunks that the service does not need (text,
profiles, times) are dropped unread, so only pixels are inflated.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator

from app.images.formats import SIGNATURE, describe
from app.problems import AnimatedPng, CorruptPng, EmptyBody, ImageTooLarge, NotAPng, TruncatedPng

MAX_PIXELS = 4096 * 4096
"""Maximum number of pixels that a header may declare, even if the caller accepts more."""

CHUNK = struct.Struct(">I4s")
CRC = struct.Struct(">I")
IHDR = struct.Struct(">IIBBBBB")
HEADER_AT = len(SIGNATURE) + CHUNK.size
DEPTH_AT = HEADER_AT + 8
PALETTE_AT = HEADER_AT + IHDR.size + CRC.size
"""Offset of PLTE in a file that was checked and has one."""
PLAIN = (8, 0, 0, 0, 0)
"""Bit depth, colour type, compression, filter, interlace of a plain 8-bit grey PNG."""
_KEPT = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_ORDER = re.compile(rb"IHDR(PLTE)?(tRNS)?(IDAT)+IEND")
_MANY_CHUNKS = "Save the image again with a common program: it writes few, large chunks."
_PALETTE = 3
"""The colour type of pixels that are indices into PLTE."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples per pixel, by colour type."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row of each pass over an interlaced image, and the steps to the next ones."""
_FEW_CHUNKS = 64
_BYTES_PER_CHUNK = 256
"""Minimum mean size of the chunks of a file that has more than a few. Programs write chunks of kilobytes."""
_PIECE = 64 * 1024
"""Number of bytes inflated at a time where only their count matters."""


def most_compressed(width: int, height: int) -> int:
    """Return the maximum compressed size of an image, for 16-bit RGBA and with a margin; more is a bomb or padding."""
    return 2 * height * (width * 8 + 1) + 1024


def check(png: bytes, check_size: Callable[[int, int], None], conversion: str) -> tuple[bytes, bytes]:
    """Check the structure of a PNG.

    Args:
        png: the whole file.
        check_size: raises a problem if the declared width and height are not accepted.
        conversion: the hint for images of another format.

    Returns:
        The compressed pixels if they are plain 8-bit grey, else nothing; and the PNG without the chunks not needed.
    """
    if not png:
        raise EmptyBody("the image has no bytes")
    if not png.startswith(SIGNATURE):
        detail, hint = describe(png, conversion)
        raise NotAPng(detail, hint=hint)
    header = _header(png)
    width, height = IHDR.unpack(header)[:2]
    check_size(width, height)
    parts: list[bytes] = [SIGNATURE]
    kinds: list[bytes] = []
    pixels: list[bytes] = []
    before = b""
    for kind, start, end in _chunks(png, most=_FEW_CHUNKS + len(png) // _BYTES_PER_CHUNK):
        if kind == b"acTL":
            raise AnimatedPng("the chunk acTL declares several frames")
        if kind in _KEPT:
            parts.append(png[start:end])
            kinds.append(kind)
            if kind == b"IDAT":
                if pixels and before != b"IDAT":
                    raise CorruptPng("the IDAT chunks are not consecutive")
                pixels.append(png[start + 8 : end - 4])
        elif not kind[0] & 0x20:  # A capital first letter marks a chunk that no reader may skip.
            raise CorruptPng(f"the critical chunk {kind.decode()} is unknown")
        before = kind
    compressed = b"".join(pixels)
    if len(compressed) > most_compressed(width, height):
        raise CorruptPng("there is more compressed data than the declared pixels can have")
    if header[8:] == bytes(PLAIN) and kinds == [b"IHDR", *[b"IDAT"] * (len(kinds) - 2), b"IEND"]:
        _check_pixels(compressed, header)
        return compressed, b"".join(parts)
    # Pillow uses the last of several headers, which `check_size` has not checked.
    order = _ORDER.fullmatch(b"".join(kinds))
    if order is None:
        raise CorruptPng("a chunk is repeated, or the chunks are out of order")
    if header[9] == _PALETTE and not order[1]:
        raise CorruptPng("the pixels are indices into a palette, and the chunk PLTE is missing")
    _check_pixels(compressed, header)
    return b"", b"".join(parts)


def _check_pixels(compressed: bytes, header: bytes) -> None:
    # Pillow accepts compressed data that ends early, and leaves the missing pixels black.
    if not inflates_to(compressed, _inflated_size(*IHDR.unpack(header))):
        raise CorruptPng("the compressed pixels are fewer than the header declares, or cannot be read")


def inflates_to(compressed: bytes, size: int) -> bool:
    """Return whether data inflates to at least `size` bytes, without storing them."""
    inflater = zlib.decompressobj()
    try:
        while size > 0 and (piece := inflater.decompress(compressed, min(size, _PIECE))):
            size -= len(piece)
            compressed = inflater.unconsumed_tail
    except zlib.error:
        return False
    return size <= 0


def _inflated_size(width: int, height: int, depth: int, colour: int, _: int, __: int, interlace: int) -> int:
    bits = depth * _CHANNELS.get(colour, 1)
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in _passes(width, height, interlace))


def _passes(width: int, height: int, interlace: int) -> Iterator[tuple[int, int]]:
    """Yield columns and rows of each pass. Every row follows the byte of its filter (PNG specification, 7.2, 8.2)."""
    for left, top, across, down in _ADAM7 if interlace else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            yield columns, rows


def has_low_bytes(png: bytes) -> bool:
    """Return whether a checked 16-bit PNG has a colour sample other than 0.

    Filters work on each byte position of a pixel separately, and a position that is 0 in all pixels stays 0 under
    every filter. So the filtered rows answer the question, which Pillow cannot: it drops the low bytes.
    """
    width, height, _, colour, _, _, interlace = IHDR.unpack_from(png, HEADER_AT)
    compressed = b"".join(png[start + 8 : end - 4] for kind, start, end in _chunks(png, len(png)) if kind == b"IDAT")
    size = _inflated_size(*IHDR.unpack_from(png, HEADER_AT))
    content = zlib.decompressobj().decompress(compressed, size)
    step = 2 * _CHANNELS[colour]
    colours = step - 2 if colour & 4 else step
    at = 0
    for columns, rows in _passes(width, height, interlace):
        for _ in range(rows):
            row = content[at + 1 : at + 1 + columns * step]
            if any(any(row[place::step]) for place in range(colours)):
                return True
            at += 1 + columns * step
    return False


def _chunks(png: bytes, most: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each of at most `most` chunks, and check that nothing follows IEND.

    A wrong checksum in a chunk that the service drops is ignored, as browsers do.
    """
    start, kind, count = len(SIGNATURE), b"", 0
    while kind != b"IEND":
        count += 1
        if count > most:
            raise CorruptPng(f"the file has more than {most} chunks", hint=_MANY_CHUNKS)
        if start + 12 > len(png):
            raise TruncatedPng("the file ends before the chunk IEND")
        length, kind = CHUNK.unpack_from(png, start)
        end = start + 12 + length
        if end > len(png):
            raise TruncatedPng("the file ends inside a chunk")
        if not kind.isalpha():
            raise CorruptPng("the name of a chunk has characters other than letters")
        read = kind in _KEPT or not kind[0] & 0x20
        if read and CRC.unpack_from(png, end - 4)[0] != zlib.crc32(png[start + 4 : end - 4]):
            raise CorruptPng(f"the checksum of the chunk {kind.decode()} does not match")
        if kind == b"IEND" and length:
            raise CorruptPng("the chunk IEND is not empty")
        yield kind, start, end
        start = end
    if png.startswith(SIGNATURE, start):
        raise CorruptPng("a second PNG follows the chunk IEND", hint="Send one image per request.")
    if start < len(png):
        hint = "Cut the file after the chunk IEND, or save the image again."
        raise CorruptPng(f"{len(png) - start} bytes follow the chunk IEND", hint=hint)


def _header(png: bytes) -> bytes:
    """Return the 13 bytes of IHDR after checking that the declared size is acceptable."""
    start = HEADER_AT
    length, kind = CHUNK.unpack(png[len(SIGNATURE) : start].ljust(CHUNK.size))
    if len(png) < start:
        raise TruncatedPng("the file ends inside its header")
    if kind == b"CgBI":
        raise CorruptPng("the file has Apple's private variant of PNG", hint="Export the image as a standard PNG.")
    if kind != b"IHDR" or length != IHDR.size:
        raise CorruptPng("the first chunk is not IHDR")
    content = png[start : start + length]
    if len(content) < length:
        raise TruncatedPng("the file ends inside its header")
    width, height, _, _, compression, filters, _ = IHDR.unpack(content)
    if width * height > MAX_PIXELS:
        raise ImageTooLarge(f"the header declares {width}x{height} pixels")
    if compression or filters:
        raise CorruptPng("the header declares an undefined compression or filter method")
    return content
