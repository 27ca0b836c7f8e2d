"""The networks, and the module around one of them that turns raw pixels into scores.

Knows: torch modules. Does not know: how they are trained, stored or served. A test holds every entry of
`AUTOENCODERS` to the contract: the shape is kept, it scripts, and a score does not depend on the batch it came in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from training.networks.components import PrincipalComponents


class ArticleAutoencoder(nn.Module):
    """The founding article's network: 1x28x28 to 4x7x7 and back, [N, 1, 28, 28] to [N, 1, 28, 28] in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(4, 16, 2, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 2, stride=2), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, inputs: Tensor) -> Tensor:
        """Redraw standardised inputs."""
        redrawn: Tensor = self.decoder(self.encoder(inputs))
        return redrawn


class DeeperAutoencoder(nn.Module):
    """The deeper layers that the article wished for: a third stage, 1x28x28 to 8x4x4 and back, in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 8, 3, stride=2, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(16, 16, 2, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 2, stride=2), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, inputs: Tensor) -> Tensor:
        """Redraw standardised inputs."""
        redrawn: Tensor = self.decoder(self.encoder(inputs))
        return redrawn


class DenseAutoencoder(nn.Module):
    """Dense layers between principal components, and a second head that draws pixels.

    K components, the widths down to the code, the widths back, K components. What the components do not carry is lost
    in the redrawing, and so counts as error.
    """

    def __init__(self, subspace: PrincipalComponents, widths: Sequence[int], brush: int) -> None:
        """`widths`: from the first hidden layer to the code; `brush`: of the pixel head's hidden layer."""
        super().__init__()
        count = subspace.components.shape[1]
        self.subspace = subspace
        self.encoder = nn.Sequential(*_layers([count, *widths]), nn.SiLU())
        self.decoder = nn.Sequential(*_layers([*reversed(widths), count]))
        self.painter = nn.Sequential(*_layers([widths[-1], brush, 784]), nn.Sigmoid())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Redraw features, float32 [N, F]; return them redrawn, and as pixels [N, 784] in 0..1.

        No gradient flows from the pixels back to the code: the picture must not cost the score anything.
        """
        code = self.encoder(self.subspace(features))
        return self.subspace.back(self.decoder(code)), self.painter(code.detach())


def _layers(widths: Sequence[int]) -> list[nn.Module]:
    # Dense layers from each width to the next, with SiLU between them.
    dense: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for before, after in pairwise(widths[1:]):
        dense += [nn.SiLU(), nn.Linear(before, after)]
    return dense


AUTOENCODERS: dict[str, Callable[[], nn.Module]] = {"article": ArticleAutoencoder, "deeper": DeeperAutoencoder}


class ScaledScoring(nn.Module):
    """Scoring by an autoencoder that sees pixels scaled linearly to `low`..`high` and answers in 0..1.

    The error is taken between the scaled input and the answer, as the article does. There is no guard.
    """

    def __init__(self, autoencoder: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.low = low
        self.high = high

    def scale(self, images: Tensor) -> Tensor:
        """Scale raw pixels, uint8 [N, 1, 28, 28], to float32 in `low`..`high`."""
        return images.to(torch.float32) * ((self.high - self.low) / 255.0) + self.low

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score raw pixels, uint8 [N, 1, 28, 28].

        Returns:
            mse float32 [N], reconstruction float32 [N, 1, 28, 28] in 0..1, error map float32 [N, 28, 28], and reason
            int8 [N], always 0. The mean of the error map is the mse.
        """
        inputs = self.scale(images)
        reconstruction = self.autoencoder(inputs)
        error_map = (inputs - reconstruction).square().squeeze(1)
        mse = error_map.mean(dim=(1, 2))
        reason = torch.zeros(mse.shape, dtype=torch.int8, device=mse.device)
        return mse, reconstruction, error_map, reason
