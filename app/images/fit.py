"""From an image of any size to 28x28 pixels made as MNIST's were: `fit=mnist`.

Knows: polarity, background, cropping, centring. Does not know: PNG chunks, models, HTTP.

MNIST's digits are bright on black, scaled so that the longer side has 20 pixels, with the centre of mass at a fixed
place of the 28x28 field. The place was measured on MNIST itself: pixel index 14.0 both ways, not the middle 13.5; half
a pixel doubles the false alarms. `docs/fit.md` has the table of how well the verdicts agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.images.png import SIDE, decode_any
from app.problems import AmbiguousImage, BlankImage

_BOX = 20
"""The longer side of a digit in MNIST, in pixels."""
_CENTRE = 14.0
"""Where MNIST has a digit's centre of mass, as a 0-based pixel index."""
_WORKING_SIDE = 1024
"""A longer image is averaged down by a whole factor first: 50 pixels for each one that is left are plenty."""
_LEAST_CONTRAST = 24
"""Grey levels of 255 between background and the strongest stroke; less is a blank image."""
_INK = 0.1
"""Share of the full contrast from which a pixel counts as stroke."""
_MOST_UNEVEN = 0.25
"""Share of the full contrast by which the border may differ from its own median; more is no plain background."""
_CLEAR = 0.8
"""Share of the variance that lies between dark and bright, from which an image has two brightnesses and little else."""
_NINE_TENTHS = 2.44
"""The 90 % point of a normal distribution's absolute deviations, in units of their median."""
_MIDDLE = 0.15
"""A background this near to the middle of all grey levels, as a share of their range, is neither dark nor bright."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Fitted:
    """An image as MNIST would have it, and what was done to get there.

    Attributes:
        pixels: uint8 [28, 28] as bytes.
        inverted: the image was dark on bright, and was turned round.
        crop: left, top, right, bottom of the strokes in the image that was sent, in pixels, right and bottom outside.
    """

    pixels: bytes
    inverted: bool
    crop: tuple[int, int, int, int]


def fit(png: bytes, max_pixels: int) -> Fitted:
    """Crop an image to its strokes, scale these to 20 pixels and centre them by mass.

    Args:
        png: the whole file; any size, grey or not.
        max_pixels: a file that declares more is refused before it is inflated.

    Raises:
        InvalidImage: one of its kinds says what is wrong: `BlankImage` and `AmbiguousImage` besides those of a PNG.
        EmptyBody: there are no bytes.
    """
    image = decode_any(png, max_pixels)
    width, height = image.size
    factor = -(-max(width, height) // _WORKING_SIDE)
    if factor > 1:
        image = image.reduce(factor)
    ink, inverted = _ink(np.asarray(image, np.float32))
    left, top, right, bottom = crop = _crop(ink)
    sent = left * factor, top * factor, min(right * factor, width), min(bottom * factor, height)
    return Fitted(_centred(_scaled(ink, crop)), inverted, sent)


def _ink(grey: Floats) -> tuple[Floats, bool]:
    """Return how much stroke each pixel is, 0..1, and whether strokes are darker than the background."""
    plain = _background(grey)
    background = float(np.median(plain))
    low, high = float(grey.min()), float(grey.max())
    contrast = max(high - background, background - low)
    if contrast < _LEAST_CONTRAST:
        raise BlankImage(f"no pixel differs from the background by more than {contrast:.0f} of 255 grey levels")
    if abs(background - (low + high) / 2) < _MIDDLE * (high - low):
        raise AmbiguousImage("some of the image is clearly darker than its border, and some clearly brighter")
    inverted = background > (low + high) / 2
    ink = (background - grey if inverted else grey - background) / contrast
    # Paper that was photographed is never of one grey: what the border varies by is not stroke anywhere else.
    # Nine tenths of noise lie within this many median deviations, and blurred edges of strokes do not enter a median.
    uneven = _NINE_TENTHS * float(np.median(np.abs(background - plain))) / contrast
    if uneven > _MOST_UNEVEN:
        raise AmbiguousImage("the border of the image is not of one brightness, so there is no plain background")
    floor = 3 * uneven if uneven > _INK / 3 else 0.0
    return np.clip((ink - floor) / (1 - floor), 0, 1).astype(np.float32), inverted


def _background(grey: Floats) -> Floats:
    """Return the grey levels of the border, without the strokes that touch it where an image is cropped to its digit.

    Strokes are left out only where all of the image is clearly dark or bright; what prevails at the border is then
    background.
    """
    border = np.concatenate((grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]))
    middle, clarity = _otsu(grey)
    if clarity < _CLEAR:
        return border
    bright = border > middle
    background: Floats = border[bright == (bright.mean() > 0.5)]
    return background


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


def _crop(ink: Floats) -> tuple[int, int, int, int]:
    strokes = ink > _INK
    rows, columns = np.flatnonzero(strokes.any(1)), np.flatnonzero(strokes.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


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
