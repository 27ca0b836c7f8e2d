"""The standardised space: features of oriented gradients that do not depend on contrast."""

import math

import torch
from torch import Tensor, nn

SIDE = 28
"""Height and width of an image in pixels."""
CHUNK = 512
"""Images standardised at a time: small enough for the CPU cache."""


class OrientedGradients(nn.Module):
    """Map images to oriented gradients with a root mean square of 1.

    Pixels are smoothed, their gradient is projected on evenly spaced directions and rectified, and each direction is
    pooled to a grid of cells. Division by the root mean square gives every image the same scale, which removes the
    contrast. Source: Dalal and Triggs, "Histograms of oriented gradients for human detection", 2005.
    """

    smooth: Tensor
    slope: Tensor
    pool: Tensor
    directions: Tensor

    def __init__(self, directions: int, cells: int, edge_sigma: float, pool_sigma: float) -> None:
        """Build the filters.

        Args:
            directions: number of directions of the gradient, over the full circle.
            cells: height and width of the grid that each direction is pooled to.
            edge_sigma: standard deviation of the smoothing before the gradient, in pixels.
            pool_sigma: standard deviation of the pooling, in pixels.
        """
        super().__init__()
        smooth = _gaussian_rows(edge_sigma, SIDE)
        angles = torch.arange(directions) * (2 * math.pi / directions)
        self.register_buffer("smooth", smooth)
        self.register_buffer("slope", _central_differences() @ smooth)
        self.register_buffer("pool", _gaussian_rows(pool_sigma, cells))
        self.register_buffer("directions", torch.stack([angles.cos(), angles.sin()], dim=1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Standardise float32 [N, 28, 28] in 0..1 to float32 [N, directions * cells * cells], in that order."""
        across = self.smooth @ (pixels @ self.slope.T)
        down = self.slope @ (pixels @ self.smooth.T)
        gradient = torch.stack([across, down], dim=1).flatten(2)
        edges = (self.directions @ gradient).clamp_min(0.0)
        edges = edges.view(edges.shape[0], edges.shape[1], pixels.shape[1], pixels.shape[2])
        features = self.pooled(edges).flatten(1)
        standardised: Tensor = features / features.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6)
        return standardised

    def pooled(self, edges: Tensor) -> Tensor:
        """Pool float32 [N, directions, 28, 28] to [N, directions, cells, cells]."""
        pooled: Tensor = self.pool @ (edges @ self.pool.T)
        return pooled


def in_chunks(standardise: nn.Module, pixels: Tensor) -> Tensor:
    """Standardise pixels, float32 [N, 28, 28], `CHUNK` images at a time."""
    return torch.cat([standardise(chunk) for chunk in torch.split(pixels, CHUNK)])


def _gaussian_rows(sigma: float, rows: int) -> Tensor:
    """Return Gaussian smoothing of a line of pixels, sampled at evenly spaced positions: [rows, 28]."""
    centres = (torch.arange(rows, dtype=torch.float64) + 0.5) * SIDE / rows - 0.5
    distances = centres[:, None] - torch.arange(SIDE, dtype=torch.float64)
    weights = torch.exp(-(distances**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    return weights.float()


def _central_differences() -> Tensor:
    """Return the differences of the next and the previous pixel of a line, 0 at both ends: [28, 28]."""
    matrix = torch.zeros(SIDE, SIDE)
    for i in range(1, SIDE - 1):
        matrix[i, i - 1], matrix[i, i + 1] = -1.0, 1.0
    return matrix
