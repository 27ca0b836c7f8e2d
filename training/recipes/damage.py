"""Damage that an autoencoder learns to undo: strokes too many, strokes too few, a little noise.

Knows: pixels, chance. Does not know: recipes, networks. Every function takes float32 images [n, 28, 28] and draws its
random numbers where the generator lives, which must be where the images are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from training.networks.gradients import SIDE


def another_hand(images: Tensor, chance: torch.Generator) -> Tensor:
    """Turn, scale, shear and move the images a little, as another hand might have written them."""
    n = len(images)
    angle, shear = _uniform(n, -0.07, 0.07, chance), _uniform(n, -0.06, 0.06, chance)
    return _affine(images, angle, _uniform(n, 0.96, 1.04, chance, 2), shear, _uniform(n, -0.4, 0.4, chance, 2))


def damaged(images: Tensor, chance: torch.Generator, *, gain: float, loss: float, noise: float) -> Tensor:
    """Damage images; the answer may leave 0..1 by its noise.

    Args:
        images: float32 [n, 28, 28] in 0..1.
        chance: of everything random.
        gain: probability that an image gains stray strokes.
        loss: probability that it loses ink where stray strokes would have been.
        noise: largest standard deviation of the noise.
    """
    n = len(images)
    gains, loses = (torch.rand((n, 1, 1), generator=chance, device=chance.device) < share for share in (gain, loss))
    images = torch.maximum(images, stray_strokes(images, chance) * gains)
    cut = functional.avg_pool2d(stray_strokes(images, chance)[:, None], 3, 1, 1).squeeze(1).mul(3).clamp_max(1)
    grain = torch.randn(images.shape, generator=chance, device=chance.device)
    kept: Tensor = images * (1 - cut * loses)
    return kept + grain * _uniform(n, 0.0, noise, chance)[:, None, None]


def stray_strokes(images: Tensor, chance: torch.Generator) -> Tensor:
    """Draw pieces of other images in any direction, size and place, seen through two random rectangles."""
    n = len(images)
    others = images[torch.randperm(n, generator=chance, device=chance.device)]
    angle, shear = _uniform(n, -math.pi, math.pi, chance), _uniform(n, -0.5, 0.5, chance)
    wild = _affine(others, angle, _uniform(n, 0.4, 1.3, chance, 2), shear, _uniform(n, -9.0, 9.0, chance, 2))
    return wild * (_rectangles(n, chance) | _rectangles(n, chance))


def _rectangles(n: int, chance: torch.Generator) -> Tensor:
    # One filled rectangle an image, with sides of 6 to 18 pixels: bool [n, 28, 28].
    sides = torch.randint(6, 19, (n, 2), generator=chance, device=chance.device)
    starts = (torch.rand((n, 2), generator=chance, device=chance.device) * (SIDE + 1 - sides)).long()
    line = torch.arange(SIDE, device=chance.device)
    inside = (line >= starts[:, :, None]) & (line < (starts + sides)[:, :, None])
    return inside[:, 0, :, None] & inside[:, 1, None, :]


def _affine(images: Tensor, angle: Tensor, scale: Tensor, shear: Tensor, shift: Tensor) -> Tensor:
    # angle [n] in radians, scale [n, 2], shear [n], shift [n, 2] in pixels.
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack([cos, cos * shear - sin, shift[:, 0] * 2 / SIDE * scale[:, 0]], dim=1) / scale[:, :1]
    down = torch.stack([sin, sin * shear + cos, shift[:, 1] * 2 / SIDE * scale[:, 1]], dim=1) / scale[:, 1:]
    grid = functional.affine_grid(torch.stack([across, down], dim=1), [len(images), 1, SIDE, SIDE], align_corners=False)
    return functional.grid_sample(images[:, None], grid, align_corners=False).squeeze(1)


def _uniform(n: int, low: float, high: float, chance: torch.Generator, columns: int = 0) -> Tensor:
    shape = (n, columns) if columns else (n,)
    return low + (high - low) * torch.rand(shape, generator=chance, device=chance.device)
