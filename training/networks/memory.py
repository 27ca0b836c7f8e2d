"""Redrawing from memory: as a blend of the normal images that are nearest.

Knows: coefficients of images. Does not know: pixels, recipes.
"""

from typing import Final

import torch
from torch import Tensor, nn

from training.networks.components import PrincipalComponents


class Memory(nn.Module):
    """Remembered normal images, and the blend of the nearest ones that comes closest to a new one.

    The blend is the projection on the plane through the nearest remembered images, held towards their mean by a ridge
    penalty: Roweis and Saul, "Nonlinear dimensionality reduction by locally linear embedding", 2000. What is
    remembered can be read back from the weights.
    """

    remembered: Tensor
    penalty: Tensor
    neighbours: Final[int]

    def __init__(self, remembered: Tensor, neighbours: int, penalty: float) -> None:
        """`remembered`: coefficients of normal images, float32 [M, K]; `penalty`: of the ridge, in squared error."""
        super().__init__()
        self.neighbours = min(neighbours, len(remembered))
        self.register_buffer("remembered", remembered)
        self.register_buffer("penalty", penalty * torch.eye(self.neighbours, device=remembered.device))

    def forward(self, coefficients: Tensor) -> Tensor:
        """Blend for float32 [N, K]; the answer has the same shape."""
        nearest = torch.cdist(coefficients, self.remembered).topk(self.neighbours, dim=1, largest=False).indices
        examples = self.remembered[nearest]
        mean = examples.mean(dim=1, keepdim=True)
        spread = examples - mean
        wanted = spread @ (coefficients[:, None] - mean).transpose(1, 2)
        weights = torch.linalg.solve(spread @ spread.transpose(1, 2) + self.penalty, wanted)
        blend: Tensor = mean + weights.transpose(1, 2) @ spread
        return blend.squeeze(1)


class MemoryAutoencoder(nn.Module):
    """Principal components, a memory between them, and a painter of pixels."""

    def __init__(self, subspace: PrincipalComponents, memory: Memory, painter: nn.Module) -> None:
        """`painter` draws pixels, [N, 784], from the coefficients of a blend, [N, K]."""
        super().__init__()
        self.subspace = subspace
        self.memory = memory
        self.painter = painter

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Redraw features, float32 [N, F]; return them redrawn, and as pixels [N, 784] in 0..1."""
        recalled = self.memory(self.subspace(features))
        return self.subspace.back(recalled), self.painter(recalled).clamp(0.0, 1.0)
