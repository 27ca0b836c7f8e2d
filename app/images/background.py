"""Puts an image with transparent pixels on a background."""

from __future__ import annotations

from PIL import Image, ImageStat

from app.problems import BlankImage

_SOLID_ONLY = [0] * 250 + [255] * 6
"""Table that keeps only pixels that are opaque except for rounding."""
_PAGE_FILL = 0.9
"""Share of the box around all opaque pixels that a page fills; a slanted stroke fills far less."""
_STROKE_LEVELS = 24
"""Grey levels by which strokes differ from their page."""


def compose(grey: Image.Image, opacity: Image.Image | None) -> Image.Image:
    """Return a grey image without transparency.

    Transparent pixels around an opaque page get the page's own level. Other transparent pixels become white if the
    opaque pixels are dark on average, else black, so that strokes stand out.

    Args:
        grey: mode L.
        opacity: mode L; None if all pixels are opaque.

    Raises:
        BlankImage: every pixel is transparent.
    """
    if opacity is None or opacity.getextrema()[0] == 255:
        return grey
    if opacity.getextrema()[1] == 0:
        raise BlankImage("every pixel is transparent")
    page = _page_level(grey, opacity)
    if page is not None:
        # The pixels of a window's shadow and round corners are black or mixed with it, so they are not blended in.
        return Image.composite(grey, Image.new("L", grey.size, page), opacity.point(_SOLID_ONLY))
    dark = ImageStat.Stat(grey, opacity).mean[0] < 128
    return Image.composite(grey, Image.new("L", grey.size, 255 if dark else 0), opacity)


def _page_level(grey: Image.Image, opacity: Image.Image) -> int | None:
    """Return the grey level of the opaque page that transparent pixels surround; None without such a page.

    A page fills the box around the opaque pixels, up to its round corners, and has strokes of another level on it.
    """
    solid = opacity.point(_SOLID_ONLY)
    box = solid.getbbox()
    if box is None:
        return None
    inside, levels = solid.crop(box), grey.histogram(solid)
    if ImageStat.Stat(inside).mean[0] < 255 * _PAGE_FILL:
        return None
    page = max(range(256), key=levels.__getitem__)
    strokes = sum(count for level, count in enumerate(levels) if abs(level - page) >= _STROKE_LEVELS)
    return page if strokes else None
