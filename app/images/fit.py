"""Converts a picture of one handwritten digit to 28x28 pixels in the form of MNIST: `fit=mnist`.

Scope: the order of the steps, cropping, centring. Independent of file formats, models and HTTP.

The digits of MNIST are bright on black. Their longer side has 20 pixels, and their centre of mass has a fixed position
in the 28x28 pixels. On MNIST itself, this position was measured as pixel index 14.0 in both directions, not the middle
13.5. A shift by half a pixel doubles the false-positive rate. `docs/fit.md` contains the contract and the figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.images import ink as inks
from app.images.png import SIDE
from app.images.reading import read
from app.images.search import HALO, LEAST_CONTRAST, Digit, Search, search
from app.problems import BlankImage

_BOX = 20
"""Longer side of a digit in MNIST, in pixels."""
_CENTRE = 14.0
"""Position of the centre of mass of a digit in MNIST, as a 0-based pixel index."""
_WORKING_SIDE = 640
"""Maximum longer side, in pixels; a larger image is first reduced by an integer factor. This is 32 times `_BOX`."""
_INK = 0.1
"""Share of the full contrast from which a pixel counts as stroke."""

_THIN = 0.08
"""Minimum width of strokes, as a share of the digit's extent: 1.6 pixels of MNIST. Thinner strokes are widened."""

Floats = NDArray[np.float32]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom. Right and bottom are exclusive."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """The components and lines that are not part of the digit.

    Attributes:
        components: number of connected components and printed lines.
        ink: their share of all ink, 0..1.
    """

    components: int
    ink: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """An image in the form of MNIST, and the changes that were made.

    Attributes:
        pixels: uint8 [28, 28] as bytes.
        inverted: whether the image was dark on bright, and was inverted.
        crop: box of the digit, in pixels of the image in its EXIF orientation.
        ignored: the parts that are not the digit; None if nothing was left out.
    """

    pixels: bytes
    inverted: bool
    crop: Box
    ignored: Ignored | None


def fit(content: bytes, max_pixels: int) -> Fitted:
    """Find the digit on an image, scale it to 20 pixels and centre it by mass.

    Args:
        content: a complete PNG, JPEG or WebP file, of any size, grey or in colour.
        max_pixels: maximum number of pixels. A file that declares more is rejected before it is decompressed.

    Raises:
        InvalidImage: `BlankImage`, `AmbiguousImage`, or a subclass for an error of the file format.
        EmptyBody: the content is empty.
    """
    picture = read(content, max_pixels, _WORKING_SIDE)
    image = picture.image
    factor = -(-max(image.size) // _WORKING_SIDE)
    if factor > 1:
        image = image.reduce(factor)
    grey = np.asarray(image, np.float32)
    if np.ptp(grey) < LEAST_CONTRAST:
        raise BlankImage(f"the darkest and the brightest pixel differ by {np.ptp(grey):.0f} of 255 grey levels")
    found = search(grey)
    digit = found.digit
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
    ignored = Ignored(found.lines + int(left_out.sum()), _share_left_out(found, grey))
    return Fitted(_centred(_scaled(strength, crop)), found.dark, sent, ignored)


def _strength(digit: Digit) -> tuple[Floats, Box]:
    """Return the share of ink of each pixel, 0..1, and the box of the digit."""
    choice = digit.choice
    core = digit.found.mask(choice.chosen)
    left_out = (digit.found.labels >= 0) & ~core
    near = inks.spread(core, max(1, round(HALO * choice.stroke))) & ~left_out
    floor = 3 * digit.noise if 3 * digit.noise > _INK * digit.peak else 0.0
    strength = np.where(near, np.clip((digit.ink - floor) / (digit.peak - floor), 0, 1), 0).astype(np.float32)
    missing = _THIN * float(digit.found.extent[choice.chosen].max()) - choice.stroke
    if missing > 0:
        strength = inks.spread(strength, max(1, round(missing / 2)))
    strokes = strength > _INK
    rows, columns = np.flatnonzero(strokes.any(1)), np.flatnonzero(strokes.any(0))
    return strength, (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _share_left_out(found: Search, grey: Floats) -> float:
    """Return the share of all ink that belongs to other components and printed lines."""
    lines = np.abs(found.plain - grey) / (np.maximum(found.plain, 16) if found.dark else 255.0)
    left_out = float(found.digit.found.mass[~found.digit.choice.chosen].sum()) + float(lines.sum())
    return round(left_out / (left_out + found.digit.mass), 4)


def _scaled(ink: Floats, crop: tuple[int, int, int, int]) -> Floats:
    """Return the cropped strokes with a longer side of 20 pixels; each pixel is the average of the area it covers."""
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    scale = _BOX / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    kernel = Image.Resampling.BOX if scale <= 1 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(ink).resize(size, kernel, box=crop), np.float32)


def _centred(strokes: Floats) -> bytes:
    """Place strokes in 28x28 pixels with their centre of mass at index 14.0, or as close as they fit."""
    height, width = strokes.shape
    mass = float(strokes.sum())
    row = float(strokes.sum(1) @ np.arange(height)) / mass
    column = float(strokes.sum(0) @ np.arange(width)) / mass
    top = min(max(_CENTRE - row, 0.0), SIDE - height)
    left = min(max(_CENTRE - column, 0.0), SIDE - width)
    field = np.zeros((SIDE + 1, SIDE + 1), np.float32)
    # A shift by a fraction of a pixel distributes each pixel over the four pixels that it then covers.
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
