"""Draw the picture of docs/own-images.md: photos before and after their preparation. Run: python docs/own_images.py."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from app.images.prepare import prepared_pixels
from app.models.manifest import Preparation
from benchmarks.washers import DEFECTS, washer

_CELL, _GAP = 112, 8
_PREPARATION = Preparation(fit="resize", invert=True)


def main() -> None:
    """Write docs/images/own-images.png: photos in the first row, prepared pixels in the second."""
    rng = np.random.default_rng(7)
    photos = [washer(rng, defect) for defect in (None, None, *DEFECTS)]
    sheet = Image.new("L", (len(photos) * (_CELL + _GAP) + _GAP, 2 * (_CELL + _GAP) + _GAP), 255)
    for column, photo in enumerate(photos):
        left = _GAP + column * (_CELL + _GAP)
        sheet.paste(photo.resize((_CELL, _CELL)), (left, _GAP))
        file = io.BytesIO()
        photo.save(file, "PNG")
        pixels = prepared_pixels(file.getvalue(), _PREPARATION, 10**6)
        small = Image.frombytes("L", (28, 28), pixels)
        sheet.paste(small.resize((_CELL, _CELL), Image.Resampling.NEAREST), (left, 2 * _GAP + _CELL))
    sheet.save(Path(__file__).parent / "images" / "own-images.png", optimize=True)


if __name__ == "__main__":
    main()
