"""Draws the pictures of a stored score: planes, error maps and the panel of all three."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from app.images.png import SIDE


def encode(pixels: NDArray[np.uint8], scale: int = 1) -> bytes:
    """Encode pixels, uint8 [height, width] grey or [height, width, 3] RGB, as a PNG enlarged by `scale`."""
    return _png(_enlarged(pixels, scale))


def grey_picture(plane: bytes) -> NDArray[np.uint8]:
    """Return a plane of 784 bytes as uint8 [28, 28]."""
    return np.frombuffer(plane, np.uint8).reshape(SIDE, SIDE)


def error_picture(error_map: bytes, gain: float = 1.0) -> NDArray[np.uint8]:
    """Return an error map in colour, uint8 [28, 28, 3]: black is 0, pale yellow 255 and above.

    Args:
        error_map: 784 bytes, squared errors as shares of their peak.
        gain: factor of every byte: the peak, divided by the squared error that pale yellow stands for.
    """
    levels: NDArray[np.uint8] = np.minimum(np.rint(grey_picture(error_map) * gain), 255).astype(np.uint8)
    colours: NDArray[np.uint8] = _COLOURS[levels]
    return colours


def panel(planes: dict[str, NDArray[np.uint8]], caption: str, *, anomalous: bool, scale: int) -> bytes:
    """Draw planes side by side, each below its name, with a caption at the bottom, and return a PNG.

    Args:
        planes: uint8 [28, 28] or [28, 28, 3], by the name to write above each plane.
        caption: the text at the bottom.
        anomalous: whether the caption has the colour of an alarm.
        scale: side of one pixel of a plane, in pixels. Below 4 no text is written, because it would not fit.
    """
    gap, side = 2 * scale, SIDE * scale
    room = 3 * scale if scale >= 4 else 0
    size = (len(planes) * side + (len(planes) + 1) * gap, side + 2 * gap + 2 * room)
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    for place, (name, plane) in enumerate(planes.items()):
        left = gap + place * (side + gap)
        canvas.paste(_enlarged(plane, scale), (left, gap + room))
        if room:
            draw.text((left, gap / 2), name, fill=_INK, font=ImageFont.load_default(2.2 * scale))
    if room:
        draw.text(
            (gap, side + gap + room + gap / 4),
            caption,
            fill=_ALARM if anomalous else _CALM,
            font=ImageFont.load_default(2.2 * scale),
        )
    return _png(canvas)


def _enlarged(pixels: NDArray[np.uint8], scale: int) -> Image.Image:
    image = Image.fromarray(pixels)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) if scale > 1 else image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


_PAPER, _INK, _CALM, _ALARM = "#ffffff", "#1b1f24", "#1a7f37", "#b3261e"
_ANCHORS = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))


def _colours() -> NDArray[np.uint8]:
    """Return 256 colours from black over red to pale yellow, uint8 [256, 3]; lightness never decreases."""
    at = np.linspace(0, 255, len(_ANCHORS))
    return np.stack([np.interp(np.arange(256), at, channel) for channel in zip(*_ANCHORS, strict=True)], 1).astype(
        np.uint8
    )


_COLOURS = _colours()
