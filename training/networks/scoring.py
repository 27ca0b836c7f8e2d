"""The scoring module of every recipe that works in the standardised space: guard, standardise, redraw, compare.

Knows: the contract of the artifact. Does not know: which autoencoder redraws, how it was trained, thresholds.
"""

from typing import Final

import torch
from torch import Tensor, nn

from training.networks.gradients import SIDE, OrientedGradients

REASONS = ("empty", "too_much_ink")
"""Names of the guards, in the order of their codes."""
SCORE_SPACE = (
    "strengths of the edges by direction and place, pooled to 14x14 cells and scaled to unit energy, "
    "divided by the image's mean strength"
)


class StandardisedScoring(nn.Module):
    """Guard an image, standardise it, let an autoencoder redraw it, and compare.

    Squared errors are divided by the mean of the image's features. All images have the same energy, so that a large
    mean says that it is spread over many cells, and a small one that the image is sparse: a lone stroke is easy to
    redraw, and pays for it.
    """

    least_ink: Final[float]
    most_ink: Final[float]
    guard_error: Final[float]
    cells: Final[int]
    cell_of_pixel: Tensor

    def __init__(
        self,
        standardise: OrientedGradients,
        autoencoder: nn.Module,
        *,
        least_ink: float,
        most_ink: float,
        guard_error: float,
    ) -> None:
        """Put the parts together.

        Args:
            standardise: pixels to features.
            autoencoder: features [N, F] to the same redrawn, and to pixels [N, 784] in 0..1.
            least_ink: sum of an image's brightness, 0..1 a pixel, below which it is `empty`.
            most_ink: sum above which it has `too_much_ink`.
            guard_error: the error everywhere of an image that a guard caught.
        """
        super().__init__()
        self.standardise = standardise
        self.autoencoder = autoencoder
        self.least_ink = least_ink
        self.most_ink = most_ink
        self.guard_error = guard_error
        self.cells = standardise.pool.shape[0]
        side = torch.arange(SIDE) * self.cells // SIDE
        self.register_buffer("cell_of_pixel", (side[:, None] * self.cells + side).flatten())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score raw pixels, uint8 [N, 1, 28, 28].

        Returns:
            mse float32 [N], reconstruction float32 [N, 1, 28, 28] in 0..1, error map float32 [N, 28, 28], and reason
            int8 [N]: 0, or the guard's code. The mean of the error map is the mse.
        """
        count = images.shape[0]
        pixels = images.squeeze(1).to(torch.float32) / 255.0
        features = self.standardise(pixels)
        rows = features
        # Matrix libraries take another road for very few rows, and round differently on it.
        if count < 4:
            rows = torch.cat([features, features.new_zeros(4 - count, features.shape[1])])
        redrawn, drawing = self.autoencoder(rows)
        errors = (features - redrawn[:count]).square() / features.mean(dim=1, keepdim=True).clamp_min(1e-6)
        errors = errors.view(count, -1, self.cells, self.cells).mean(dim=1)
        ink = pixels.sum(dim=(1, 2))
        reason = (ink < self.least_ink).to(torch.int8) + 2 * (ink > self.most_ink).to(torch.int8)
        errors = errors.masked_fill((reason > 0)[:, None, None], self.guard_error)
        error_map = errors.flatten(1).index_select(1, self.cell_of_pixel).view(pixels.shape)
        return error_map.mean(dim=(1, 2)), drawing[:count].view(images.shape), error_map, reason


def rounded(module: nn.Module) -> nn.Module:
    """Round weights to the nearest float16, in place. They stay float32, and pack into little more than half."""
    with torch.no_grad():
        for weights in (*module.parameters(), *module.buffers()):
            weights.copy_(weights.half())
    return module
