"""Principal component analysis of features."""

import torch
from torch import Tensor, nn


class PrincipalComponents(nn.Module):
    """The projection of features on principal components, and its inverse."""

    mean: Tensor
    components: Tensor

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        """`mean` float32 [F], and `components` float32 [F, K] with orthonormal columns."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)

    def forward(self, features: Tensor) -> Tensor:
        """Map features, float32 [N, F], to coefficients, float32 [N, K]."""
        coefficients: Tensor = (features - self.mean) @ self.components
        return coefficients

    def back(self, coefficients: Tensor) -> Tensor:
        """Map coefficients, float32 [N, K], to features, float32 [N, F]."""
        return torch.addmm(self.mean, coefficients, self.components.T)


def principal_components(features: Tensor, count: int) -> PrincipalComponents:
    """Return the `count` leading components of features, float32 [n, F]."""
    # In float32 the eigensolver does not converge for some classes.
    exact = features.double()
    centred = exact - exact.mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    return PrincipalComponents(exact.mean(dim=0).float(), vectors[:, -count:].flip(1).float().contiguous())
