"""Find the connected components of the ink that are the digit. Others are specks, frames, edges, or a reason to reject.

Scope: components, boxes, borders. Independent of grey levels, file formats and models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.images.components import Components, Mask
from app.problems import AmbiguousImage

_CUT = 0.4
"""Maximum number of border pixels of a stroke that the border cuts, per half circumference of its box."""
_TORN = 0.7
"""The limit of `_CUT` for a stroke that the border cuts on two sides, which may run along a part of them."""
_CUT_EXTENT = 0.15
"""Minimum extent of a stroke that the border cuts, as a share of the longer side of the image."""
_TIGHT = 0.85
"""Minimum size of the box of a digit without a margin, as a share of both sides of the image."""
_TIGHT_CONTACT = 0.95
"""The limit of `_CUT` for a digit without a margin, whose round parts touch all four sides."""
_THINNEST = 0.05
"""Minimum stroke width of a digit that fills an image, as a share of its extent. Thinner strokes are printed lines."""
_SLENDER = 3.0
"""Minimum ratio of a digit's extent to its stroke width. A blob has a smaller ratio."""
_SOLID, _SOLID_RATIO = 0.72, 0.35
"""Minimum share of its box that a filled shape covers, and minimum ratio of the sides of the box."""
_LINE = 14.0
"""Minimum ratio of extent to width of a component that is a line, if there is another candidate."""
_LEAST_EXTENT = 0.06
"""Minimum extent of a component that is preferred to a line, as a share of the longer side of the image."""
_PART_EXTENT, _PART_GAP = 0.12, 0.25
"""Minimum extent of a part of a broken digit, and its maximum distance from the rest, in extents of the digit."""
_PART_MASS = 0.03
"""Minimum mass, as a share of the digit's, of what may be another part of a digit that the border cuts."""
_RIVAL_EXTENT, _RIVAL_MASS, _RIVAL_GAP = 0.4, 0.25, 0.15
"""Minimum extent and mass of a second digit, and the maximum distance at which it is a part of the first."""
_SHARE = 0.4
"""Minimum share of the digit in the ink, without printed lines and the border."""
_FRAME = 0.5
"""Minimum size of the box of a frame, as a share of both sides of the image."""
_FRAME_DEPTH, _FRAME_COVER = 0.1, 0.9
"""Maximum distance of a frame from each side of its box, and minimum share of the side that it follows."""
_MOST_CANDIDATES = 64
_MOST_POINTS = 600
_MOST_PAIRS = 64 * _MOST_POINTS**2
"""Number of pairs of points whose distances are computed at most, which takes a tenth of a second."""

MARGIN_HINT = "Send the whole digit, with a margin around it."
ONE_HINT = "Send one digit per image; crop the image to the digit, with a margin around it."

_TWO_SIDES = "strokes touch the border of the image on two sides"


@dataclass(frozen=True, slots=True)
class Choice:
    """The components of the digit.

    Attributes:
        chosen: bool per component.
        stroke: mean width of the strokes, in pixels.
    """

    chosen: Mask
    stroke: float


def tight(found: Components) -> Choice | None:
    """Return the digit that fills an image without a margin, or None."""
    height, width = found.labels.shape
    if not found.area.size:
        return None
    first = int(np.argmax(found.mass))
    box_width, box_height = found.right[first] - found.left[first], found.bottom[first] - found.top[first]
    if (
        found.sides()[first] < 2
        or min(_TIGHT * width, width - 3) > box_width
        or min(_TIGHT * height, height - 3) > box_height
    ):
        return None
    stroke = stroke_width(found.part(first))
    contact = _contact(found)
    if contact[first] > _TIGHT_CONTACT * (box_width + box_height) or contact.sum() > _TIGHT_CONTACT * (width + height):
        return None
    if not _THINNEST * found.extent[first] <= stroke <= found.extent[first] / _SLENDER:
        return None
    choice = Choice(_with_parts(found, first, np.ones(found.area.size, np.bool_)), stroke)
    return None if is_page(found, choice) else choice


def choose(found: Components, *, final: bool) -> Choice | None:
    """Return the components that are the digit, None where there is no candidate.

    Args:
        found: all components.
        final: reject an image with several candidates; else the best one is returned.

    Raises:
        AmbiguousImage: there is more than one candidate, or the border cuts the digit.
    """
    height, width = found.labels.shape
    score = found.mass * found.extent
    order = np.argsort(-score)[:_MOST_CANDIDATES]
    if not order.size:
        return None
    sides, contact = found.sides(), _contact(found)
    half = (found.right - found.left) + (found.bottom - found.top)
    frames = _frames(found, order)
    strokes = {int(each): stroke_width(found.part(each)) for each in order[:12]}
    slender = {each: found.extent[each] >= _SLENDER * strokes[each] for each in strokes}

    inside = (sides == 0) & ~frames
    cut, torn = np.zeros_like(inside), np.zeros_like(inside)
    for each in strokes:
        strokelike = slender[each] and found.extent[each] >= _CUT_EXTENT * max(height, width)
        cut[each] = sides[each] > 0 and strokelike and contact[each] <= _CUT * half[each]
        torn[each] = sides[each] > 1 and strokelike and contact[each] <= _TORN * half[each]
    eligible = inside | (cut & (sides == 1))
    lines = _lines(found, order)
    main = _main(found, order, eligible, lines)
    torn &= ~lines & (score >= (0.0 if main is None else 0.5 * score[main]))
    if final and torn.any():
        raise AmbiguousImage(_TWO_SIDES, MARGIN_HINT)
    if main is None:
        return None
    group = _with_parts(found, main, eligible)
    if final:
        _check_rivals(found, group, eligible & ~lines)
        _check_cut(found, main, group)
    stroke = strokes.get(main) or stroke_width(found.part(main))
    return Choice(group, stroke)


def _main(found: Components, order: NDArray[np.int64], eligible: Mask, lines: Mask) -> int | None:
    candidates = [int(each) for each in order if eligible[each]]
    least = _LEAST_EXTENT * max(found.labels.shape)
    broad = (each for each in candidates if not lines[each] and found.extent[each] >= least)
    return next(broad, candidates[0] if candidates else None)


def _lines(found: Components, order: NDArray[np.int64]) -> Mask:
    lines = np.zeros(found.area.size, np.bool_)
    for each in order:
        box = found.right[each] - found.left[each], found.bottom[each] - found.top[each]
        lines[each] = max(box) > _LINE * min(box)
    return lines


def _contact(found: Components) -> NDArray[np.int64]:
    """Return the number of border pixels of each component."""
    labels = found.labels
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.bincount(border[border >= 0], minlength=found.area.size)


def _frames(found: Components, order: NDArray[np.int64]) -> Mask:
    """Return which components are frames around something."""
    frames = np.zeros(found.area.size, np.bool_)
    height, width = found.labels.shape
    for each in order[:8]:
        left, top, right, bottom = found.left[each], found.top[each], found.right[each], found.bottom[each]
        if right - left < _FRAME * width or bottom - top < _FRAME * height:
            continue
        inside = (found.left > left) & (found.top > top) & (found.right < right) & (found.bottom < bottom)
        if not (inside & (found.extent >= 0.1 * max(height, width))).any():
            continue
        part = found.part(int(each))
        down, across = (max(2, round(_FRAME_DEPTH * length)) for length in part.shape)
        cover = min(
            part[:down].any(0).mean(),
            part[-down:].any(0).mean(),
            part[:, :across].any(1).mean(),
            part[:, -across:].any(1).mean(),
        )
        frames[each] = cover >= _FRAME_COVER
    return frames


def is_page(found: Components, choice: Choice) -> bool:
    """Return whether the chosen components are a filled shape, such as a sheet, a sticker or a dark hole."""
    left, top, right, bottom = found.box(choice.chosen)
    longer, shorter = max(right - left, bottom - top), min(right - left, bottom - top)
    filled = float(found.area[choice.chosen].sum()) / (longer * shorter)
    return shorter >= _SOLID_RATIO * longer and (filled >= _SOLID or longer < _SLENDER * choice.stroke)


def stroke_width(mask: Mask) -> float:
    """Return the mean width of strokes: twice their area per length of their outline."""
    part = np.pad(mask, 1)
    inner = part[1:-1, 1:-1] & part[:-2, 1:-1] & part[2:, 1:-1] & part[1:-1, :-2] & part[1:-1, 2:]
    area = float(part.sum())
    # The outline runs through the middle of the outermost pixels, half a pixel inside the shape on either side.
    outline = max(area - float(inner.sum()), 1.0)
    return max(1.0, 2 * area / outline)


def _with_parts(found: Components, main: int, eligible: Mask) -> Mask:
    """Return the main component and what is near it and large enough to be a part of the same digit."""
    group = np.zeros(found.area.size, np.bool_)
    group[main] = True
    size = float(found.extent[main])
    waiting = [
        int(each)
        for each in np.argsort(-found.mass)[:_MOST_CANDIDATES]
        if each != main and eligible[each] and found.extent[each] >= _PART_EXTENT * size
    ]
    points, pairs = {main: _points(found, main)}, 0
    joined = [main]
    while joined:
        other = joined.pop()
        alone = np.arange(len(group)) == other
        for each in list(waiting):
            rival = found.extent[each] >= _RIVAL_EXTENT * size and found.mass[each] >= _RIVAL_MASS * found.mass[main]
            gap = (_RIVAL_GAP if rival and not _above(found, main, each) else _PART_GAP) * size
            if _box_gap(found, alone, each) > gap:
                continue
            points.setdefault(each, _points(found, each))
            pairs += len(points[each]) * len(points[other])
            if pairs > _MOST_PAIRS:
                raise AmbiguousImage("more strokes are near each other than a digit has", ONE_HINT)
            if _distance(points[each], points[other]) <= gap:
                group[each] = True
                waiting.remove(each)
                joined.append(each)
    return group


def _above(found: Components, main: int, other: int) -> bool:
    """Return whether a component is above or below another one, like the bar of a 5, not to its left or right."""
    shared = min(found.right[main], found.right[other]) - max(found.left[main], found.left[other])
    narrower = min(found.right[main] - found.left[main], found.right[other] - found.left[other])
    return bool(shared >= 0.2 * narrower)


def _check_rivals(found: Components, group: Mask, eligible: Mask) -> None:
    size, mass = found.extent[group].max(), found.mass[group].sum()
    rival = eligible & ~group & (found.extent >= _RIVAL_EXTENT * size) & (found.mass >= _RIVAL_MASS * mass)
    if rival.any():
        raise AmbiguousImage(
            f"{1 + int(rival.sum())} groups of strokes are far apart, and each of them could be a digit", ONE_HINT
        )
    if mass < _SHARE * (mass + found.mass[eligible & ~group].sum()):
        raise AmbiguousImage("the largest group of strokes has only a small part of the ink", ONE_HINT)


def _check_cut(found: Components, main: int, group: Mask) -> None:
    """Reject a digit that touches one side of the image, if another part of it or other strokes touch another side."""
    least = _PART_MASS * found.mass[group].sum()
    large = (found.extent >= _LEAST_EXTENT * max(found.labels.shape)) & (found.mass >= least)
    touching = found.touching()
    if touching[:, main].any() and touching[:, group | large].any(1).sum() > 1:
        raise AmbiguousImage(_TWO_SIDES, MARGIN_HINT)


def _box_gap(found: Components, group: Mask, other: int) -> float:
    across = max(
        0, int(found.left[group].min() - found.right[other]), int(found.left[other] - found.right[group].max())
    )
    down = max(0, int(found.top[group].min() - found.bottom[other]), int(found.top[other] - found.bottom[group].max()))
    return float(np.hypot(across, down))


def _points(found: Components, number: int) -> NDArray[np.float32]:
    """Return some pixels of a component, spread evenly: float32 [n, 2]."""
    points = np.argwhere(found.part(number))
    step = -(-len(points) // _MOST_POINTS)
    corner = np.array([found.top[number], found.left[number]])
    spread: NDArray[np.float32] = (points[::step] + corner).astype(np.float32)
    return spread


def _distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    squares = ((one[:, None] - other[None]) ** 2).sum(2)
    return float(np.sqrt(squares.min()))
