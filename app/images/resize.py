"""From a picture of anything to 28x28 grey pixels: `fit=resize`, for models of the user's own images.

Scope: cropping, inversion, resizing. Independent of digits, models and HTTP.
"""

from __future__ import annotations

import math

from PIL import Image, ImageOps

from app.images.fit import Fitted
from app.images.png import SIDE
from app.images.reading import read

_DECODED_SIDE = 8 * SIDE
"""Least side, in pixels, at which the cropped part of a JPEG is decoded: 8x8 pixels for one of the result."""

WHOLE = (0.0, 0.0, 1.0, 1.0)
"""The crop that leaves nothing out, as shares of the sides: left, top, right, bottom."""


def resize(
    content: bytes, max_pixels: int, *, invert: bool = False, crop: tuple[float, float, float, float] | None = None
) -> Fitted:
    """Resize a picture, or a part of it, to 28x28 grey pixels; the ratio of the sides may change.

    Args:
        content: the whole file, PNG, JPEG or WebP; any size, grey or not.
        max_pixels: a file that declares more is rejected before it is decompressed.
        invert: whether bright becomes dark.
        crop: left, top, right, bottom as shares of the upright picture's sides, 0 to 1; None for the whole picture.

    Raises:
        InvalidImage: one of its kinds says what is wrong.
        EmptyBody: the content is empty.
    """
    left, top, right, bottom = crop or WHOLE
    picture = read(content, max_pixels, math.ceil(_DECODED_SIDE / min(right - left, bottom - top)))
    image = picture.image
    box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    # Pillow widens the kernel to the pixels that each new one covers, so fine patterns do not alias.
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
    if invert:
        small = ImageOps.invert(small)
    width, height = picture.width, picture.height
    sent = (int(left * width), int(top * height), math.ceil(right * width), math.ceil(bottom * height))
    return Fitted(small.tobytes(), invert, sent, None)
