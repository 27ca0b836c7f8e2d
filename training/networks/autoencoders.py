"""The autoencoders, and the scoring module of those that work on pixels.

The tests apply the contract to every entry of `AUTOENCODERS`: the shape is preserved, the module can be scripted, and a
score does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from training.networks.components import PrincipalComponents


class ArticleAutoencoder(nn.Module):
    """The founding article's network: [N, 1, 28, 28] to a code of 4x7x7, and back to [N, 1, 28, 28] in 0..1."""

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
        """Reconstruct scaled pixels."""
        reconstruction: Tensor = self.decoder(self.encoder(inputs))
        return reconstruction


class DeeperAutoencoder(nn.Module):
    """The article's network with a third stage: [N, 1, 28, 28] to a code of 8x4x4, and back, in 0..1."""

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
        """Reconstruct scaled pixels."""
        reconstruction: Tensor = self.decoder(self.encoder(inputs))
        return reconstruction


class DenseAutoencoder(nn.Module):
    """Dense layers between principal components, with a second decoder for pixels.

    The layers have the widths K (number of components), `widths` down to the code, back up, and K. The part of the
    features outside the components cannot be reconstructed, and therefore counts as error.
    """

    def __init__(self, subspace: PrincipalComponents, widths: Sequence[int], pixel_width: int) -> None:
        """Build the layers.

        Args:
            subspace: principal components of the features.
            widths: widths from the first hidden layer to the code.
            pixel_width: width of the hidden layer of the pixel decoder.
        """
        super().__init__()
        count = subspace.components.shape[1]
        self.subspace = subspace
        self.encoder = nn.Sequential(*_dense([count, *widths]), nn.SiLU())
        self.decoder = nn.Sequential(*_dense([*reversed(widths), count]))
        self.pixel_decoder = nn.Sequential(*_dense([widths[-1], pixel_width, 784]), nn.Sigmoid())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct features, float32 [N, F]; return the reconstruction and pixels [N, 784] in 0..1.

        No gradient flows from the pixels to the code, so that the pixel loss cannot make the score worse.
        """
        code = self.encoder(self.subspace(features))
        return self.subspace.back(self.decoder(code)), self.pixel_decoder(code.detach())


def _dense(widths: Sequence[int]) -> list[nn.Module]:
    """Return dense layers from each width to the next, with SiLU between them."""
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for inputs, outputs in pairwise(widths[1:]):
        layers += [nn.SiLU(), nn.Linear(inputs, outputs)]
    return layers


AUTOENCODERS: dict[str, Callable[[], nn.Module]] = {"article": ArticleAutoencoder, "deeper": DeeperAutoencoder}


class ScaledScoring(nn.Module):
    """Scoring by an autoencoder on pixels scaled linearly to `low`..`high`, with a reconstruction in 0..1.

    As in the article, the error is the difference between the scaled input and the reconstruction. There are no guards.
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
