"""From grey levels to the components that are the digit: polarity, window of the background, rejected images.

Scope: ink, components, criteria for a digit. Independent of file formats, cropping and models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from app.images import ink as inks
from app.images.components import Components, components
from app.images.digit import ONE_HINT, Choice, choose, is_page, tight
from app.problems import AmbiguousImage, BlankImage

LEAST_CONTRAST = 24
"""Minimum difference in grey levels between background and strongest stroke. An image with less is blank."""
HALO = 0.6
"""Maximum distance of fainter pixels that belong to a stroke, in stroke widths."""
_CORE = 0.35
"""Minimum contrast of the pixels of a component, as a share of the full contrast."""
_WINDOWS = (0.1, 0.35)
"""Windows of the local background, as shares of the longer side: strokes must be narrower than one of them."""
_CLEAR = 0.8
"""Minimum share of the variance between dark and bright pixels for an image with two brightnesses (Otsu's measure)."""
_COARSE_SIDE = 160
"""Longer side, in pixels, of the reduced image on which the polarity is determined."""
_MORE = 1.03
"""Minimum ratio of the ink at a wider window to the ink at a narrower window, for the wider window to be preferred."""
_NOISY, _SMOOTH_SIDE = 0.03, 160
"""Minimum noise, as a share of the full contrast, and minimum side in pixels of an image that is smoothed."""
_FAINTEST = 0.06
"""Minimum ink of a stroke, as a share of the full contrast."""
_FIRMER = 4
"""Factor of the minimum ink for a second search, if the first one finds no digit."""
_FULL, _RIM = 0.75, 0.15
"""Share of the full ink that pixels next to strokes have at a wider window, and how many of them, as a share of the
strokes, show that a narrow window sees only the rims of wide strokes."""
_OVER_NOISE = 7
"""Minimum ink of a digit, in standard deviations of the noise."""
_PEAK = 0.95
"""Quantile of the ink in the strokes of the digit that counts as full ink."""
_OTHER_POLARITY = 0.5
"""Minimum ink of the other polarity, as a share of the digit's ink, for which an image is rejected."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Digit:
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
        """Return the sum of the digit's ink."""
        return float(self.found.mass[self.choice.chosen].sum())

    @property
    def cut(self) -> bool:
        """Return whether the digit touches the border of the image."""
        return bool(self.found.sides()[self.choice.chosen].any())


@dataclass(frozen=True, slots=True)
class Search:
    """A digit and how it was found.

    Attributes:
        digit: its components.
        dark: ink is darker than its ground.
        plain: the image without printed lines.
        lines: number of printed lines.
    """

    digit: Digit
    dark: bool
    plain: Floats
    lines: int


def search(grey: Floats) -> Search:
    """Find the digit on an image.

    Raises:
        BlankImage: there is no ink.
        AmbiguousImage: the digit cannot be distinguished from other parts of the image.
    """
    digit, dark = _filling(grey)
    if digit is not None:
        return Search(digit, dark, grey, 0)
    dark = _dark_ink(grey)
    plain, lines = inks.without_lines(grey, dark=dark)
    digit = _find(plain, dark=dark)
    if is_page(digit.found, digit.choice) if digit else not lines:
        # A small sheet on a large table is a bright shape on a dark ground, until its strokes are looked for.
        dark = not dark
        plain, lines = inks.without_lines(grey, dark=dark)
        digit = _find(plain, dark=dark)
        if digit and is_page(digit.found, digit.choice):
            raise AmbiguousImage("the largest shape is filled, and has no strokes", ONE_HINT)
    if digit is None:
        _refuse(grey, lines)
    _check_other_polarity(plain, digit, dark=dark)
    return Search(digit, dark, plain, lines)


def _filling(grey: Floats) -> tuple[Digit | None, bool]:
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
    digit = Digit(0, ink, 0.0, _peak(ink, found, choice), found, choice) if choice else None
    return digit, dark


def _dark_ink(grey: Floats) -> bool:
    """Return whether the ink is darker than the background."""
    factor = max(grey.shape) // _COARSE_SIDE
    small = grey
    if factor > 1 and min(grey.shape) >= factor:
        height, width = (length // factor for length in grey.shape)
        blocks = grey[: height * factor, : width * factor].reshape(height, factor, width, factor)
        small = blocks.mean((1, 3))
    border = np.concatenate((grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]))
    middle, clarity = _otsu(grey)
    bright_border = float((border > middle).mean()) > 0.5
    # Wide strokes on a small page leave more edges than the patches of paper between them.
    if clarity >= _CLEAR and bright_border:
        return True
    dark = inks.is_dark_ink(small)
    # If the digit fills most of the image, its border has more background than ink.
    return bright_border if dark is None else dark


def _find(plain: Floats, *, dark: bool) -> Digit | None:
    """Return the digit, with the narrowest background window that is wider than its strokes."""
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
    if narrow and (wide is None or wide.mass <= _MORE * narrow.mass or (wide.cut and not narrow.cut)):
        return narrow
    if wide is None and refusal:
        raise refusal
    return wide


def _is_rim(digit: Digit, wide: Floats) -> bool:
    """Return whether a wider window finds further parts of the strokes that a narrow window does not find."""
    core = digit.found.mask(digit.choice.chosen)
    beside = inks.spread(core, max(1, round(digit.choice.stroke))) & ~core
    full = float(np.quantile(wide[core], 0.75))
    return float((beside & (wide > _FULL * full) & (digit.ink < 0.5 * digit.peak)).sum()) > _RIM * float(core.sum())


def _seen(plain: Floats, window: int, *, dark: bool) -> Digit | None:
    """Return the digit that is found with one window of the background. Its strokes are narrower than the window."""
    ink, _, noise = inks.ink_of(plain, window, dark=dark)
    if noise > _NOISY and min(ink.shape) >= _SMOOTH_SIDE:
        ink, _, noise = inks.ink_of(_smoothed(plain), window, dark=dark)
    floor = max(_FAINTEST, 5 * noise)
    light = max(float(np.quantile(plain[::3, ::3], 0.9)), 16) if dark else 255.0
    # Faint marks that cross the digit, such as the ring of a cup, are a part of it at a low threshold.
    for threshold in (floor, _FIRMER * floor):
        found = components(ink > threshold, ink)
        choice = choose(found, final=False)
        peak = _peak(ink, found, choice) if choice else 0.0
        if peak * light >= LEAST_CONTRAST and peak >= _OVER_NOISE * noise:
            break
    else:
        if choice is None:
            choose(found, final=True)
        return None
    found = components(ink > max(_CORE * peak, floor), ink)
    choice = choose(found, final=True)
    if choice is None:
        return None
    return Digit(window, ink, noise, _peak(ink, found, choice), found, choice)


def _peak(ink: Floats, found: Components, choice: Choice) -> float:
    values = ink[found.mask(choice.chosen)]
    return float(np.quantile(values, _PEAK))


def _smoothed(plane: Floats) -> Floats:
    """Return the image smoothed by the mean of 3x3 pixels."""
    padded = np.pad(plane, 1, "edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    mean: Floats = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
    return mean


def _refuse(grey: Floats, lines: int) -> NoReturn:
    if lines:
        raise AmbiguousImage("there is nothing but lines on the image", ONE_HINT)
    contrast = float(np.ptp(np.quantile(grey, (0.005, 0.995))))
    if contrast < LEAST_CONTRAST:
        raise BlankImage(f"nearly all pixels lie within {contrast:.0f} of 255 grey levels")
    raise AmbiguousImage("no strokes stand out from the background")


def _check_other_polarity(plain: Floats, digit: Digit, *, dark: bool) -> None:
    """Reject an image that has strokes of the other polarity after the digit and the lines are painted over."""
    window = max(3, round(2 * digit.choice.stroke))
    inked = inks.spread(digit.found.labels >= 0, max(1, round(HALO * digit.choice.stroke)))
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
