"""The probes: test images that are drawn, or derived from held-out normal images. Deterministic, uint8 [n, 28, 28]."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

Images = NDArray[np.uint8]
Kind = Literal["nothing", "damage", "variation"]
KINDS: dict[Kind, str] = {
    "nothing": "images outside the class; all should be anomalous",
    "damage": "damaged normal images; all should be anomalous",
    "variation": "normal images with a harmless change; the fewer are anomalous, the more tolerant is the model",
}
_MAX_IMAGES = 500


@dataclass(frozen=True)
class Probe:
    """Images of one kind.

    Attributes:
        name: description of the images.
        kind: key in `KINDS`.
        images: uint8 [n, 28, 28].
    """

    name: str
    kind: Kind
    images: Images


def probes(normals: Images, other_dataset: Images | None = None) -> list[Probe]:
    """Make all probes, of at most 500 images each.

    Args:
        normals: held-out normal images, uint8 [n, 28, 28], at least one.
        other_dataset: images of Fashion-MNIST, uint8 [n, 28, 28], if available.
    """
    normals = normals[:_MAX_IMAGES]
    result = [Probe(name, "nothing", images) for name, images in _nothing(normals)]
    if other_dataset is not None:
        result.append(Probe("Fashion-MNIST", "nothing", other_dataset[:_MAX_IMAGES]))
    result += [Probe(name, "damage", images) for name, images in _damage(normals)]
    result += [Probe(name, "variation", images) for name, images in _variations(normals)]
    return result


def _nothing(normals: Images) -> Iterator[tuple[str, Images]]:
    generator = np.random.default_rng(0)
    blank = np.zeros((1, 28, 28), np.uint8)
    pixel = blank.copy()
    pixel[0, 14, 14] = 255
    yield "blank", blank
    yield "white", blank + 255
    yield "grey", blank + 127
    yield "a single lit pixel", pixel
    yield "inverted", 255 - normals
    yield "uniform noise", generator.integers(0, 256, normals.shape, dtype=np.uint8)
    yield "grey noise", _noisy(np.full_like(normals, 127), 0.25)
    yield "sparse noise", (generator.random(normals.shape) < 0.05).astype(np.uint8) * 255


def _damage(normals: Images) -> Iterator[tuple[str, Images]]:
    corner, centre, line, half = (normals.copy() for _ in range(4))
    corner[:, 2:6, 2:6] = 255
    centre[:, 10:18, 10:18] = 255
    line[:, :, 14] = 255
    half[:, 14:] = 0
    yield "4x4 square in a corner", corner
    yield "8x8 square in the centre", centre
    yield "vertical line through", line
    yield "lower half erased", half
    yield "two normals overlaid", np.maximum(normals, np.roll(normals, 1, axis=0))


def _variations(normals: Images) -> Iterator[tuple[str, Images]]:
    for contrast in (0.5, 0.2):
        yield f"contrast {contrast}", np.round(normals * contrast).astype(np.uint8)
    yield "black and white only", (normals > 127).astype(np.uint8) * 255
    for deviation in (0.1, 0.25):
        yield f"noise of {deviation}", _noisy(normals, deviation)
    yield "thicker by a pixel all round", _dilated(normals)
    yield "thinner by a pixel all round", 255 - _dilated(255 - normals)
    for shift in (1, 2, 3, 4):
        yield f"moved by {shift} px", _affine(normals, shift=shift)
    for angle in (10, 20, 30, 45, 90):
        yield f"turned by {angle} degrees", _affine(normals, angle=angle)
    yield "upside down", normals[:, ::-1, ::-1]
    yield "mirrored", normals[:, :, ::-1]
    for scale in (0.5, 0.7, 0.85, 1.15, 1.3):
        yield f"scaled to {100 * scale:.0f} %", _affine(normals, scale=scale)


def _noisy(images: Images, deviation: float) -> Images:
    noise = np.random.default_rng(0).normal(0.0, 255 * deviation, images.shape)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def _dilated(images: Images) -> Images:
    """Replace every pixel by the maximum of its 3x3 window."""
    dilated = functional.max_pool2d(torch.from_numpy(images.astype(np.float32)[:, None]), 3, 1, 1)
    return dilated[:, 0].numpy().astype(np.uint8)


def _affine(images: Images, *, angle: float = 0.0, scale: float = 1.0, shift: int = 0) -> Images:
    """Rotate by degrees, scale about the centre, and shift to the right by pixels."""
    cos, sin = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    matrix = torch.tensor([[cos, -sin, -shift / 14], [sin, cos, 0.0]]).expand(len(images), -1, -1)
    grid = functional.affine_grid(matrix, [len(images), 1, 28, 28], align_corners=False)
    pixels = torch.from_numpy(images.astype(np.float32)[:, None])
    return functional.grid_sample(pixels, grid, align_corners=False)[:, 0].round().numpy().astype(np.uint8)
