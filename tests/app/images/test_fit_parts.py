"""The parts of `fit`, each alone: placing, the crop of a reduced image, digits without a margin, the page's noise."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from app.images import digit
from app.images.components import components
from app.images.digit import Choice, _check_rivals, _frames, _with_parts, tight
from app.images.fit import _centred, _strength
from app.images.ink import _beside, _coverage, _thin_rows, _without_salt, ink_of, opening, without_lines
from app.images.search import Digit
from app.problems import AmbiguousImage, InvalidImage
from tests.app.images.test_fit import fitted


@pytest.mark.parametrize("step", [3, 4, 5, 7])
def test_many_nested_strokes_take_bounded_time(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of strokes is compared once per search, and a search with too many pairs ends."""
    pairs, distance = 0, digit._distance

    def counted(one: np.ndarray, other: np.ndarray) -> float:
        nonlocal pairs
        pairs += len(one) * len(other)
        return distance(one, other)

    monkeypatch.setattr(digit, "_distance", counted)
    rings = np.zeros((640, 640), np.uint8)
    for place in range(30, 310, step):
        rings[place, place : 640 - place] = rings[place : 640 - place, place] = 255
        rings[639 - place, place : 640 - place] = rings[place : 640 - place, 639 - place] = 255
    with contextlib.suppress(InvalidImage):
        fitted(Image.fromarray(rings))
    assert 0 < pairs <= 6 * digit._MOST_PAIRS


@pytest.mark.parametrize("edge", ["left", "right", "top", "bottom"])
def test_strokes_with_their_mass_at_an_edge_are_not_cut_off(edge: str) -> None:
    """Strokes of 20 pixels stay inside of the 28 pixels, although their centre of mass cannot be in the middle."""
    strokes = np.zeros((20, 20), np.float32)
    strokes[:, 0], strokes[5, :] = 1, 0.25
    turned = np.rot90(strokes, {"left": 0, "bottom": 1, "right": 2, "top": 3}[edge])
    placed = np.frombuffer(_centred(np.ascontiguousarray(turned)), np.uint8).reshape(28, 28)
    assert placed.sum() == pytest.approx(255 * strokes.sum(), rel=0.01)
    rows, columns = np.flatnonzero(placed.any(1)), np.flatnonzero(placed.any(0))
    assert {rows[-1] - rows[0], columns[-1] - columns[0]} <= {19, 20}
    assert {"left": columns[-1], "right": 27 - columns[0], "top": rows[-1], "bottom": 27 - rows[0]}[edge] == 27


@pytest.mark.parametrize("side", [500, 700, 1400, 2000])
def test_the_crop_is_in_pixels_of_the_image_that_was_sent(side: int) -> None:
    """The crop of an image that was reduced is the box of the strokes, within two pixels of the reduced image."""
    image = Image.new("L", (side, side * 3 // 4), 0)
    box = (side // 4, side // 8, side // 2, side // 2)
    ImageDraw.Draw(image).ellipse(box, outline=255, width=side // 20)
    _, found = fitted(image)
    assert np.abs(np.subtract(found.crop, box)).max() <= 2 * max(1, -(-side // 640)) + 1


@pytest.mark.parametrize(("side", "margin", "taken"), [(10, 3, True), (10, 4, False), (16, 3, True), (40, 6, True)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_digit_without_a_margin_may_leave_three_pixels(side: int, margin: int, taken: bool, axis: int) -> None:
    """The box of such a digit has 85 % of both sides of the image; in a small image it leaves three pixels at most."""
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).ellipse((0, 0, side - margin - 1, side - 1), outline=255, width=max(2, side // 6))
    mask = np.asarray(image) > 0
    found = tight(components(mask if axis else mask.T, np.ones(mask.shape, np.float32)))
    assert (found is not None) is taken


@pytest.mark.parametrize("shape", [(63, 80), (64, 80), (80, 64), (65, 65), (80, 63)])
def test_bright_pixels_are_removed_from_large_images_only(shape: tuple[int, int]) -> None:
    """Below 64 pixels a stroke may be as thin as a bright pixel, so nothing is removed."""
    grey = np.zeros(shape, np.float32)
    grey[20, 30] = 255
    assert _without_salt(grey).max() == (255 if min(shape) < 64 else 0)


@pytest.mark.parametrize("window", [3, 5, 21])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (4, 7), (30, 8)])
def test_a_window_may_be_larger_than_the_image(window: int, shape: tuple[int, int]) -> None:
    """An opening is the largest of the smallest values in reach, also if the window exceeds the image."""
    plane = np.random.default_rng(0).random(shape).astype(np.float32)
    reach = max(1, window // 2)

    def spread(values: np.ndarray, best: np.ufunc) -> np.ndarray:
        found = np.empty_like(values)
        for row, column in np.ndindex(values.shape):
            near = values[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
            found[row, column] = best.reduce(near, None)
        return found

    assert (opening(plane, window) == spread(spread(plane, np.minimum), np.maximum)).all()


def test_the_noise_is_that_of_the_page() -> None:
    """The texture of a dark table next to a page does not count as noise of the page."""
    generator = np.random.default_rng(0)
    page = 200 + generator.normal(0, 1, (200, 200))
    table = 40 + generator.normal(0, 12, (200, 120))
    _, _, alone = ink_of(page.astype(np.float32), 41, dark=True)
    _, _, both = ink_of(np.concatenate([page, table], 1).astype(np.float32), 41, dark=True)
    assert both < 1.5 * alone


@pytest.mark.parametrize(("distance", "joined"), [(2, True), (7, True), (10, True), (11, False), (20, False)])
@pytest.mark.parametrize("turns", range(4))
def test_parts_within_a_quarter_of_the_extent_belong_to_a_digit(distance: int, joined: bool, turns: int) -> None:
    """So do parts that are near such a part, in any direction; none is joined that is farther away."""
    mask = np.zeros((60, 80), bool)
    mask[10:50, 5:15] = True
    mask[20:28, 14 + distance : 18 + distance] = True
    mask[20:28, 17 + 2 * distance : 21 + 2 * distance] = True
    found = components(np.rot90(mask, turns), np.ones((60, 80), np.float32) if turns % 2 == 0 else np.ones((80, 60)))
    main = int(np.argmax(found.mass))
    assert found.area.size == 3
    assert _with_parts(found, main, np.ones(3, bool)).sum() == (3 if joined else 1)


def test_a_frame_surrounds_something_large_enough() -> None:
    """A frame has a part inside with a tenth of the longer side of the image; a ring of ink alone is a digit."""
    for inner, expected in ((0, False), (5, False), (30, True)):
        mask = np.zeros((100, 100), bool)
        mask[10:90, 10:90] = True
        mask[14:86, 14:86] = False
        mask[40 : 40 + inner, 48:52] = inner > 0
        found = components(mask, np.ones(mask.shape, np.float32))
        largest = int(np.argmax(found.mass))
        assert bool(_frames(found, np.argsort(-found.mass))[largest]) is expected, inner


@pytest.mark.parametrize("turns", range(4))
def test_a_frame_has_half_of_both_sides(turns: int) -> None:
    """A ring that is narrower is no frame, wherever in the image it is."""
    for wide, expected in ((40, False), (60, True)):
        mask = np.zeros((100, 100), bool)
        mask[10:90, 95 - wide : 95] = True
        mask[14:86, 99 - wide : 91] = False
        mask[30:70, 80:84] = True
        found = components(np.rot90(mask, turns), np.ones(mask.shape, np.float32))
        largest = int(np.argmax(found.mass))
        assert bool(_frames(found, np.argsort(-found.mass))[largest]) is expected, wide


@pytest.mark.parametrize("turns", range(4))
def test_a_frame_follows_all_four_sides(turns: int) -> None:
    """A shape with a bar in the middle that is open on one side is no frame, whichever side it is."""
    for open_rows, expected in ((0, True), (4, False)):
        mask = np.zeros((100, 100), bool)
        mask[10:90, 10:90] = True
        mask[14 : 86 + open_rows, 14:86] = False
        mask[56:60] = mask[12]
        mask[20:50, 48:52] = True
        found = components(np.rot90(mask, turns), np.ones(mask.shape, np.float32))
        frame = int(np.argmax(found.extent))
        assert bool(_frames(found, np.argsort(-found.mass))[frame]) is expected, open_rows


@pytest.mark.parametrize(("others", "taken"), [(14, True), (16, False)])
def test_a_digit_has_two_fifths_of_the_ink(others: int, taken: bool) -> None:
    """The rest of the ink, in parts that are too small to be digits, is at most one and a half times the digit's."""
    mask = np.zeros((100, 100), bool)
    mask[5:45, 10:20] = True
    for each in range(others):
        mask[60 + 8 * (each % 4) : 65 + 8 * (each % 4), 10 + 10 * (each // 4) : 18 + 10 * (each // 4)] = True
    found = components(mask, np.ones(mask.shape, np.float32))
    group = np.arange(found.area.size) == np.argmax(found.mass)
    assert found.mass[~group].sum() == others / 10 * found.mass[group].sum()
    with contextlib.nullcontext() if taken else pytest.raises(AmbiguousImage, match="small part of the ink"):
        _check_rivals(found, group, np.ones(found.area.size, bool))


def test_the_compared_pairs_of_points_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search compares as many pairs as the limit, and no more."""
    mask = np.zeros((60, 60), bool)
    mask[10:50, 10:20] = mask[20:40, 22:28] = True
    found = components(mask, np.ones(mask.shape, np.float32))
    main = int(np.argmax(found.mass))
    pairs = len(digit._points(found, 0)) * len(digit._points(found, 1))
    monkeypatch.setattr(digit, "_MOST_PAIRS", pairs)
    assert _with_parts(found, main, np.ones(2, bool)).all()
    monkeypatch.setattr(digit, "_MOST_PAIRS", pairs - 1)
    with pytest.raises(AmbiguousImage, match="more strokes"):
        _with_parts(found, main, np.ones(2, bool))


@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize(("thick", "widest"), [(3, 4), (4, 6), (10, 12)])
def test_a_thin_row_has_ground_within_a_line_width(thick: int, widest: int, dark: bool) -> None:
    """Rows of ink are thin up to twice the distance to the ground, rounded down."""
    for rows in (1, widest, widest + 1):
        grey = np.full((60, 70), 200 if dark else 55, np.float32)
        grey[20 : 20 + rows] = 100 if dark else 155
        assert (_thin_rows(grey, thick, dark=dark)[20 : 20 + rows] > 0).all() == (rows <= widest), rows


@pytest.mark.parametrize("slope", [-0.07, -0.03, 0.0, 0.03, 0.07])
def test_the_slope_of_a_line_is_found(slope: float) -> None:
    """The coverage of a complete line is 1 at its slope and at its row in the middle of the image."""
    there = np.zeros((120, 201), bool)
    columns = np.arange(201)
    there[np.rint(60 + slope * (columns - 100)).astype(int), columns] = True
    coverage, slopes = _coverage(there)
    best = slopes[coverage[:, 60] >= 0.97 * coverage[:, 60].max()]
    assert coverage[:, 60].max() == 1
    assert abs(best.mean() - slope) < 0.005


@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize(("contrast", "found"), [(0.03, 0), (0.06, 1)])
def test_a_faint_row_is_no_line(contrast: float, found: int, dark: bool) -> None:
    """A printed line is darker than its surroundings by 4.5 % at least."""
    grey = np.full((100, 120), 200 if dark else 0, np.float32)
    grey[50] = 200 * (1 - contrast) if dark else 255 * contrast
    painted, lines = without_lines(grey, dark=dark)
    assert lines == found
    assert (painted == grey).all() == (found == 0)


def test_rows_beside_a_line_are_those_next_to_its_reach() -> None:
    """The larger value of the two rows counts, and only rows that exist."""
    profile = np.arange(20, dtype=np.float32)
    assert _beside(profile, 10, 2) == 13
    assert _beside(profile[::-1], 10, 2) == 12
    assert _beside(profile, 18, 2) == 15
    assert _beside(profile[::-1], 1, 2) == 15
    assert _beside(profile[:3], 1, 2) == 0


@pytest.mark.parametrize(("noise", "kept"), [(0.0, True), (0.02, True), (0.035, False), (0.1, False)])
def test_ink_within_the_noise_is_not_part_of_strokes(noise: float, kept: bool) -> None:
    """If three deviations of the noise exceed a tenth of the contrast, ink below them is removed."""
    ink = np.zeros((40, 40), np.float32)
    ink[10:30, 10:20], ink[10:30, 16:20] = 0.9, 0.1
    found = components(ink > 0.05, ink)
    digit = Digit(21, ink, noise, 0.9, found, Choice(np.ones(1, bool), 6.0))
    strength, box = _strength(digit)
    assert bool(strength[20, 18] > 0) is kept
    assert box == ((10, 10, 20, 30) if kept else (10, 10, 16, 30))
