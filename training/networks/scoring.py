"""The scoring module of all recipes in the standardised space: guards, standardisation, reconstruction, error."""

from typing import Final

import torch
from torch import Tensor, nn

from training.networks.gradients import SIDE, OrientedGradients
from training.networks.local import LocalSignal

REASONS = ("empty", "too_much_ink")
"""Names of the guards, in the order of their codes."""
LOCAL_CODE = 3
"""Code of images whose score is the local signal. Its name in the manifest is `app.models.manifest.LOCAL`."""
SCORE_SPACE = (
    "strengths of the edges by direction and place, pooled to 14x14 cells and scaled to unit energy, "
    "divided by the image's mean strength"
)


class StandardisedScoring(nn.Module):
    """Standardise an image, reconstruct it, and measure the error; guards override the error of unsuitable images.

    Squared errors are divided by the mean of the image's features. The root mean square of all images is 1, so a
    large mean belongs to an image with edges in many cells, and a small mean to a sparse image. A sparse image, such as
    a single stroke, is easy to reconstruct; the division raises its error.
    """

    least_ink: Final[float]
    most_ink: Final[float]
    guard_error: Final[float]
    own_background: Final[bool]
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
        own_background: bool = False,
        local: LocalSignal | None = None,
    ) -> None:
        """Combine the parts.

        Args:
            standardise: module from pixels to features.
            autoencoder: module from features [N, F] to their reconstruction and to pixels [N, 784] in 0..1.
            least_ink: minimum sum of an image's pixels in 0..1; below it the reason is `empty`.
            most_ink: maximum sum; above it the reason is `too_much_ink`.
            guard_error: error of every pixel of an image that a guard rejects.
            own_background: whether ink is the difference from the median of the image's border, and not from black.
            local: second signal. If it is larger than the mean error, it is the score.
        """
        super().__init__()
        self.standardise = standardise
        self.autoencoder = autoencoder
        self.least_ink = least_ink
        self.most_ink = most_ink
        self.guard_error = guard_error
        self.own_background = own_background
        self.local = local
        self.cells = standardise.pool.shape[0]
        side = torch.arange(SIDE) * self.cells // SIDE
        self.register_buffer("cell_of_pixel", (side[:, None] * self.cells + side).flatten())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score raw pixels, uint8 [N, 1, 28, 28].

        Returns:
            mse float32 [N], reconstruction float32 [N, 1, 28, 28] in 0..1, error map float32 [N, 28, 28], and reason
            int8 [N]: 0, the guard's code, or `LOCAL_CODE`. The mean of the error map is the mse: the map of an image
            whose score is the local signal is scaled up to it.
        """
        count = images.shape[0]
        pixels = images.squeeze(1).to(torch.float32) / 255.0
        features = self.standardise(pixels)
        rows = features
        # Matrix libraries use other kernels for fewer than four rows, which round differently.
        if count < 4:
            rows = torch.cat([features, features.new_zeros(4 - count, features.shape[1])])
        reconstruction, drawing = self.autoencoder(rows)
        errors = (features - reconstruction[:count]).square() / features.mean(dim=1, keepdim=True).clamp_min(1e-6)
        errors = errors.view(count, -1, self.cells, self.cells).mean(dim=1)
        ground = pixels
        if self.own_background:
            border = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], dim=1)
            ground = (pixels - border.median(dim=1).values[:, None, None]).abs()
        ink = ground.sum(dim=(1, 2))
        reason = (ink < self.least_ink).to(torch.int8) + 2 * (ink > self.most_ink).to(torch.int8)
        errors = errors.masked_fill((reason > 0)[:, None, None], self.guard_error)
        if self.local is not None:
            mean, local = errors.mean(dim=(1, 2)), self.local(errors)
            decides = (local > mean) & (reason == 0)
            errors = torch.where(decides[:, None, None], errors * (local / mean)[:, None, None], errors)
            reason = reason + 3 * decides.to(torch.int8)
        error_map = errors.flatten(1).index_select(1, self.cell_of_pixel).view(pixels.shape)
        return error_map.mean(dim=(1, 2)), drawing[:count].view(images.shape), error_map, reason


def rounded(module: nn.Module) -> nn.Module:
    """Round weights to the nearest float16, in place; they stay float32, and compress to little more than half."""
    with torch.no_grad():
        for weights in (*module.parameters(), *module.buffers()):
            weights.copy_(weights.half())
    return module
