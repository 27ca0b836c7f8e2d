"""Draw real digits as ink on paper, like photographs, scans and screenshots: the scenes of docs/fit.md.

Every scene is a function of one digit, uint8 [28, 28], and a random generator, and returns a file's bytes. The same
digit and the same seed give the same bytes, as far as the libraries that encode them do.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.ndimage import distance_transform_edt

Floats = NDArray[np.float64]
Digit = NDArray[np.uint8]
Scene = Callable[[Digit, np.random.Generator], bytes]
Effect = Callable[[Floats, np.random.Generator], Floats]

ORIENTATION = 0x0112
PAPER, INK = 0.92, 0.12
"""Share of the light that paper and ink reflect."""


def enlarged(digit: Digit, side: int) -> Floats:
    """Return how much ink each pixel has, 0..1, for a digit whose field of 28 pixels is drawn `side` pixels wide."""
    return np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC), float) / 255


def drawn_with(digit: Digit, side: int, pen: float) -> Floats:
    """Return the ink of the same digit drawn along its centre line with a pen of so many pixels."""
    line = thinned(enlarged(digit, 280) > 0.45)
    distance = Image.fromarray(distance_transform_edt(~line).astype(np.float32))
    distance = np.asarray(distance.resize((side, side), Image.Resampling.BILINEAR), float) * side / 280
    return np.clip(pen / 2 - distance + 0.5, 0, 1)


def thinned(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the centre line of a shape (T. Zhang, C. Suen, "A fast parallel algorithm for thinning", 1984)."""
    mask = np.pad(mask, 1)
    changed = True
    while changed:
        changed = False
        for first in (True, False):
            around = [
                np.roll(mask, shift, (0, 1))
                for shift in ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))
            ]
            count = sum(each.astype(int) for each in around)
            rises = sum((~a & b).astype(int) for a, b in zip(around, around[1:] + around[:1], strict=True))
            north, east, south, west = around[0], around[2], around[4], around[6]
            gaps = (
                ~(north & east & south) & ~(east & south & west)
                if first
                else ~(north & east & west) & ~(north & south & west)
            )
            goes = mask & (count >= 2) & (count <= 6) & (rises == 1) & gaps
            changed |= bool(goes.any())
            mask = mask & ~goes
    return mask[1:-1, 1:-1]


def placed(ink: Floats, shape: tuple[int, int], rng: np.random.Generator, margin: float = 0.02) -> Floats:
    """Return ink on an empty sheet, the field of the digit anywhere within a margin."""
    sheet = np.zeros(shape)
    spare = [int(margin * length) for length in shape]
    top, left = (
        int(rng.integers(room, max(room + 1, length - side - room + 1)))
        for room, length, side in zip(spare, shape, ink.shape, strict=True)
    )
    sheet[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return sheet


def sheet_of(digit: Digit, rng: np.random.Generator) -> Floats:
    """Return the ink of a digit on a sheet of 320 to 480 pixels, its field 140 to 300 pixels wide."""
    shape = int(rng.integers(320, 480)), int(rng.integers(320, 480))
    return placed(enlarged(digit, int(rng.integers(140, 300))), shape, rng)


def inked(ink: Floats, paper: float | Floats = PAPER, colour: float = INK) -> Floats:
    """Return the light that a sheet reflects, 0..1."""
    return paper * (1 - ink) + colour * ink


def pixels_of(light: Floats) -> NDArray[np.uint8]:
    """Return light, 0..1, as grey levels."""
    return np.clip(np.rint(light * 255), 0, 255).astype(np.uint8)


def png(image: Image.Image | NDArray[np.uint8], **more: object) -> bytes:
    """Return an image as a PNG."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG", compress_level=1, **more)
    return buffer.getvalue()


def photo(image: Image.Image | NDArray[np.uint8], quality: int = 75, kind: str = "JPEG", **more: object) -> bytes:
    """Return an image as a JPEG or WebP."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, quality=quality, **more)
    return buffer.getvalue()


def _scene(*effects: Effect) -> Scene:
    """Return the scene of a plain sheet with some effects on the light that it reflects."""

    def scene(digit: Digit, rng: np.random.Generator) -> bytes:
        light = inked(sheet_of(digit, rng))
        for effect in effects:
            light = effect(light, rng)
        return png(pixels_of(light))

    return scene


def grain(sigma: float) -> Effect:
    """Return the effect of a camera's noise, in shares of the full range."""
    return lambda light, rng: light + rng.normal(0, sigma, light.shape)


def gradient(loss: float) -> Effect:
    """Return the effect of light that falls off by a share from one side to the other, in any direction."""

    def effect(light: Floats, rng: np.random.Generator) -> Floats:
        angle = rng.uniform(0, 2 * np.pi)
        rows, columns = np.mgrid[0 : 1 : light.shape[0] * 1j, 0 : 1 : light.shape[1] * 1j]
        along = rows * np.sin(angle) + columns * np.cos(angle)
        along = (along - along.min()) / np.ptp(along)
        return light * (1 - loss * along)

    return effect


def vignette(light: Floats, rng: np.random.Generator) -> Floats:
    """Darken the corners, as lenses do."""
    rows, columns = np.mgrid[-1 : 1 : light.shape[0] * 1j, -1 : 1 : light.shape[1] * 1j]
    return light * (1 - rng.uniform(0.15, 0.3) * (rows**2 + columns**2) / 2)


def shadow(softness: float, depth: tuple[float, float] = (0.25, 0.5)) -> Effect:
    """Return the effect of a shadow over a part of the sheet, its edge as soft as a share of the side."""

    def effect(light: Floats, rng: np.random.Generator) -> Floats:
        height, width = light.shape
        angle = rng.uniform(0, 2 * np.pi)
        rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
        at = (rows - rng.uniform(0.25, 0.75)) * np.sin(angle) + (columns - rng.uniform(0.25, 0.75)) * np.cos(angle)
        edge = max(softness, 2 / max(height, width))
        return light * (1 - rng.uniform(*depth) * np.clip(at / edge + 0.5, 0, 1))

    return effect


def lines(
    *,
    across: bool,
    slope: float = 0.0,
    level: tuple[float, float] = (0.47, 0.82),
    width: tuple[float, float] = (1, 2.2),
) -> Effect:
    """Return the effect of printed parallel lines."""

    def effect(light: Floats, rng: np.random.Generator) -> Floats:
        height, width_ = light.shape
        rows, columns = np.mgrid[0:height, 0:width_]
        tilt = rng.uniform(-slope, slope)
        at = (rows - tilt * columns) if across else (columns + tilt * rows)
        pitch, thick = rng.uniform(0.06, 0.12) * max(light.shape), rng.uniform(*width)
        distance = np.abs((at + rng.uniform(0, pitch)) % pitch - pitch / 2)
        return np.minimum(light, 1 - (1 - rng.uniform(*level)) * np.clip(thick / 2 - distance + 0.5, 0, 1))

    return effect


def squares(slope: float = 0.0, level: tuple[float, float] = (0.47, 0.82)) -> Effect:
    """Return the effect of squared paper."""

    def effect(light: Floats, rng: np.random.Generator) -> Floats:
        seed = int(rng.integers(1 << 30))
        for across in (True, False):
            light = lines(across=across, slope=slope, level=level)(light, np.random.default_rng(seed))
        return light

    return effect


def margin_line(light: Floats, rng: np.random.Generator) -> Floats:
    """Print one line from top to bottom near the left side, as school books have."""
    at = int(rng.uniform(0.04, 0.09) * light.shape[1])
    light = light.copy()
    light[:, at : at + int(rng.integers(1, 4))] = 0.45
    return light


def double_margin_line(light: Floats, rng: np.random.Generator) -> Floats:
    """Print two lines from top to bottom near the left side, a few pixels apart."""
    at = int(rng.uniform(0.04, 0.07) * light.shape[1])
    light = light.copy()
    light[:, at : at + 2] = light[:, at + 6 : at + 8] = 0.5
    return light


def frame(inset: tuple[float, float], width: tuple[float, float]) -> Effect:
    """Return the effect of a rectangle around the sheet, inset and width in shares of the shorter side."""

    def effect(light: Floats, rng: np.random.Generator) -> Floats:
        short = min(light.shape)
        away, thick = round(rng.uniform(*inset) * short), max(1, round(rng.uniform(*width) * short))
        height, width_ = light.shape
        room = away + thick + 2
        inner = np.full((height + 2 * room, width_ + 2 * room), PAPER)
        inner[room:-room, room:-room] = light
        dark = rng.uniform(0.0, 0.45)
        for block in (
            inner[away : away + thick, away : -away or None],
            inner[-away - thick : -away or None, away : -away or None],
            inner[away : -away or None, away : away + thick],
            inner[away : -away or None, -away - thick : -away or None],
        ):
            block[:] = dark
        return inner

    return effect


def title_bar(light: Floats, rng: np.random.Generator) -> Floats:
    """Put a window's bar on top."""
    bar = np.full((int(rng.uniform(0.05, 0.12) * light.shape[0]), light.shape[1]), rng.uniform(0.15, 0.6))
    return np.concatenate([bar, light])


def scanner_edge(light: Floats, rng: np.random.Generator) -> Floats:
    """Leave a dark strip at one side or two, of uneven width, as an open scanner does."""
    light = light.copy()
    for side in rng.permutation(4)[: int(rng.integers(1, 3))]:
        view = np.rot90(light, int(side))
        depth = np.linspace(*rng.uniform(0.01, 0.05, 2), view.shape[1]) * view.shape[0]
        soft = np.clip(depth[None, :] - np.arange(view.shape[0])[:, None] + 0.5, 0, 1)
        view[:] = view * (1 - 0.85 * soft)
    return light


def finger(light: Floats, rng: np.random.Generator) -> Floats:
    """Hold the sheet with a finger at one side."""
    light = np.rot90(light, turns := int(rng.integers(4))).copy()
    height, width = light.shape
    rows, columns = np.mgrid[0:height, 0:width]
    reach, thick = rng.uniform(0.06, 0.1) * height, rng.uniform(0.05, 0.09) * width
    centre = rng.uniform(0.1, 0.9) * width
    inside = np.maximum(rows - reach, 0) ** 2 + (columns - centre) ** 2 - thick**2
    soft = np.clip(-inside / (2 * thick) + 0.5, 0, 1)
    skin = rng.uniform(0.3, 0.65) * (1 - 0.3 * np.abs(columns - centre) / width)
    light = _clear(light, soft > 0)
    return np.rot90(light * (1 - soft) + skin * soft, -turns)


def _clear(light: Floats, region: NDArray[np.bool_]) -> Floats:
    """Return a sheet, extended at the top if an object on it would cover the ink."""
    if light[region].min() > 0.6:
        return light
    depth = int(np.flatnonzero(region.any(1)).max()) + 4
    return (
        np.concatenate([np.full((depth, light.shape[1]), PAPER), light])[: light.shape[0]]
        if _fits(light, depth)
        else np.where(region, PAPER, light)
    )


def _fits(light: Floats, depth: int) -> bool:
    rows = np.flatnonzero((light < 0.6).any(1))
    return bool(light.shape[0] - 1 - rows.max() > depth)


def specks(count: int, size: tuple[float, float] = (1, 5), level: tuple[float, float] = (0.0, 0.55)) -> Effect:
    """Return the effect of dirt: dark dots of some pixels, anywhere."""

    def effect(light: Floats, rng: np.random.Generator) -> Floats:
        light = light.copy()
        for _ in range(count):
            side = round(rng.uniform(*size))
            top, left = (int(rng.integers(0, length - side)) for length in light.shape)
            light[top : top + side, left : left + side] = rng.uniform(*level)
        return light

    return effect


def salt_and_pepper(share: float) -> Effect:
    """Return the effect of single pixels that are black or white."""

    def effect(light: Floats, rng: np.random.Generator) -> Floats:
        hit = rng.random(light.shape) < share
        return np.where(hit, rng.integers(0, 2, light.shape), light)

    return effect


def ring_of_a_cup(light: Floats, rng: np.random.Generator) -> Floats:
    """Leave the faint ring of a cup on the sheet, often across the digit."""
    height, width = light.shape
    rows, columns = np.mgrid[0:height, 0:width]
    radius = rng.uniform(0.35, 0.5) * max(height, width)
    distance = np.abs(np.hypot(rows - rng.uniform(0, height), columns - rng.uniform(0, width)) - radius)
    return light * (1 - 0.15 * np.clip(1 - distance / 8, 0, 1))


def punch_holes(light: Floats, rng: np.random.Generator) -> Floats:
    """Punch two or four holes along the left side; the dark desk is visible through them."""
    width = int(0.16 * light.shape[1])
    light = np.concatenate([np.full((light.shape[0], width), PAPER), light], 1)
    rows, columns = np.mgrid[0 : light.shape[0], 0 : light.shape[1]]
    radius, level = rng.uniform(0.018, 0.03) * light.shape[0], rng.uniform(0.1, 0.5)
    for at in rng.permutation([[0.3, 0.7], [0.15, 0.38, 0.62, 0.85]][int(rng.integers(2))]):
        distance = np.hypot(rows - at * light.shape[0], columns - 0.5 * width)
        soft = np.clip(radius - distance + 0.5, 0, 1)
        light = light * (1 - soft) + level * soft
    return light


def laid_on(table: tuple[float, float], margin: tuple[float, float], skew: float) -> Effect:
    """Return the effect of a table around the sheet, which is seen at an angle."""

    def effect(light: Floats, rng: np.random.Generator) -> Floats:
        height, width = light.shape
        room = [int(rng.uniform(*margin) * max(height, width)) for _ in range(4)]
        size = width + room[0] + room[2], height + room[1] + room[3]
        wood = rng.uniform(*table) + rng.normal(0, 0.01, (size[1], size[0]))
        wood += 0.03 * np.sin(np.arange(size[1]) / rng.uniform(4, 12) + rng.uniform(0, 6))[:, None]
        corners = [
            (room[0], room[1]),
            (room[0] + width, room[1]),
            (room[0] + width, room[1] + height),
            (room[0], room[1] + height),
        ]
        moved = [(x + rng.uniform(-skew, skew) * width, y + rng.uniform(-skew, skew) * height) for x, y in corners]
        return seen_at(light, moved, wood)

    return effect


def seen_at(light: Floats, corners: list[tuple[float, float]], ground: Floats) -> Floats:
    """Return a sheet whose corners, clockwise from the upper left, lie at given places of the ground."""
    height, width = light.shape
    rows = []
    for (x, y), (u, v) in zip(corners, [(0, 0), (width, 0), (width, height), (0, height)], strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    wanted = np.array([0, 0, width, 0, width, height, 0, height], float)
    coefficients = np.linalg.solve(np.array(rows), wanted)
    size = ground.shape[1], ground.shape[0]

    def turned(plane: Floats) -> Floats:
        image = Image.fromarray(np.pad(plane, 1).astype(np.float32))
        shifted = list(coefficients)
        image = image.crop((1, 1, width + 1, height + 1))
        return np.asarray(image.transform(size, Image.Transform.PERSPECTIVE, shifted, Image.Resampling.BILINEAR), float)

    cover = (
        np.asarray(Image.fromarray(pixels_of(turned(np.ones_like(light)))).filter(ImageFilter.BoxBlur(1)), float) / 255
    )
    cover = np.clip(2 * cover - 1, 0, 1)
    return ground * (1 - cover) + np.where(cover > 0, turned(light), 0) * cover


def perspective(light: Floats, rng: np.random.Generator) -> Floats:
    """Return a picture of the sheet in perspective, without its surroundings."""
    height, width = light.shape
    away = [(rng.uniform(0, 0.08) * width, rng.uniform(0, 0.08) * height) for _ in range(4)]
    signs = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    corners = [(0, 0), (width, 0), (width, height), (0, height)]
    moved = [(x + a * s, y + b * t) for (x, y), (a, b), (s, t) in zip(corners, away, signs, strict=True)]
    return seen_at(np.maximum(light, 0), moved, np.full(light.shape, PAPER))


def blurred(radius: float) -> Effect:
    """Return the effect of a picture out of focus."""
    return lambda light, _: (
        np.asarray(Image.fromarray(pixels_of(light)).filter(ImageFilter.GaussianBlur(radius)), float) / 255
    )


def _clean_pen(pen: int) -> Scene:
    def scene(digit: Digit, rng: np.random.Generator) -> bytes:
        side = max(int(rng.integers(160, 320)), 8 * pen)
        sheet = placed(drawn_with(digit, side, pen), (side + 2 * pen + 90, side + 2 * pen + 120), rng, 0.04)
        return png(pixels_of(inked(sheet)))

    return scene


def _bright_on_dark(*effects: Effect) -> Scene:
    def scene(digit: Digit, rng: np.random.Generator) -> bytes:
        light = inked(sheet_of(digit, rng), rng.uniform(0.08, 0.3), rng.uniform(0.75, 0.95))
        for effect in effects:
            light = effect(light, rng)
        return png(pixels_of(light))

    return scene


def _ballpoint(digit: Digit, rng: np.random.Generator) -> bytes:
    """Blue ink of uneven strength on white paper, in colour, as a JPEG."""
    ink = sheet_of(digit, rng)
    coarse = Image.fromarray(rng.uniform(0.6, 1, (24, 24)).astype(np.float32))
    ink = ink * np.asarray(coarse.resize(ink.shape[::-1], Image.Resampling.BICUBIC), float)
    planes = [inked(ink, paper, colour) for paper, colour in ((0.95, 0.15), (0.94, 0.2), (0.9, 0.55))]
    return photo(pixels_of(np.stack(planes, 2)), 80)


def _jpeg(quality: int, kind: str = "JPEG") -> Scene:
    def scene(digit: Digit, rng: np.random.Generator) -> bytes:
        return photo(pixels_of(grain(0.01)(inked(sheet_of(digit, rng)), rng)), quality, kind)

    return scene


def _window(kind: str) -> Scene:
    """Return the scene of a captured window: `corners` rounded, a `shadow` around, or a `margin` without anything."""

    def scene(digit: Digit, rng: np.random.Generator) -> bytes:
        light = inked(sheet_of(digit, rng), 1.0, 0.0)
        room = {"corners": 0, "shadow": int(rng.integers(20, 60)), "margin": int(rng.integers(10, 50))}[kind]
        radius = int(rng.integers(6, 16))
        height, width = (length + 2 * room for length in light.shape)
        rows, columns = np.mgrid[0:height, 0:width] + 0.5
        past_row = np.maximum(np.abs(rows - height / 2) - (light.shape[0] / 2 - radius), 0)
        past_column = np.maximum(np.abs(columns - width / 2) - (light.shape[1] / 2 - radius), 0)
        distance = np.hypot(past_row, past_column) - radius
        opaque = np.clip(0.5 - distance, 0, 1)
        grey = np.zeros((height, width))
        grey[room : height - room, room : width - room] = light
        if kind == "shadow":
            dim = 0.6 * np.clip(1 - np.maximum(distance, 0) / room, 0, 1) ** 2
            alpha = np.maximum(opaque, dim)
            grey = np.where(opaque > 0, grey, 0)
        else:
            alpha = opaque
        return png(np.stack([pixels_of(grey), pixels_of(alpha)], 2))

    return scene


def _pad(digit: Digit, rng: np.random.Generator) -> bytes:
    """Strokes of one colour on a transparent ground, as a signature pad exports them."""
    ink = sheet_of(digit, rng)
    level = np.full(ink.shape, rng.choice([0.0, 0.1, 0.9, 1.0]))
    return png(np.stack([pixels_of(level), pixels_of(ink)], 2))


def _tagged(kind: str) -> Scene:
    """Return the scene of a photo from a rotated or mirrored camera, with the EXIF orientation in a tag."""
    stored = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        7: Image.Transpose.TRANSVERSE,
    }

    def scene(digit: Digit, rng: np.random.Generator) -> bytes:
        tag = int(rng.choice(list(stored)))
        image = Image.fromarray(pixels_of(inked(sheet_of(digit, rng)))).transpose(stored[tag])
        exif = Image.Exif()
        exif[ORIENTATION] = tag
        return png(image, exif=exif) if kind == "PNG" else photo(image, 85, kind, exif=exif)

    return scene


def _phone(*more: Effect) -> Scene:
    """Return the scene of a photograph: a sheet on a table, uneven light, soft shadow, grain, JPEG, orientation."""

    def scene(digit: Digit, rng: np.random.Generator) -> bytes:
        shape = int(rng.integers(800, 1100)), int(rng.integers(800, 1100))
        light = inked(placed(enlarged(digit, int(rng.integers(300, 640))), shape, rng, 0.05))
        for effect in (
            *more,
            laid_on((0.15, 0.45), (0.02, 0.15), 0.02),
            gradient(rng.uniform(0.1, 0.4)),
            shadow(0.3, (0.15, 0.35)),
            blurred(1.2),
            grain(0.02),
        ):
            light = effect(light, rng)
        return photo(pixels_of(light), 75)

    return scene


SCENES: dict[str, tuple[str, Scene]] = {
    "clean page": ("paper", _scene()),
    "blackboard": ("paper", _bright_on_dark(grain(0.02), gradient(0.3))),
    "blue ballpoint, JPEG": ("paper", _ballpoint),
    "grain 0.03": ("paper", _scene(grain(0.03))),
    "grain 0.08": ("paper", _scene(grain(0.08))),
    "JPEG, quality 30": ("paper", _jpeg(30)),
    "JPEG, quality 75": ("paper", _jpeg(75)),
    "WebP, quality 75": ("paper", _jpeg(75, "WEBP")),
    "out of focus": ("paper", _scene(blurred(3))),
    "perspective": ("paper", _scene(perspective)),
    "light falls off by 15 %": ("light", _scene(gradient(0.15))),
    "light falls off by 30 %": ("light", _scene(gradient(0.3))),
    "light falls off by 45 %": ("light", _scene(gradient(0.45), grain(0.01))),
    "light falls off by 60 %": ("light", _scene(gradient(0.6), grain(0.01))),
    "vignette": ("light", _scene(vignette, grain(0.02))),
    "soft shadow": ("light", _scene(shadow(0.3), grain(0.01))),
    "hard shadow": ("light", _scene(shadow(0.0), grain(0.01))),
    "ruled": ("lines", _scene(lines(across=True))),
    "ruled, 2 degrees askew, grain": ("lines", _scene(lines(across=True, slope=0.035), grain(0.02))),
    "ruled as dark as ink": ("lines", _scene(lines(across=True, level=(0.1, 0.4)))),
    "squared": ("lines", _scene(squares())),
    "squared, 2 degrees askew, grain": ("lines", _scene(squares(slope=0.035), grain(0.02))),
    "red margin line": ("lines", _scene(margin_line)),
    "margin line, ruled": ("lines", _scene(lines(across=True), margin_line)),
    "double margin line, ruled": ("lines", _scene(lines(across=True), double_margin_line)),
    "frame on the edge": ("edges", _scene(frame((0, 0), (0.003, 0.02)))),
    "frame further in": ("edges", _scene(frame((0.02, 0.05), (0.003, 0.02)))),
    "thick frame": ("edges", _scene(frame((0, 0.05), (0.03, 0.07)))),
    "title bar": ("edges", _scene(title_bar)),
    "scanner edge": ("edges", _scene(scanner_edge, grain(0.01))),
    "narrow table": ("edges", _scene(laid_on((0.1, 0.6), (0.03, 0.12), 0.0))),
    "wide table, askew": ("edges", _scene(laid_on((0.1, 0.6), (0.1, 0.35), 0.03), grain(0.01))),
    "finger": ("edges", _scene(finger, grain(0.01))),
    "one speck": ("specks", _scene(specks(1))),
    "five specks": ("specks", _scene(specks(5))),
    "salt and pepper, 0.01 %": ("specks", _scene(salt_and_pepper(0.0001))),
    "salt and pepper, 0.1 %": ("specks", _scene(salt_and_pepper(0.001))),
    "punch holes": ("specks", _scene(punch_holes)),
    "ring of a cup": ("specks", _scene(ring_of_a_cup, grain(0.01))),
    **{f"pen of {pen} px": ("pens", _clean_pen(pen)) for pen in (1, 2, 4, 8, 15, 30, 60)},
    "window with round corners": ("captures", _window("corners")),
    "window with shadow": ("captures", _window("shadow")),
    "window, transparent margin": ("captures", _window("margin")),
    "signature pad": ("captures", _pad),
    "orientation in PNG": ("captures", _tagged("PNG")),
    "orientation in JPEG": ("captures", _tagged("JPEG")),
    "orientation in WebP": ("captures", _tagged("WEBP")),
    "phone photo": ("photos", _phone()),
    "phone photo, ruled": ("photos", _phone(lines(across=True, width=(2, 4)))),
    "phone photo, squared": ("photos", _phone(squares())),
}
"""Scenes by name, each with its kind of difficulty. Every scene shows one whole digit."""


def two_digits(digit: Digit, rng: np.random.Generator) -> bytes:
    """Two digits side by side, a quarter of their width or more apart."""
    ink = enlarged(digit, 160)
    other = enlarged(digit, int(rng.integers(120, 170)))
    sheet = np.zeros((300, 460))
    sheet[20 : 20 + 160, 10 : 10 + 160] = ink
    top = int(rng.integers(10, 120))
    sheet[top : top + other.shape[0], 250 : 250 + other.shape[1]] = other
    return png(pixels_of(inked(sheet)))


def cut_off(digit: Digit, _: np.random.Generator) -> bytes:
    """A digit of which a corner of the picture shows about three quarters."""
    light = inked(enlarged(digit, 280))
    rows, columns = (np.flatnonzero((light < 0.5).any(axis)) for axis in (1, 0))
    return png(pixels_of(light[: int(np.quantile(rows, 0.75)), int(np.quantile(columns, 0.25)) :]))


def only_lines(_: Digit, rng: np.random.Generator) -> bytes:
    """Ruled or squared paper with nothing written on it."""
    effect = squares() if rng.random() < 0.5 else lines(across=True)
    return png(pixels_of(effect(np.full((400, 360), PAPER), rng)))


def only_paper(_: Digit, rng: np.random.Generator) -> bytes:
    """An empty sheet with grain."""
    return png(pixels_of(grain(0.02)(np.full((400, 360), PAPER), rng)))


REFUSALS: dict[str, Scene] = {
    "two digits apart": two_digits,
    "cut off at two sides": cut_off,
    "nothing but lines": only_lines,
    "empty sheet": only_paper,
}
"""Scenes that show no one whole digit, by name; each must be refused."""
