"""Draw photos of washers on a bright table: material to try `anomaly train --fit resize` with.

`python benchmarks/washers.py FOLDER` writes JPEG files of different sizes to `FOLDER/normal`, `FOLDER/new` (more normal
washers) and `FOLDER/odd` (defects). Place, size, rotation, light, grain and quality vary as in real photos.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

DEFECTS = ("cracked", "closed", "bent", "nicked")
"""A gap in the ring, no hole, an oval, and a bite out of the outer edge."""
_OVERSIZE = 2
"""Factor at which edges are drawn before they are reduced."""


def washer(rng: np.random.Generator, defect: str | None = None) -> Image.Image:
    """Draw one photo, grey, 120 to 360 pixels wide.

    Args:
        rng: draws everything that varies.
        defect: one of `DEFECTS`, or None for a normal washer.
    """
    side = int(rng.integers(120, 361))
    scale = side * _OVERSIZE
    canvas = Image.new("L", (scale, scale), 0)
    draw = ImageDraw.Draw(canvas)
    x, y = (scale * (0.5 + rng.uniform(-0.02, 0.02)) for _ in range(2))
    outer = scale * rng.uniform(0.31, 0.35)
    inner = outer * rng.uniform(0.46, 0.52)
    oval = 0.72 if defect == "bent" else rng.uniform(0.97, 1.0)
    _disc(draw, x, y, outer, outer * oval, fill=255)
    if defect != "closed":
        _disc(draw, x, y, inner, inner * oval, fill=0)
    angle = rng.uniform(0, 2 * math.pi)
    away = x + outer * math.cos(angle), y + outer * math.sin(angle)
    if defect == "cracked":
        draw.line([(x, y), (2 * away[0] - x, 2 * away[1] - y)], fill=0, width=int(0.22 * outer))
    if defect == "nicked":
        _disc(draw, *away, 0.38 * outer, 0.38 * outer, fill=0)
    canvas = canvas.resize((side, side), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(side / 300))
    return _photo(np.asarray(canvas, np.float64) / 255, rng)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, across: float, down: float, *, fill: int) -> None:
    draw.ellipse((x - across, y - down, x + across, y + down), fill=fill)


def _photo(metal: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Lay metal, float64 [side, side] in 0..1, on a bright table with a gradient of light and grain."""
    side = len(metal)
    slope = np.linspace(-0.5, 0.5, side)
    direction = rng.uniform(0, 2 * math.pi)
    light = 1 + rng.uniform(0, 0.12) * (slope * math.cos(direction) + slope[:, None] * math.sin(direction))
    table, dark = rng.uniform(195, 225), rng.uniform(50, 80)
    pixels = (table + (dark - table) * metal) * light + rng.normal(0, 4, metal.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write(folder: Path, count: int, rng: np.random.Generator, defects: tuple[str, ...] = ()) -> None:
    """Write `count` JPEG files; with defects, in turn."""
    folder.mkdir(parents=True)
    for number in range(count):
        photo = washer(rng, defects[number % len(defects)] if defects else None)
        photo.save(folder / f"{number:04}.jpg", quality=int(rng.integers(70, 96)))


def main() -> None:
    """Write the three folders."""
    parser = argparse.ArgumentParser(description="Draw photos of washers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=600, help="number of normal photos")
    parser.add_argument("--new", type=int, default=200, help="number of new normal photos")
    parser.add_argument("--odd", type=int, default=100, help="number of photos with a defect")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    write(given.folder / "normal", given.count, rng)
    write(given.folder / "new", given.new, rng)
    write(given.folder / "odd", given.odd, rng, DEFECTS)


if __name__ == "__main__":
    main()
