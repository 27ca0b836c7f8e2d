"""Decoding: valid and invalid PNGs of every kind, and the pictures of reconstructions."""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app import problems
from app.images.chunks import check, has_low_bytes
from app.images.pictures import encode, error_picture, panel
from app.images.png import PREPARED, _usual, decode, decode_any, encode_prepared, is_prepared
from tests import pngs

GREY = pngs.gradient()


def pixels(png: bytes) -> np.ndarray:
    return np.frombuffer(decode(png), np.uint8).reshape(28, 28)


def rgb(grey: np.ndarray, *more: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([grey, grey, grey, *more], 2))


def two_grey_levels() -> Image.Image:
    return Image.fromarray(np.where(GREY > 120, 255, 0).astype(np.uint8))


def palette() -> Image.Image:
    return two_grey_levels().convert("P")


def sixteen_bit(*extra: bytes) -> bytes:
    wide = ((GREY.astype(np.uint16) << 8) | 0x7F).astype(">u2")
    pixels = pngs.chunk(b"IDAT", pngs.rows(wide))
    return pngs.SIGNATURE + pngs.header(depth=16) + b"".join(extra) + pixels + pngs.chunk(b"IEND")


def sixteen_bit_rgb(*extra: bytes) -> bytes:
    wide = np.repeat(((GREY.astype(np.uint16) << 8) | 0x7F)[..., None], 3, 2).reshape(28, -1).astype(">u2")
    pixels = pngs.chunk(b"IDAT", pngs.rows(wide))
    return pngs.SIGNATURE + pngs.header(depth=16, colour=2) + b"".join(extra) + pixels + pngs.chunk(b"IEND")


NOISE = np.random.default_rng(1).integers(0, 2**16, (28, 28))
"""Samples that deflate cannot shorten."""


def deep(samples: np.ndarray, colour: int = 0, *extra: bytes) -> bytes:
    """Return a 16-bit PNG of samples [28, 28 times the samples per pixel]."""
    content = pngs.chunk(b"IDAT", pngs.rows(samples.astype(">u2")))
    return pngs.SIGNATURE + pngs.header(depth=16, colour=colour) + b"".join(extra) + content + pngs.chunk(b"IEND")


def off_by_one() -> Image.Image:
    """Return an RGB image whose channels differ by one level in some pixels, and whose median is `GREY`."""
    other = np.where(np.arange(784).reshape(28, 28) % 3 == 0, GREY + 1, GREY).astype(np.uint8)
    return Image.fromarray(np.stack([GREY, other, GREY], 2))


def levels(depth: int) -> np.ndarray:
    """Return uint8 [28, 28] of all levels of `depth` bits but the lowest."""
    return (1 + np.arange(784) % ((1 << depth) - 1)).astype(np.uint8).reshape(28, 28)


def shallow(depth: int, *extra: bytes) -> bytes:
    """Return a PNG of `levels` with 1, 2 or 4 bits a pixel."""
    bits = np.unpackbits(levels(depth)[..., None], axis=2)[:, :, -depth:].reshape(28, -1)
    pixels = pngs.chunk(b"IDAT", pngs.rows(np.packbits(bits, axis=1)))
    return pngs.SIGNATURE + pngs.header(depth=depth) + b"".join(extra) + pixels + pngs.chunk(b"IEND")


def clear(*levels: int) -> bytes:
    """Return the chunk that declares one level, or one colour, transparent."""
    return pngs.chunk(b"tRNS", struct.pack(f">{len(levels)}H", *levels))


def of_palette(*chunks: bytes) -> bytes:
    return pngs.SIGNATURE + pngs.header(colour=3) + b"".join(chunks) + pngs.chunk(b"IEND")


END = pngs.chunk(b"IEND")
PIXELS_OF = {
    28: pngs.chunk(b"IDAT", pngs.rows(np.zeros((28, 56), np.uint8))),
    30: pngs.chunk(b"IDAT", pngs.rows(pngs.gradient(30))),
    3000: pngs.chunk(b"IDAT", zlib.compress(bytes(3000 * 3001), 9)),
}
PALETTE = pngs.chunk(b"PLTE", bytes(n for n in range(256) for _ in range(3)))
PIXELS = pngs.chunk(b"IDAT", pngs.rows(GREY))


def split_pixels(between: bytes) -> bytes:
    """Return the grey image with its compressed pixels in two chunks."""
    content = pngs.rows(GREY)
    parts = pngs.chunk(b"IDAT", content[:50]) + between + pngs.chunk(b"IDAT", content[50:])
    return pngs.SIGNATURE + pngs.header() + parts + END


def interlaced() -> bytes:
    """Adam7: seven passes over the pixels, each row with filter 0."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = b"".join(b"\0" + row.tobytes() for top, left, down, right in passes for row in GREY[top::down, left::right])
    content = pngs.chunk(b"IDAT", zlib.compress(lines))
    return pngs.SIGNATURE + pngs.header(interlace=1) + content + pngs.chunk(b"IEND")


ACCEPTED = {
    "8-bit grey": (pngs.plain(), GREY),
    "as Pillow writes it": (pngs.saved(Image.fromarray(GREY), optimize=True), GREY),
    "with text and a time": (pngs.plain(GREY, pngs.chunk(b"tEXt", b"a\0b"), pngs.chunk(b"tIME", bytes(7))), GREY),
    "1-bit": (pngs.saved(two_grey_levels().convert("1")), np.asarray(two_grey_levels())),
    "palette": (pngs.saved(palette()), np.asarray(two_grey_levels())),
    "RGB": (pngs.saved(rgb(GREY)), GREY),
    "RGB with one level of difference": (pngs.saved(off_by_one()), GREY),
    "a wrong checksum in a text": (pngs.plain(GREY, pngs.chunk(b"tEXt", b"a\0b", crc=7)), GREY),
    "16-bit, all black": (deep(np.zeros((28, 28))), np.zeros((28, 28))),
    "16-bit RGB, all black": (deep(np.zeros((28, 84)), colour=2), np.zeros((28, 28))),
    "RGBA, opaque": (pngs.saved(rgb(GREY, np.full_like(GREY, 255))), GREY),
    "grey and alpha, opaque": (pngs.saved(Image.fromarray(GREY).convert("LA")), GREY),
    "16-bit": (sixteen_bit(), GREY),
    "16-bit, incompressible": (deep(NOISE), NOISE >> 8),
    "interlaced": (interlaced(), GREY),
    "grey with a transparent level that no pixel has": (
        pngs.plain(np.where(GREY == 7, 8, GREY).astype(np.uint8), pngs.chunk(b"tRNS", b"\0\7")),
        np.where(GREY == 7, 8, GREY),
    ),
    **{f"{depth}-bit": (shallow(depth), levels(depth) * (255 // ((1 << depth) - 1))) for depth in (2, 4)},
    **{
        f"{depth}-bit with a transparent level that no pixel has": (
            shallow(depth, clear(0)),
            levels(depth) * (255 // ((1 << depth) - 1)),
        )
        for depth in (1, 2, 4)
    },
    "16-bit with a transparent level that no pixel has": (sixteen_bit(clear(int(GREY[0, 0]) << 8)), GREY),
    "16-bit RGB with a transparent colour that no pixel has": (sixteen_bit_rgb(clear(0xFF00, 0, 0)), GREY),
    "a palette of all greys": (of_palette(PALETTE, PIXELS), GREY),
    "a palette just long enough": (
        of_palette(pngs.chunk(b"PLTE", bytes(n for n in range(int(GREY.max()) + 1) for _ in range(3))), PIXELS),
        GREY,
    ),
    "pixels in two chunks": (split_pixels(b""), GREY),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_grey_images_are_accepted(name: str) -> None:
    """Every PNG encoding of a grey image decodes to exactly its pixels."""
    png, expected = ACCEPTED[name]
    assert np.array_equal(pixels(png), expected)


def with_alpha(value: int) -> Image.Image:
    alpha = np.full_like(GREY, 255)
    alpha[3, 3] = value
    return rgb(GREY, alpha)


def coloured() -> Image.Image:
    other = GREY.copy()
    other[5, 5] ^= 2
    return Image.fromarray(np.stack([GREY, GREY, other], 2))


def bad_checksum() -> bytes:
    png = bytearray(pngs.plain())
    png[-20] ^= 1
    return bytes(png)


def declared(width: int, height: int) -> bytes:
    return pngs.SIGNATURE + pngs.header(width, height) + pngs.chunk(b"IDAT", zlib.compress(bytes(100)))


GIF = pngs.saved(Image.fromarray(GREY), format="GIF")
REFUSED = {
    "no bytes": (b"", problems.EmptyBody),
    "JPEG": (pngs.saved(Image.fromarray(GREY), format="JPEG"), problems.NotAPng),
    "GIF": (GIF, problems.NotAPng),
    "TIFF": (pngs.saved(Image.fromarray(GREY), format="TIFF"), problems.NotAPng),
    "text": (b"I am a PNG, believe me", problems.NotAPng),
    "only the signature": (pngs.SIGNATURE, problems.TruncatedPng),
    "cut inside the header": (pngs.plain()[:20], problems.TruncatedPng),
    "cut inside the pixels": (pngs.plain()[:200], problems.TruncatedPng),
    "without its end": (pngs.plain()[:-12], problems.TruncatedPng),
    "bad checksum": (bad_checksum(), problems.CorruptPng),
    "bad checksum of the transparency": (
        pngs.plain(GREY, pngs.chunk(b"tRNS", b"\0\7", crc=7)),
        problems.CorruptPng,
    ),
    "bytes after the end": (pngs.plain() + b"more", problems.CorruptPng),
    "two files in one": (pngs.plain() * 2, problems.CorruptPng),
    **{f"{bits} bits in 16": (deep(np.full((28, 28), 2**bits - 1)), problems.LowBitDepth) for bits in (1, 8, 10, 12)},
    **{
        f"{bits} bits in 16, {name}": (
            deep(np.tile([2**bits - 1] * colours + [65535] * alpha, (28, 28)), kind),
            problems.LowBitDepth,
        )
        for bits in (8, 12)
        for name, kind, colours, alpha in (("RGB", 2, 3, 0), ("grey and alpha", 4, 1, 1), ("RGBA", 6, 3, 1))
    },
    "no header": (pngs.SIGNATURE + pngs.chunk(b"IDAT", b"") + pngs.chunk(b"IEND"), problems.CorruptPng),
    "no pixels": (pngs.SIGNATURE + pngs.header() + pngs.chunk(b"IEND"), problems.CorruptPng),
    "fewer pixels than declared": (
        pngs.SIGNATURE + pngs.header() + pngs.chunk(b"IDAT", zlib.compress(bytes(100))) + pngs.chunk(b"IEND"),
        problems.CorruptPng,
    ),
    "pixels that are no zlib stream": (
        pngs.SIGNATURE + pngs.header() + pngs.chunk(b"IDAT", b"\x55" * 90) + pngs.chunk(b"IEND"),
        problems.CorruptPng,
    ),
    "impossible bit depth": (
        pngs.SIGNATURE + pngs.header(depth=7) + pngs.chunk(b"IDAT", pngs.rows(GREY)) + pngs.chunk(b"IEND"),
        problems.CorruptPng,
    ),
    "unknown critical chunk": (pngs.plain(GREY, pngs.chunk(b"ABCD", b"")), problems.CorruptPng),
    "27x28": (pngs.plain(GREY[:, :27]), problems.WrongSize),
    "no width": (declared(0, 28), problems.WrongSize),
    "a large photograph": (declared(640, 480), problems.WrongSize),
    "65535x65535": (declared(65535, 65535), problems.ImageTooLarge),
    "a row above the maximum": (declared(4096, 4097), problems.ImageTooLarge),
    "the maximum": (declared(4096, 4096), problems.WrongSize),
    "animated": (pngs.plain(GREY, pngs.chunk(b"acTL", struct.pack(">II", 2, 0))), problems.AnimatedPng),
    "coloured": (pngs.saved(coloured()), problems.NotGrey),
    "half transparent": (pngs.saved(with_alpha(128)), problems.Transparent),
    "one transparent pixel": (pngs.saved(with_alpha(0)), problems.Transparent),
    "grey with a transparent level": (pngs.plain(GREY, pngs.chunk(b"tRNS", b"\0\7")), problems.Transparent),
    **{
        f"{depth}-bit with a transparent level": (shallow(depth, clear(1)), problems.Transparent) for depth in (1, 2, 4)
    },
    "16-bit with a transparent level": (sixteen_bit(clear(int(GREY[0, 0]) << 8 | 0x7F)), problems.Transparent),
    "16-bit RGB with a transparent colour": (
        sixteen_bit_rgb(clear(*[int(GREY[0, 0]) << 8 | 0x7F] * 3)),
        problems.Transparent,
    ),
    "a palette with a transparent place": (
        of_palette(PALETTE, pngs.chunk(b"tRNS", b"\xff" * 7 + b"\x80"), PIXELS),
        problems.Transparent,
    ),
    "a palette that is not there": (of_palette(PIXELS), problems.CorruptPng),
    "a palette that is too short": (
        of_palette(pngs.chunk(b"PLTE", bytes(3 * int(GREY.max()))), PIXELS),
        problems.CorruptPng,
    ),
    "a palette with a third of a colour": (of_palette(pngs.chunk(b"PLTE", bytes(766)), PIXELS), problems.CorruptPng),
    "a palette of no colour": (of_palette(pngs.chunk(b"PLTE"), PIXELS), problems.CorruptPng),
    "pixels in two places": (split_pixels(pngs.chunk(b"tEXt", b"a\0b")), problems.CorruptPng),
    "a chunk without a name": (pngs.plain(GREY, pngs.chunk(b"a\0\xff1")), problems.CorruptPng),
    "an end that goes on": (pngs.plain()[:-12] + pngs.chunk(b"IEND", b"more"), problems.CorruptPng),
    **{
        f"a {name} of the future": (
            pngs.SIGNATURE + pngs.chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 28, 8, 0, *methods, 0)) + PIXELS + END,
            problems.CorruptPng,
        )
        for name, methods in (("compression", (1, 0)), ("filtering", (0, 1)))
    },
    "a palette after the pixels": (of_palette(PIXELS, PALETTE), problems.CorruptPng),
    "two palettes": (of_palette(PALETTE, PALETTE, PIXELS), problems.CorruptPng),
    "transparency after the pixels": (of_palette(PALETTE, PIXELS, pngs.chunk(b"tRNS", b"\0")), problems.CorruptPng),
    **{
        f"a second header, {side}x{side}": (
            pngs.SIGNATURE + pngs.header() + pngs.header(side, side, depth=depth) + PIXELS_OF[side] + END,
            problems.CorruptPng,
        )
        for side, depth in ((28, 16), (30, 8), (3000, 8))
    },
    "a second header after the pixels": (
        pngs.SIGNATURE + pngs.header() + PIXELS + pngs.header(30, 30) + END,
        problems.CorruptPng,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused(name: str) -> None:
    """Each kind of bad image raises its own problem."""
    png, expected = REFUSED[name]
    with pytest.raises(expected) as caught:
        decode(png)
    assert type(caught.value) is expected


_PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
"""First row and column of each pass of Adam7, and the steps to the next ones."""


@pytest.mark.parametrize(("colour", "channels", "colours"), [(0, 1, 1), (2, 3, 3), (4, 2, 1), (6, 4, 3)])
@pytest.mark.parametrize("interlace", [False, True])
def test_each_low_byte_of_a_colour_is_found(colour: int, channels: int, colours: int, interlace: bool) -> None:
    """A low byte other than 0 is found at each place of an image of any size, and one of the opacity is not."""
    generator = np.random.default_rng(colour)
    for side in (1, 2, 3, 5, 8, 11):
        for channel in range(channels):
            samples = np.zeros((side, side + 1, channels), ">u2")
            samples[..., colours:] = 0xFFFF
            assert not has_low_bytes(sixteen_bit(samples, colour, interlace=interlace))
            row, column = generator.integers(side), generator.integers(side + 1)
            samples[row, column, channel] ^= 1
            assert has_low_bytes(sixteen_bit(samples, colour, interlace=interlace)) is (channel < colours)


def test_each_place_of_an_interlaced_image_is_searched() -> None:
    """The only low byte of an image is found wherever it is."""
    for place in range(9 * 10):
        samples = np.zeros((9, 10, 1), ">u2")
        samples.reshape(-1)[place] = 7
        assert has_low_bytes(sixteen_bit(samples, 0, interlace=True))


def sixteen_bit(samples: np.ndarray, colour: int, *, interlace: bool) -> bytes:
    """Return a 16-bit PNG of already filtered rows, in two chunks."""
    passes = _PASSES if interlace else [(0, 0, 1, 1)]
    parts = [samples[top::down, left::right] for top, left, down, right in passes]
    content = zlib.compress(b"".join(b"\1" + row.tobytes() for part in parts if part.size for row in part))
    height, width = samples.shape[:2]
    start = pngs.SIGNATURE + pngs.header(width, height, depth=16, colour=colour, interlace=int(interlace))
    return start + pngs.chunk(b"IDAT", content[:7]) + pngs.chunk(b"IDAT", content[7:]) + END


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT", b"IEND", *(bytes([first]) + b"BCD" for first in range(65, 91))])
@pytest.mark.parametrize("crc", [0, 2**32 - 1])
def test_a_wrong_checksum_of_a_critical_chunk_is_refused(kind: bytes, crc: int) -> None:
    """A checksum that is too small or too large is found before the chunk itself is judged."""
    parts = [(b"IHDR", pngs.header()[8:-4]), (b"IDAT", pngs.rows(GREY)), (b"IEND", b"")]
    if kind not in (b"IHDR", b"IDAT", b"IEND"):
        parts.insert(1, (kind, b"content"))
    chunks = (pngs.chunk(name, content, crc=crc if name == kind else None) for name, content in parts)
    with pytest.raises(problems.CorruptPng, match="checksum"):
        decode(pngs.SIGNATURE + b"".join(chunks))


@pytest.mark.parametrize(("kind", "most"), [(b"IDAT", 64), (b"teXt", 64)])
def test_thousands_of_chunks_are_refused(kind: bytes, most: int) -> None:
    """A file may have 64 chunks, and one more for each 256 bytes: empty ones take time, and mean nothing."""
    head, pixels = pngs.SIGNATURE + pngs.header(), pngs.chunk(b"IDAT", pngs.rows(GREY))

    def file(count: int) -> bytes:
        return head + pngs.chunk(kind) * (count - 3) + pixels + END

    while most < 64 + len(file(most + 1)) // 256:
        most += 1
    assert decode(file(most)) == GREY.tobytes()
    with pytest.raises(problems.CorruptPng, match=f"more than {most} chunks"):
        decode(file(most + 1))


@pytest.mark.parametrize("content", [b"data:" + b"a" * 1019, b'"data:' + b"/" * 1018, b"data:a/" + b"b" * 1017])
def test_no_description_of_a_file_takes_long(content: bytes) -> None:
    """Hundreds of files that almost begin like a data URL are described within a fraction of a second."""
    began = time.thread_time()
    for _ in range(300):
        with pytest.raises(problems.NotAPng):
            decode(content)
    assert time.thread_time() - began < 1.5


def test_plain_pixels_in_several_chunks_need_no_reader_of_files() -> None:
    """`check` returns the compressed pixels of a plain image, wherever they were split."""
    compressed, _ = check(split_pixels(b""), lambda *_: None, "")
    assert zlib.decompress(compressed) == zlib.decompress(pngs.rows(GREY))


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize(
    ("colour", "depths"), [(0, (1, 2, 4, 8, 16)), (2, (8, 16)), (3, (1, 2, 4, 8)), (4, (8, 16)), (6, (8, 16))]
)
def test_missing_pixels_are_no_black_ones(colour: int, depths: tuple[int, ...], interlace: int) -> None:
    """Each kind of PNG is accepted with complete pixel data, and rejected if the last byte is missing."""
    for depth in depths:
        size = _size(28, 28, depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour], interlace)
        start = pngs.SIGNATURE + pngs.header(depth=depth, colour=colour, interlace=interlace)
        if colour == 3:
            start += pngs.chunk(b"PLTE", bytes(3 * 2**depth))

        def png(missing: int, start: bytes = start, size: int = size) -> bytes:
            return start + pngs.chunk(b"IDAT", zlib.compress(bytes(size - missing))) + pngs.chunk(b"IEND")

        if colour in (4, 6):  # all zeros: alpha as well
            with pytest.raises(problems.Transparent):
                decode(png(0))
            with pytest.raises(problems.BlankImage):
                decode_any(png(0), 784)
        else:
            assert decode(png(0)) == bytes(784)
            assert decode_any(png(0), 784).size == (28, 28)
        for missing in (1, size // 2, size):
            with pytest.raises(problems.CorruptPng):
                decode(png(missing))
            with pytest.raises(problems.CorruptPng):
                decode_any(png(missing), 784)


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_last_byte_is_needed_at_any_size(depth: int, interlace: int) -> None:
    """For each width and height up to 9, pixel data is complete or lacks its last byte."""
    for width, height in itertools.product(range(1, 10), repeat=2):
        content = bytes(_size(width, height, depth, interlace))
        start = pngs.SIGNATURE + pngs.header(width, height, depth, interlace=interlace)
        complete, cut = (
            start + pngs.chunk(b"IDAT", zlib.compress(data)) + pngs.chunk(b"IEND") for data in (content, content[:-1])
        )
        check(complete, lambda *_: None, "")
        with pytest.raises(problems.CorruptPng, match="fewer"):
            check(cut, lambda *_: None, "")


def _size(width: int, height: int, bits: int, interlace: int) -> int:
    # Counted pixel by pixel, by the table of passes in the PNG specification, 8.2.
    grid = ("16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777")
    rows: dict[tuple[str, int], int] = {}
    for y in range(height):
        for x in range(width):
            key = (grid[y % 8][x % 8], y) if interlace else ("0", y)
            rows[key] = rows.get(key, 0) + 1
    return sum(1 + (pixels * bits + 7) // 8 for pixels in rows.values())


def test_decoding_leaves_nothing_behind() -> None:
    """Images decoded in turn and in several threads at once do not mix, a broken one between them included."""
    rng = np.random.default_rng(0)
    wanted = [rng.integers(0, 256, (28, 28), dtype=np.uint8) for _ in range(40)]
    files = [pngs.plain(image) for image in wanted]
    broken = pngs.SIGNATURE + pngs.header() + pngs.chunk(b"IDAT", zlib.compress(b"\0" * 29 * 14)) + pngs.chunk(b"IEND")

    def decode_all(start: int) -> None:
        for round_ in range(20 * len(files)):
            place = (start + round_) % len(files)
            if round_ % 7 == 0:
                with pytest.raises(problems.CorruptPng):
                    decode(broken)
            assert decode(files[place]) == wanted[place].tobytes()

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(decode_all, start) for start in (0, 11, 23, 31)]:
            done.result()


@pytest.mark.parametrize("name", [name for name in REFUSED if "header, " in name or "header after" in name])
def test_a_second_header_is_refused_whatever_the_wanted_size(name: str) -> None:
    """`fit` also rejects a file with two headers."""
    with pytest.raises(problems.CorruptPng):
        decode_any(REFUSED[name][0], 10_000)


@pytest.mark.parametrize("depth", [2, 4, 8, 16])
def test_transparent_grey_becomes_the_other_ground(depth: int) -> None:
    """At every depth, transparent grey pixels become white if strokes are dark, and black if strokes are bright."""
    most = (1 << depth) - 1
    for stroke, level, ground in ((0, 1, 255), (most, most - 1, 0)):
        grey = np.full((30, 40), level, np.uint16)
        grey[10:20, 10:20] = stroke
        samples = grey.astype(">u2" if depth == 16 else np.uint8)
        if depth < 8:
            bits = np.unpackbits(samples[..., None], axis=2)[:, :, -depth:].reshape(30, -1)
            samples = np.packbits(bits, axis=1)
        content = pngs.chunk(b"IDAT", pngs.rows(samples))
        png = pngs.SIGNATURE + pngs.header(40, 30, depth) + clear(level) + content + END
        found = np.asarray(decode_any(png, 10_000))
        assert (found[grey == level] == ground).all()
        assert (found[grey == stroke] == 255 - ground).all()


DAMAGED = {
    "without CR and LF": (pngs.plain().translate(None, b"\r\n\0"), "--data-binary"),
    "with LF for CRLF": (pngs.plain().replace(b"\r\n", b"\n"), "as binary"),
    "with CRLF for LF": (pngs.plain().replace(b"\n", b"\r\n"), "as binary"),
    "latin-1 to UTF-8": (pngs.plain().decode("latin-1").encode(), "open(path, 'rb')"),
    "replaced as UTF-8": (pngs.plain().decode(errors="replace").encode(), "open(path, 'rb')"),
    "a data URL": (b"data:image/png;base64," + base64.b64encode(pngs.plain()), "after the comma"),
    "base64": (base64.b64encode(pngs.plain()), "base64"),
    "bytes before it": (b"\xef\xbb\xbf" + pngs.plain(), "before the PNG signature"),
    "gzip": (gzip.compress(pngs.plain()), "Content-Encoding: gzip"),
    "JSON": (b'{"image": "iVBOR"}', "not JSON"),
    "a form": (pngs.multipart(("file", "a.png", b"x"))[1], "multipart/form-data"),
    "an array": (b"\x93NUMPY\x01\x00", "/score/batch"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_that_has_a_name_gets_its_hint(name: str) -> None:
    """A PNG that was damaged on the way is rejected with a hint that names the cause."""
    content, hint = DAMAGED[name]
    for reading in (decode, lambda png: decode_any(png, 10_000)):
        with pytest.raises(problems.NotAPng) as caught:
            reading(content)
        assert hint in caught.value.hint


FORMATS = {
    **{kind: pngs.saved(Image.fromarray(GREY), format=kind) for kind in ("JPEG", "GIF", "TIFF", "BMP", "WebP", "PDF")},
    "HEIC": b"\0\0\0\x18ftypheic",
    "AVIF": b"\0\0\0\x18ftypavif",
    "SVG": b'\n<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_named(name: str) -> None:
    """The problem names the format of a file that is not PNG; with `fit`, the hint accepts any size."""
    with pytest.raises(problems.NotAPng, match=name) as caught:
        decode(FORMATS[name])
    assert "28x28" in caught.value.hint and "fit=mnist" in caught.value.hint
    with pytest.raises(problems.NotAPng, match=name) as caught:
        decode_any(FORMATS[name], 10_000)
    assert "28x28" not in caught.value.hint and "Any size" in caught.value.hint


def test_a_checksum_error_names_its_chunk() -> None:
    """The detail of a checksum error contains the name of the chunk."""
    with pytest.raises(problems.CorruptPng, match="IDAT"):
        decode(bad_checksum())


def test_low_bit_depth_is_rejected_at_any_size() -> None:
    """`decode_any` rejects 12 bits in 16, and names the number of bits."""
    with pytest.raises(problems.LowBitDepth, match="12 of 16 bits"):
        decode_any(deep(np.tile([0, 4095], (28, 14))), 784)


def test_wrong_size_says_the_size_found() -> None:
    """The problem for a wrong size contains the size of the image."""
    with pytest.raises(problems.WrongSize, match="27x28"):
        decode(pngs.plain(GREY[:, :27]))


BOMBS = {
    "pixels": pngs.chunk(b"IDAT", zlib.compress(bytes(50_000_000), 9)),
    "text": pngs.chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000), 9)),
    "profile": pngs.chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000), 9)),
}


@pytest.mark.parametrize("place", BOMBS)
def test_compression_bombs_stay_small(place: str) -> None:
    """A small chunk that inflates to 50 MB is not inflated completely: memory stays below 1 MB."""
    extra = b"" if place == "pixels" else pngs.chunk(b"IDAT", pngs.rows(GREY))
    png = pngs.SIGNATURE + pngs.header() + BOMBS[place] + extra + pngs.chunk(b"IEND")
    tracemalloc.start()
    try:
        decode(png)
    except problems.InvalidImage:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000


@given(st.data())
@settings(max_examples=300)
def test_damaged_files_never_raise_anything_else(data: st.DataObject) -> None:
    """Any change of bytes gives pixels or a 4xx problem, and no other error."""
    png = bytearray(data.draw(st.sampled_from([value[0] for value in ACCEPTED.values()])))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(png) - 1))
        png[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        assert len(decode(bytes(png))) == 784
    except problems.Problem as problem:
        assert problem.status in (400, 422)


@given(st.data())
@settings(max_examples=200)
def test_damage_behind_right_checksums_never_raises_anything_else(data: st.DataObject) -> None:
    """The same holds for random bytes inside chunks with right checksums."""
    kinds = st.sampled_from([b"IDAT", b"PLTE", b"tRNS", b"tEXt", b"iCCP", b"IHDR", b"gAMA", b"eXIf"])
    chunks = data.draw(st.lists(st.tuples(kinds, st.binary(max_size=40)), max_size=5))
    first = pngs.header(depth=data.draw(st.integers(0, 17)), colour=data.draw(st.integers(0, 7)))
    png = pngs.SIGNATURE + first + b"".join(pngs.chunk(*each) for each in chunks) + pngs.chunk(b"IEND")
    try:
        assert len(decode(png)) == 784
    except problems.Problem as problem:
        assert problem.status == 422


@pytest.mark.parametrize("scale", [1, 3, 16])
def test_pictures_have_the_size_asked_for(scale: int) -> None:
    """A picture of one plane has 28 times `scale` pixels a side and, enlarged, the same grey values."""
    picture = Image.open(io.BytesIO(encode(GREY, scale)))
    assert picture.size == (28 * scale, 28 * scale)
    assert np.array_equal(np.asarray(picture)[::scale, ::scale], GREY)


def test_error_colours_grow_lighter_with_the_error() -> None:
    """In the picture of an error map, a larger error is never darker than a smaller one."""
    ramp = np.arange(784) * 255 // 783
    colours = error_picture(ramp.astype(np.uint8).tobytes()).reshape(-1, 3).astype(int)
    lightness = colours @ [299, 587, 114]
    assert (np.diff(lightness) >= 0).all()
    assert np.array_equal(error_picture(bytes([255] * 784), 0.5), error_picture(bytes([128] * 784)))
    assert np.array_equal(error_picture(bytes([200] * 784), 40.0), error_picture(bytes([255] * 784)))


@pytest.mark.parametrize("scale", [1, 8])
def test_panel_holds_every_plane(scale: int) -> None:
    """The panel shows each plane with its own pixels, whether or not there is room for words."""
    planes = {"image": GREY, "reconstruction": 255 - GREY}
    drawn = np.asarray(Image.open(io.BytesIO(panel(planes, "normal", anomalous=False, scale=scale))))
    gap, room = 2 * scale, 3 * scale if scale >= 4 else 0
    for place, plane in enumerate(planes.values()):
        left = gap + place * (28 * scale + gap)
        found = drawn[gap + room : gap + room + 28 * scale : scale, left : left + 28 * scale : scale, 0]
        assert np.array_equal(found, plane)


@pytest.mark.parametrize("length", [0, 1, 8, 12, 14, 26])
def test_a_header_of_another_length_is_corrupt(length: int) -> None:
    """A chunk IHDR that does not have 13 bytes is rejected, with the right checksum too."""
    whole = struct.pack(">IIBBBBB", 28, 28, 8, 0, 0, 0, 0) * 2
    file = pngs.SIGNATURE + pngs.chunk(b"IHDR", whole[:length]) + pngs.chunk(b"IDAT", pngs.rows(GREY))
    for read in (decode, lambda png: decode_any(png, 10_000)):
        with pytest.raises(problems.CorruptPng, match="the first chunk is not IHDR"):
            read(file + pngs.chunk(b"IEND"))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 28), (28, 1), (27, 28), (28, 29)])
def test_the_smallest_images_have_another_size(width: int, height: int) -> None:
    """An image of one pixel, row or column gets the size that it has; `decode_any` reads it."""
    file = pngs.plain(np.full((height, width), 7, np.uint8))
    with pytest.raises(problems.WrongSize, match=f"the image is {width}x{height}"):
        decode(file)
    assert np.asarray(decode_any(file, 28 * 29)).tolist() == [[7] * width] * height


@pytest.mark.parametrize("level", [0x2000, 0x1234, 0x7F7F, 0xFF00, 0xFFFF])
def test_a_16_bit_level_is_transparent_in_both_bytes(level: int) -> None:
    """Of 16-bit samples, those of exactly the declared level are transparent, not those with the same high byte."""
    samples = np.full((28, 28), level ^ 0x0101, np.uint16)
    tail = pngs.chunk(b"IEND")
    head = pngs.SIGNATURE + pngs.header(depth=16) + pngs.chunk(b"tRNS", struct.pack(">H", level))
    opaque = decode(head + pngs.chunk(b"IDAT", pngs.rows(samples.astype(">u2"))) + tail)
    assert set(opaque) == {(level ^ 0x0101) >> 8}
    samples[3, 4] = level
    with pytest.raises(problems.Transparent):
        decode(head + pngs.chunk(b"IDAT", pngs.rows(samples.astype(">u2"))) + tail)


def test_files_of_common_writers_take_the_fast_path(zero: bytes) -> None:
    """Pillow's files and the shipped examples are read by the fast path, and damaged ones are not."""
    usual = [pngs.plain(), pngs.saved(Image.fromarray(GREY)), zero]
    for file in usual:
        assert _usual(file) == np.asarray(Image.open(io.BytesIO(file))).tobytes()
    for damaged in (usual[0][:-1], usual[0] + b"x", b"x" + usual[0], b""):
        assert _usual(damaged) == b""


@pytest.mark.parametrize("level", range(256))
def test_each_level_of_the_last_pixel_is_decoded(level: int) -> None:
    """The fast path, which looks at the last pixel, returns the right pixels or leaves the file to the other path."""
    pixels = np.full((28, 28), 255 - level, np.uint8)
    pixels[-1, -1] = level
    file = pngs.plain(pixels)
    assert _usual(file) in (b"", pixels.tobytes())
    assert decode(file) == pixels.tobytes()


@pytest.mark.parametrize("kept", [0, 1, 28, 29, 30, 27 * 29, 28 * 29 - 1])
def test_the_fast_path_misses_no_missing_row(kept: int) -> None:
    """A file whose compressed data end before the last pixel is rejected, also after a complete image."""
    rows = zlib.decompress(pngs.rows(GREY))
    cut = pngs.SIGNATURE + pngs.header() + pngs.chunk(b"IDAT", zlib.compress(rows[:kept])) + pngs.chunk(b"IEND")
    assert decode(pngs.plain(GREY)) == GREY.tobytes()
    assert _usual(cut) == b""
    with pytest.raises(problems.CorruptPng):
        decode(cut)


def test_prepared_pixels_are_marked() -> None:
    """A file of the review queue decodes to its pixels, and only such a file is recognised."""
    pixels = pngs.gradient().tobytes()
    content = encode_prepared(pixels)
    assert decode(content) == pixels
    assert is_prepared(content)
    assert not is_prepared(pngs.plain())
    assert Image.open(io.BytesIO(content)).info == dict([PREPARED])
