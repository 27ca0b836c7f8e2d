"""From grey levels to ink: which polarity, what the paper would look like without ink, which lines are printed.

Scope: brightness, backgrounds, lines. Independent of digits, file formats and models.

The background is a grey closing: the brightest level in reach of every window that contains a pixel (J. Serra, "Image
Analysis and Mathematical Morphology", 1982). Strokes narrower than the window disappear; slopes and edges stay.
Running maxima by doubling make it cost the logarithm of the window in numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Kind = TypeVar("Kind", np.float32, np.bool_)

_WINDOWS = (0.1, 0.2)
"""Windows of the test for the polarity, as shares of the longer side of the image."""
_MAX_SLOPE = 0.08
"""Maximum slope of a printed line, in pixels down per pixel across: 4.6 degrees."""
_SLOPES = 49
_LINE_WIDTH = 0.015
"""Maximum width of a printed line, as a share of the longer side of the image."""
_LEAST_SIDE = 64
"""Minimum side of an image in which lines are searched. In a smaller image, a stroke is as thin as a line."""
_ALONE, _FAMILY = 0.8, 0.35
"""Minimum length of one line, and of each of three or more parallel lines, as shares of the side of the image."""
_PAGE = 0.9
"""Quantile of the background that counts as the fully lit page."""
_DARKEST, _DIM = 0.35, 0.5
"""Background, as a share of the page's, below which ink is damped, and below which noise is not measured."""
_STRONGER = 1.35
"""Minimum factor between the darkness of a stroke that crosses a line and the darkness of the line."""
_FAINTEST = 0.045
"""Minimum darkness of a printed line, relative to its surroundings."""


def closing(plane: Floats, window: int) -> Floats:
    """Return a plane without its dark details narrower than a window of so many pixels; rounded up to odd."""
    reach = max(1, window // 2)
    return _spread(_spread(plane, reach, np.maximum), reach, np.minimum)


def opening(plane: Floats, window: int) -> Floats:
    """Return a plane without its bright details narrower than a window of so many pixels; rounded up to odd."""
    reach = max(1, window // 2)
    return _spread(_spread(plane, reach, np.minimum), reach, np.maximum)


def spread(plane: NDArray[Kind], reach: int) -> NDArray[Kind]:
    """Return a mask or plane grown by so many pixels in each direction."""
    return _spread(plane, reach, np.maximum)


def _spread(plane: NDArray[Kind], reach: int, best: Callable[..., Any]) -> NDArray[Kind]:
    """Return the largest or smallest value within a square reach; pixels outside the image are ignored."""
    for _ in range(2):
        size = plane.shape[0]
        far = min(reach, size - 1)
        padded = np.pad(plane, ((far, far), (0, 0)), "edge")
        span = 1
        while 2 * span <= 2 * far + 1:
            padded = best(padded[:-span], padded[span:])
            span *= 2
        rest = 2 * far + 1 - span
        plane = best(padded[:size], padded[rest : rest + size]).T
    return np.ascontiguousarray(plane)


def ink_of(grey: Floats, window: int, *, dark: bool) -> tuple[Floats, float, float]:
    """Return how much each pixel differs from its local background, towards ink, as a share of the full contrast.

    Dark ink absorbs a constant share of the light, and bright ink adds light to a dark ground. Areas far darker than
    the page, such as a table or a deep shadow, get a lower weight, so that their texture does not count as ink.

    Returns:
        The ink of each pixel, 0 or more; its median and its standard deviation where there is only page.
    """
    if dark:
        ground = closing(_without_salt(grey), window)
        page = float(np.quantile(ground[::4, ::4], _PAGE))
        ink = (ground - grey) / np.maximum(ground, max(_DARKEST * page, 16))
        bare = ink[::3, ::3][ground[::3, ::3] >= _DIM * page]
    else:
        ground = 255 - closing(_without_salt(255 - grey), window)
        ink = (grey - ground) / 255
        bare = ink[::3, ::3]
    level, noise = _level_and_noise(bare if bare.size else ink)
    return np.maximum(ink - level, 0), level, noise


def _without_salt(grey: Floats) -> Floats:
    """Remove single bright pixels, which a grey closing would enlarge to its window."""
    return opening(grey, 3) if min(grey.shape) >= _LEAST_SIDE else grey


def _level_and_noise(values: NDArray[Any]) -> tuple[float, float]:
    """Return the median, and the standard deviation estimated from the median absolute deviation."""
    level = np.median(values)
    return float(level), 1.4826 * float(np.median(np.abs(values - level)))


def is_dark_ink(grey: Floats) -> bool | None:
    """Return whether ink is darker than its ground: without ink a ground has few edges. None where both have few."""
    side = max(grey.shape)
    dark = bright = 0.0
    for share in _WINDOWS:
        window = max(3, round(share * side))
        dark += _edges(closing(grey, window))
        bright += _edges(opening(grey, window))
    contrast = max(float(np.ptp(grey)), 1.0)
    if abs(dark - bright) < 0.15 * contrast * side:
        return None
    return dark < bright


def _edges(plane: Floats) -> float:
    return float(np.abs(np.diff(plane, axis=0)).sum() + np.abs(np.diff(plane, axis=1)).sum())


def without_lines(grey: Floats, *, dark: bool) -> tuple[Floats, int]:
    """Return an image whose thin, long, straight, printed lines are painted over, and how many they were.

    Every pixel of a line gets the level between those on both sides of the line, so strokes that cross it stay.
    """
    if min(grey.shape) < _LEAST_SIDE:
        return grey, 0
    count = 0
    for _ in range(2):
        grey, found = _without_rows(grey, dark=dark)
        grey, count = np.ascontiguousarray(grey.T), count + found
    return grey, count


def _without_rows(grey: Floats, *, dark: bool) -> tuple[Floats, int]:
    width = grey.shape[1]
    thick = max(3, round(_LINE_WIDTH * max(grey.shape)))
    ink = _thin_rows(grey, thick, dark=dark)
    level, noise = _level_and_noise(ink[::3, ::3])
    there = ink > level + max(_FAINTEST, 2.5 * noise)
    coverage, slopes = _coverage(there)
    found: list[tuple[float, float, int]] = []
    middle = (width - 1) / 2
    best, at = coverage.max(0), coverage.argmax(0)
    for row in np.argsort(-best):
        if best[row] < _FAMILY or len(found) >= 96:
            break
        # Several slopes fit a line within a pixel; their mean follows it best.
        slope = float(slopes[coverage[:, row] >= 0.97 * best[row]].mean())
        if any(abs(row - other) <= thick for other, _, _ in found):
            continue
        reach = 1
        while reach <= thick and _beside(coverage[at[row]], int(row), reach) > 0.5 * best[row]:
            reach += 1
        if reach <= thick:
            found.append((float(row), slope, reach))
    single = [line for line in found if best[int(line[0])] >= _ALONE]
    if len(found) < 3:
        found = single
    if not found:
        return grey, 0
    columns = np.arange(width)
    strokes = closing(grey, 8 * thick) - grey if dark else grey - opening(grey, 8 * thick)
    for row, slope, reach in found:
        centre = np.rint(row + slope * (columns - middle)).astype(int)
        grey = _painted_over(grey, centre, reach + 1, there, strokes, dark=dark)
    return grey, len(found)


def _thin_rows(grey: Floats, thick: int, *, dark: bool) -> Floats:
    """Return how much darker (brighter) each pixel is than the pixels a line width above and below it."""
    plane = grey if dark else 255 - grey
    reach = (thick + 2) // 2
    padded = np.pad(plane, ((2 * reach, 2 * reach), (0, 0)), constant_values=255.0)
    high = _running(padded, 2 * reach + 1, np.maximum)
    ground = _running(high, 2 * reach + 1, np.minimum)
    return (ground - plane) / (np.maximum(ground, 16) if dark else 255.0)


def _running(plane: Floats, window: int, best: Callable[..., Any]) -> Floats:
    span, size = 1, plane.shape[0] - window + 1
    while 2 * span <= window:
        plane = best(plane[:-span], plane[span:])
        span *= 2
    rest = window - span
    result: Floats = best(plane[:size], plane[rest : rest + size])
    return result


def _coverage(there: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.float64]]:
    """Return the share of columns in which a line is visible, for each slope and middle row."""
    height, width = there.shape
    blocks = min(32, width)
    edges = np.linspace(0, width, blocks + 1).astype(int)
    near = there.copy()
    near[1:] |= there[:-1]
    near[:-1] |= there[1:]
    sums = np.add.reduceat(near.astype(np.float32), edges[:-1], axis=1)
    centres = (edges[:-1] + edges[1:] - 1) / 2 - (width - 1) / 2
    slopes = np.linspace(-_MAX_SLOPE, _MAX_SLOPE, _SLOPES)
    room = int(np.ceil(_MAX_SLOPE * width / 2)) + 1
    padded = np.pad(sums, ((room, room), (0, 0)))
    coverage = np.zeros((_SLOPES, height), np.float32)
    for number, slope in enumerate(slopes):
        for block, centre in enumerate(centres):
            shift = room + round(slope * centre)
            coverage[number] += padded[shift : shift + height, block]
    return coverage / width, slopes


def _beside(profile: Floats, row: int, reach: int) -> float:
    beside = [float(profile[at]) for at in (row - reach - 1, row + reach + 1) if 0 <= at < profile.size]
    return max(beside, default=0.0)


def _painted_over(
    grey: Floats, centre: NDArray[np.int_], reach: int, there: NDArray[np.bool_], strokes: Floats, *, dark: bool
) -> Floats:
    """Paint over the visible parts of one line, but not the darker strokes that cross it."""
    height, width = grey.shape
    columns = np.arange(width)
    above, below = centre - reach - 1, centre + reach + 1
    first = grey[np.clip(above, 0, height - 1), columns]
    last = grey[np.clip(below, 0, height - 1), columns]
    first = np.where(above < 0, last, first)
    last = np.where(below >= height, first, last)
    rows = centre + np.arange(-reach, reach + 1)[:, None]
    inside = (rows >= 0) & (rows < height)
    at = np.clip(rows, 0, height - 1), np.broadcast_to(columns, rows.shape)
    seen = (there[at] & inside).any(0)
    span = max(3, width // 12)
    visible = np.convolve(seen, np.ones(span), "same") >= 0.3 * span
    depth = (strokes[at] * inside).max(0)
    limit = _STRONGER * float(np.median(depth[seen])) if seen.any() else 0.0
    share = np.linspace(0, 1, 2 * reach + 3)[1:-1, None]
    level = first + share * (last - first)
    level = np.maximum(level, grey[at]) if dark else np.minimum(level, grey[at])
    change = inside & visible & (strokes[at] <= limit)
    grey = grey.copy()
    grey[at[0][change], at[1][change]] = level[change]
    return grey
