"""The memory autoencoder: reconstruction by a blend of the nearest stored normal images."""

from typing import Final

import torch
from torch import Tensor, nn

from training.networks.components import PrincipalComponents


class Memory(nn.Module):
    """Stored normal images, and the projection on the affine hull of the nearest ones.

    A ridge penalty pulls the projection towards the mean of these images. Source: Roweis and Saul, "Nonlinear
    dimensionality reduction by locally linear embedding", 2000. The stored images can be read back from the weights.
    """

    stored: Tensor
    penalty: Tensor
    neighbours: Final[int]

    def __init__(self, stored: Tensor, neighbours: int, penalty: float) -> None:
        """Store coefficients of normal images.

        Args:
            stored: coefficients, float32 [M, K].
            neighbours: number of nearest images in a blend.
            penalty: ridge penalty, in squared error.
        """
        super().__init__()
        self.neighbours = min(neighbours, len(stored))
        self.register_buffer("stored", stored)
        self.register_buffer("penalty", penalty * torch.eye(self.neighbours, device=stored.device))

    def forward(self, coefficients: Tensor) -> Tensor:
        """Return the blends for coefficients, float32 [N, K], in the same shape."""
        nearest = torch.cdist(coefficients, self.stored).topk(self.neighbours, dim=1, largest=False).indices
        examples = self.stored[nearest]
        mean = examples.mean(dim=1, keepdim=True)
        centred = examples - mean
        target = centred @ (coefficients[:, None] - mean).transpose(1, 2)
        weights = torch.linalg.solve(centred @ centred.transpose(1, 2) + self.penalty, target)
        blend: Tensor = mean + weights.transpose(1, 2) @ centred
        return blend.squeeze(1)


class MemoryAutoencoder(nn.Module):
    """Principal components, a memory of their coefficients, and a pixel decoder."""

    def __init__(self, subspace: PrincipalComponents, memory: Memory, pixel_decoder: nn.Module) -> None:
        """`pixel_decoder` maps the coefficients of a blend, [N, K], to pixels, [N, 784]."""
        super().__init__()
        self.subspace = subspace
        self.memory = memory
        self.pixel_decoder = pixel_decoder

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct features, float32 [N, F]; return the reconstruction and pixels [N, 784] in 0..1."""
        blend = self.memory(self.subspace(features))
        return self.subspace.back(blend), self.pixel_decoder(blend).clamp(0.0, 1.0)
