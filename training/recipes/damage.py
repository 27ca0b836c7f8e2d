"""The corruption process of the denoising autoencoder: stray strokes, missing ink, noise, and random affine maps.

Every function takes float32 images [n, 28, 28] on the device of the random generator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from training.networks.gradients import SIDE


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shear and shift each image slightly, as handwriting varies."""
    n = len(images)
    angle, shear = _uniform(n, -0.07, 0.07, generator), _uniform(n, -0.06, 0.06, generator)
    return _affine(images, angle, _uniform(n, 0.96, 1.04, generator, 2), shear, _uniform(n, -0.4, 0.4, generator, 2))


def corrupted(images: Tensor, generator: torch.Generator, *, gain: float, loss: float, noise: float) -> Tensor:
    """Return corrupted images; the noise can move pixels out of 0..1.

    Args:
        images: float32 [n, 28, 28] in 0..1.
        generator: random generator.
        gain: probability that stray strokes are added to an image.
        loss: probability that ink is removed where stray strokes would have been.
        noise: maximum standard deviation of the noise.
    """
    n = len(images)
    gains, loses = (torch.rand((n, 1, 1), generator=generator, device=generator.device) < p for p in (gain, loss))
    images = torch.maximum(images, stray_strokes(images, generator) * gains)
    cut = functional.avg_pool2d(stray_strokes(images, generator)[:, None], 3, 1, 1).squeeze(1).mul(3).clamp_max(1)
    grain = torch.randn(images.shape, generator=generator, device=generator.device)
    remaining: Tensor = images * (1 - cut * loses)
    return remaining + grain * _uniform(n, 0.0, noise, generator)[:, None, None]


def stray_strokes(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return pieces of other images: each under a random affine map, cut out by two random rectangles."""
    n = len(images)
    others = images[torch.randperm(n, generator=generator, device=generator.device)]
    angle, shear = _uniform(n, -math.pi, math.pi, generator), _uniform(n, -0.5, 0.5, generator)
    scale, shift = _uniform(n, 0.4, 1.3, generator, 2), _uniform(n, -9.0, 9.0, generator, 2)
    return _affine(others, angle, scale, shear, shift) * (_rectangles(n, generator) | _rectangles(n, generator))


def _rectangles(n: int, generator: torch.Generator) -> Tensor:
    """Return masks of one filled rectangle each, with sides of 6 to 18 pixels, bool [n, 28, 28]."""
    sides = torch.randint(6, 19, (n, 2), generator=generator, device=generator.device)
    starts = (torch.rand((n, 2), generator=generator, device=generator.device) * (SIDE + 1 - sides)).long()
    line = torch.arange(SIDE, device=generator.device)
    inside = (line >= starts[:, :, None]) & (line < (starts + sides)[:, :, None])
    return inside[:, 0, :, None] & inside[:, 1, None, :]


def _affine(images: Tensor, angle: Tensor, scale: Tensor, shear: Tensor, shift: Tensor) -> Tensor:
    """Apply an affine map to each image: angle [n] in radians, scale [n, 2], shear [n], shift [n, 2] in pixels."""
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack([cos, cos * shear - sin, shift[:, 0] * 2 / SIDE * scale[:, 0]], dim=1) / scale[:, :1]
    down = torch.stack([sin, sin * shear + cos, shift[:, 1] * 2 / SIDE * scale[:, 1]], dim=1) / scale[:, 1:]
    grid = functional.affine_grid(torch.stack([across, down], dim=1), [len(images), 1, SIDE, SIDE], align_corners=False)
    return functional.grid_sample(images[:, None], grid, align_corners=False).squeeze(1)


def _uniform(n: int, low: float, high: float, generator: torch.Generator, columns: int = 0) -> Tensor:
    """Draw from low..high: float32 [n], or [n, columns]."""
    shape = (n, columns) if columns else (n,)
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)
