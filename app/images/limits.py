"""Limits on the declared size of an image, checked before anything is decompressed."""

from __future__ import annotations

from app.problems import ExtremeShape, ImageTooLarge

MAX_LENGTH = 8192
"""Maximum length of a side, in pixels, of an image of any size."""
MAX_RATIO = 32
"""Maximum ratio of the sides of an image of any size: a 1 cropped to its strokes has 20 or less."""


def check_shape(width: int, height: int, max_pixels: int) -> None:
    """Reject the declared size of an image before anything is decompressed.

    Area alone does not bound the cost: 4 million rows of one pixel cost far more than 2,048 rows of 2,048.

    Raises:
        ImageTooLarge: there are more pixels than the limit.
        ExtremeShape: one side is too long, or the sides differ too much.
    """
    if width * height > max_pixels:
        raise ImageTooLarge(f"the header declares {width}x{height} pixels, the limit is {max_pixels} in all")
    if max(width, height) > MAX_LENGTH:
        raise ExtremeShape(f"the header declares {width}x{height} pixels, the longest side is {MAX_LENGTH}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ExtremeShape(f"the header declares {width}x{height} pixels, one side is over {MAX_RATIO} times the other")
