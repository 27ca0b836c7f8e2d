"""A second signal for small defects: the largest local error in units of its own spread over normal images."""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional


class LocalSignal(nn.Module):
    """The largest mean of a window of cells, each divided by its own unit, on the scale of the mean error."""

    unit: Tensor
    window: Final[int]
    scale: Final[float]

    def __init__(self, unit: Tensor, window: int, scale: float) -> None:
        """Store the units.

        Args:
            unit: what the error of each cell is divided by, float32 [cells, cells], above 0.
            window: height and width of the window, in cells.
            scale: factor from the largest window to the scale of the mean error.
        """
        super().__init__()
        self.register_buffer("unit", unit)
        self.window = window
        self.scale = scale

    def forward(self, errors: Tensor) -> Tensor:
        """Return the local signal, float32 [N], of squared errors, float32 [N, cells, cells]."""
        means = functional.avg_pool2d((errors / self.unit).unsqueeze(1), self.window, 1)
        return means.flatten(1).amax(dim=1) * self.scale

    @staticmethod
    def of(errors: Tensor, window: int, floor: float, share: float, alpha: float) -> "LocalSignal":
        """Return the local signal with the spreads and the scale of normal images.

        The larger of mean error and local signal is one score, which is calibrated with other images. So its
        false-positive rate does not depend on spreads and scale, and both may come from the training images.

        Args:
            errors: squared errors of normal images, float32 [n, cells, cells].
            window: height and width of the window, in cells.
            floor: minimum unit of a cell, as a share of the mean unit of all cells.
            share: part of the false-positive rate `alpha` that the local signal gets, 0 to 1.
            alpha: false-positive rate at which both signals are weighed.
        """
        deviation = errors.std(dim=0, correction=0)
        unit = deviation.clamp_min(float(floor * deviation.mean())).clamp_min(1e-12)
        plain = LocalSignal(unit, window, 1.0)
        mean_level = _quantile(errors.mean(dim=(1, 2)), 1 - (1 - share) * alpha)
        return LocalSignal(unit, window, mean_level / max(_quantile(plain(errors), 1 - share * alpha), 1e-12))


def _quantile(values: Tensor, level: float) -> float:
    return float(torch.quantile(values, level))
