"""From a picture of one handwritten digit to 28x28 pixels made as MNIST's were: `fit=mnist`.

Knows: the order of the steps, which components are the digit, cropping, centring. Does not know: file formats, models,
HTTP.

MNIST's digits are bright on black, scaled so that the longer side has 20 pixels, with the centre of mass at a fixed
place of the 28x28 field. The place was measured on MNIST itself: pixel index 14.0 both ways, not the middle 13.5; half
a pixel doubles the false positives. `docs/fit.md` states the contract and has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.images import ink as inks
from app.images.components import Components, components
from app.images.digit import ONE_HINT, Choice, choose, is_page, tight
from app.images.png import SIDE
from app.images.reading import read
from app.problems import AmbiguousImage, BlankImage

_BOX = 20
"""The longer side of a digit in MNIST, in pixels."""
_CENTRE = 14.0
"""Where MNIST has a digit's centre of mass, as a 0-based pixel index."""
_WORKING_SIDE = 640
"""A longer image is averaged down by a whole factor first: 32 pixels for each one that is left are plenty."""
_LEAST_CONTRAST = 24
"""Grey levels of 255 between background and the strongest stroke; less is a blank image."""
_INK = 0.1
"""Share of the full contrast from which a pixel counts as stroke."""
_CORE = 0.35
"""Share of the full contrast from which pixels are connected to components."""
_WINDOWS = (0.1, 0.35)
"""Windows of the local background, as shares of the longer side: strokes must be narrower than one of them."""
_CLEAR = 0.8
"""Share of the variance that lies between dark and bright, from which an image has two brightnesses and little else."""

_COARSE_SIDE = 160
"""Longer side, in pixels, at which polarity is decided."""
_MORE = 1.15
"""How much more ink a wider window must show to be preferred to a narrower one."""
_NOISY, _SMOOTH_SIDE = 0.03, 160
"""Noise, as a share of the full contrast, from which an image with sides of so many pixels is smoothed."""
_FAINTEST = 0.06
"""Least ink of a stroke, as a share of the full contrast."""
_FULL, _RIM = 0.75, 0.15
"""Share of the full ink that pixels next to strokes have at a wider window, and how many of them, as a share of the
strokes, show that a narrow window sees only the rims of wide strokes."""
_OVER_NOISE = 7
"""Least ink of a digit, in standard deviations of the noise."""
_PEAK = 0.95
"""Quantile of the ink in the digit's strokes that is full ink."""
_HALO = 0.6
"""Distance up to which fainter pixels belong to a stroke, in widths of the stroke."""
_THIN = 0.08
"""Width of strokes, as a share of the digit's extent, up to which thinner strokes are widened: 1.6 of MNIST's pixels."""
_OTHER_POLARITY = 0.5
"""Ink of the other polarity, as a share of the digit's, from which an image is refused."""

Floats = NDArray[np.float32]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom, right and bottom outside."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """What was left out.

    Attributes:
        components: number of connected components and printed lines.
        ink: their share of all ink, 0..1.
    """

    components: int
    ink: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """An image as MNIST would have it, and what was done to get there.

    Attributes:
        pixels: uint8 [28, 28] as bytes.
        inverted: the image was dark on bright, and was turned round.
        crop: left, top, right, bottom of the digit in the image as a viewer shows it, in pixels, right and bottom
            outside.
        ignored: what was left out.
    """

    pixels: bytes
    inverted: bool
    crop: Box
    ignored: Ignored


@dataclass(frozen=True, slots=True)
class _Digit:
    """A digit on the ink of a whole image.

    Attributes:
        window: of the local background, in pixels.
        ink: how far each pixel differs from its local background.
        noise: standard deviation of the ink where there is none.
        peak: ink in the middle of the digit's strokes.
        found: all components.
        choice: which of them are the digit.
    """

    window: int
    ink: Floats
    noise: float
    peak: float
    found: Components
    choice: Choice

    @property
    def mass(self) -> float:
        return float(self.found.mass[self.choice.chosen].sum())


def fit(content: bytes, max_pixels: int) -> Fitted:
    """Find the digit on an image, scale it to 20 pixels and centre it by mass.

    Args:
        content: the whole file, PNG, JPEG or WebP; any size, grey or not.
        max_pixels: a file that declares more is refused before it is decompressed.

    Raises:
        InvalidImage: one of its kinds says what is wrong: `BlankImage` and `AmbiguousImage` besides those of a format.
        EmptyBody: there are no bytes.
    """
    picture = read(content, max_pixels, _WORKING_SIDE)
    image = picture.image
    factor = -(-max(image.size) // _WORKING_SIDE)
    if factor > 1:
        image = image.reduce(factor)
    grey = np.asarray(image, np.float32)
    if np.ptp(grey) < _LEAST_CONTRAST:
        raise BlankImage(f"the darkest and the brightest pixel differ by {np.ptp(grey):.0f} of 255 grey levels")
    plain, lines = grey, 0
    digit, dark = _filling(grey)
    if digit is None:
        dark = _dark_ink(grey)
        plain, lines = inks.without_lines(grey, dark=dark)
        digit = _find(plain, dark=dark)
        if digit is not None and is_page(digit.found, digit.choice):
            # A small sheet on a large table is a bright shape on a dark ground, until its strokes are looked for.
            dark = not dark
            plain, lines = inks.without_lines(grey, dark=dark)
            digit = _find(plain, dark=dark)
            if digit is None or is_page(digit.found, digit.choice):
                raise AmbiguousImage("the largest shape is filled, and has no strokes", ONE_HINT)
        if digit is None:
            _refuse(grey, lines)
        _check_other_polarity(plain, digit, dark=dark)
    strength, crop = _strength(digit)
    left, top, right, bottom = crop
    across, down = picture.width / grey.shape[1], picture.height / grey.shape[0]
    sent = (
        int(left * across),
        int(top * down),
        min(-int(-right * across // 1), picture.width),
        min(-int(-bottom * down // 1), picture.height),
    )
    left_out = ~digit.choice.chosen
    ignored = Ignored(lines + int(left_out.sum()), _share_left_out(plain, grey, digit, dark=dark))
    return Fitted(_centred(_scaled(strength, crop)), dark, sent, ignored)


def _filling(grey: Floats) -> tuple[_Digit | None, bool]:
    """Return the digit that fills an image of two brightnesses without a margin, and whether it is dark."""
    middle, clarity = _otsu(grey)
    border = np.concatenate((grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]))
    bright = border > middle
    dark = bool(bright.mean() > 0.5)
    if clarity < _CLEAR:
        return None, dark
    ground = float(np.median(border[bright == dark]))
    ink = np.maximum(ground - grey if dark else grey - ground, 0)
    ink /= max(float(ink.max()), 1.0)
    found = components(ink > _CORE, ink)
    choice = tight(found)
    return choice and _Digit(0, ink, 0.0, _peak(ink, found, choice), found, choice), dark


def _dark_ink(grey: Floats) -> bool:
    """Return whether ink is darker than its ground."""
    small = grey
    if max(grey.shape) > 2 * _COARSE_SIDE:
        small = np.asarray(Image.fromarray(grey).reduce(max(grey.shape) // _COARSE_SIDE), np.float32)
    dark = inks.is_dark_ink(small)
    if dark is not None:
        return dark
    # The digit fills most of the image. Its border has more background than ink.
    border = np.concatenate((grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]))
    middle, _ = _otsu(grey)
    return float((border > middle).mean()) > 0.5


def _find(plain: Floats, *, dark: bool) -> _Digit | None:
    """Return the digit at the narrowest window of the background that is wider than its strokes."""
    windows = [max(3, round(share * max(plain.shape))) for share in _WINDOWS]
    refusal: AmbiguousImage | None = None
    wide = narrow = None
    try:
        wide = _seen(plain, windows[1], dark=dark)
    except AmbiguousImage as error:
        refusal = error
    try:
        narrow = _seen(plain, windows[0], dark=dark)
    except AmbiguousImage as error:
        refusal = refusal or error
    if narrow and _is_rim(narrow, inks.ink_of(plain, windows[1], dark=dark)[0]):
        narrow = None
    if narrow and (wide is None or wide.mass <= _MORE * narrow.mass):
        return narrow
    if wide is None and refusal:
        raise refusal
    return wide


def _is_rim(digit: _Digit, wide: Floats) -> bool:
    """Return whether strokes go on, at a wider window, where a narrow window shows nothing."""
    core = digit.found.mask(digit.choice.chosen)
    beside = inks.spread(core, max(1, round(digit.choice.stroke))) & ~core
    full = float(np.quantile(wide[core], 0.75))
    return float((beside & (wide > _FULL * full) & (digit.ink < 0.5 * digit.peak)).sum()) > _RIM * float(core.sum())


def _seen(plain: Floats, window: int, *, dark: bool) -> _Digit | None:
    """Return the digit among the strokes that are narrower than a window."""
    ink, _, noise = inks.ink_of(plain, window, dark=dark)
    if noise > _NOISY and min(ink.shape) >= _SMOOTH_SIDE:
        ink, _, noise = inks.ink_of(_smoothed(plain), window, dark=dark)
    floor = max(_FAINTEST, 5 * noise)
    found = components(ink > floor, ink)
    choice = choose(found, final=False)
    if choice is None:
        return None
    peak = _peak(ink, found, choice)
    contrast = peak * (max(float(np.quantile(plain[::3, ::3], 0.9)), 16) if dark else 255)
    if contrast < _LEAST_CONTRAST or peak < _OVER_NOISE * noise:
        return None
    found = components(ink > max(_CORE * peak, floor), ink)
    choice = choose(found, final=True)
    if choice is None:
        return None
    return _Digit(window, ink, noise, _peak(ink, found, choice), found, choice)


def _peak(ink: Floats, found: Components, choice: Choice) -> float:
    values = ink[found.mask(choice.chosen)]
    return float(np.quantile(values, _PEAK))


def _smoothed(plane: Floats) -> Floats:
    """Return the mean of each 3x3 pixels."""
    padded = np.pad(plane, 1, "edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def _refuse(grey: Floats, lines: int) -> NoReturn:
    if lines:
        raise AmbiguousImage("there is nothing but lines on the image", ONE_HINT)
    contrast = float(np.ptp(np.quantile(grey, (0.005, 0.995))))
    if contrast < _LEAST_CONTRAST:
        raise BlankImage(f"nearly all pixels lie within {contrast:.0f} of 255 grey levels")
    raise AmbiguousImage("no strokes stand out from the background")


def _check_other_polarity(plain: Floats, digit: _Digit, *, dark: bool) -> None:
    """Refuse an image that has strokes of the other polarity where all that was found is painted over."""
    window = max(3, round(2 * digit.choice.stroke))
    inked = inks.spread(digit.found.labels >= 0, max(1, round(_HALO * digit.choice.stroke)))
    wide = max(3, round(_WINDOWS[-1] * max(plain.shape)))
    ground = inks.closing(plain, wide) if dark else inks.opening(plain, wide)
    clean, page = np.where(inked, ground, plain), max(float(np.median(ground)), 16.0)
    if dark:
        other = (clean - inks.opening(clean, window)) / page
        beyond = (clean - page) / page
    else:
        other = (inks.closing(clean, window) - clean) / 255
        beyond = (page - clean) / 255
    strokes = ~inked & (np.minimum(other, 2 * beyond) > 0.5 * digit.peak)
    if float(other[strokes].sum()) > _OTHER_POLARITY * digit.mass:
        raise AmbiguousImage("some strokes are darker than the background, and some are brighter")


def _strength(digit: _Digit) -> tuple[Floats, Box]:
    """Return how much stroke each pixel is, 0..1, and the box around the digit."""
    choice = digit.choice
    core = digit.found.mask(choice.chosen)
    left_out = (digit.found.labels >= 0) & ~core
    near = inks.spread(core, max(1, round(_HALO * choice.stroke))) & ~left_out
    floor = 3 * digit.noise if 3 * digit.noise > _INK * digit.peak else 0.0
    strength = np.where(near, np.clip((digit.ink - floor) / (digit.peak - floor), 0, 1), 0).astype(np.float32)
    missing = _THIN * float(digit.found.extent[choice.chosen].max()) - choice.stroke
    if missing > 0:
        strength = inks.spread(strength, max(1, round(missing / 2)))
    strokes = strength > _INK
    rows, columns = np.flatnonzero(strokes.any(1)), np.flatnonzero(strokes.any(0))
    return strength, (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _share_left_out(plain: Floats, grey: Floats, digit: _Digit, *, dark: bool) -> float:
    lines = float(np.abs(plain - grey).sum() if not dark else (np.abs(plain - grey) / np.maximum(plain, 16)).sum())
    lines = lines if dark else lines / 255
    left_out = float(digit.found.mass[~digit.choice.chosen].sum()) + lines
    return round(left_out / (left_out + digit.mass), 4)


def _otsu(grey: Floats) -> tuple[float, float]:
    """Return the level that best divides dark from bright, and the share of the variance that the division explains.

    N. Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    counts = np.bincount(grey.astype(np.uint8).ravel(), minlength=256).astype(float)
    levels = np.arange(256)
    dark, total = np.cumsum(counts), counts.sum()
    sums, mean = np.cumsum(counts * levels), float(counts @ levels) / total
    apart = (mean * dark - sums) ** 2 / np.maximum(dark * (total - dark), 1.0)
    best = int(np.argmax(apart))
    return float(levels[best]), float(total * apart[best] / max(counts @ (levels - mean) ** 2, 1.0))


def _scaled(ink: Floats, crop: tuple[int, int, int, int]) -> Floats:
    """Return the cropped strokes with the longer side at 20 pixels, each pixel the average of what it covers."""
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    scale = _BOX / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    kernel = Image.Resampling.BOX if scale <= 1 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(ink).resize(size, kernel, box=crop), np.float32)


def _centred(strokes: Floats) -> bytes:
    """Place strokes in the 28x28 field with their centre of mass at index 14.0, as far as they stay inside it."""
    height, width = strokes.shape
    mass = float(strokes.sum())
    row = float(strokes.sum(1) @ np.arange(height)) / mass
    column = float(strokes.sum(0) @ np.arange(width)) / mass
    top = min(max(_CENTRE - row, 0.0), SIDE - height)
    left = min(max(_CENTRE - column, 0.0), SIDE - width)
    field = np.zeros((SIDE + 1, SIDE + 1), np.float32)
    # A shift by a fraction of a pixel: each pixel is shared out among the four that it then covers.
    down, right = top - int(top), left - int(left)
    for rows, columns, share in (
        (0, 0, (1 - down) * (1 - right)),
        (0, 1, (1 - down) * right),
        (1, 0, down * (1 - right)),
        (1, 1, down * right),
    ):
        y, x = int(top) + rows, int(left) + columns
        field[y : y + height, x : x + width] += share * strokes
    return np.rint(np.clip(field[:SIDE, :SIDE], 0, 1) * 255).astype(np.uint8).tobytes()
