"""The contract of a recipe: its description, its fit function, and the error for failed training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.data.preflight import ink

Progress = Callable[[int, float], None]
"""Callback for each finished epoch: its number, counted from 1, and its mean training loss."""


class TrainingError(Exception):
    """Training that cannot continue; the message contains the reason."""


class Fit(Protocol):
    """Fit a scoring module to normal images."""

    def __call__(
        self,
        images: NDArray[np.uint8],
        parameters: Mapping[str, Any],
        *,
        seed: int,
        device: torch.device,
        progress: Progress,
    ) -> nn.Module:
        """Return a scriptable scoring module with the four outputs of docs/decisions/0002-four-outputs.md.

        Args:
            images: normal images, uint8 [n, 28, 28].
            parameters: `Recipe.parameters`.
            seed: seed of all random numbers. Torch's global generator must be left unchanged.
            device: device to train on.
            progress: callback for each epoch; not called by a recipe without epochs.

        Raises:
            TrainingError: training diverged.
        """


@dataclass(frozen=True)
class Recipe:
    """One way to make a scoring module.

    Attributes:
        name: key in the table of recipes.
        summary: one line for users.
        fit: function that makes the scoring module.
        parameters: arguments of `fit`, JSON values only; the manifest contains them. If there are guards, `guards`
            contains `guard_error`, the score of the images that a guard rejects.
        score_space: description of the space in which squared errors are measured.
        reasons: names of the guards in the graph; code k in its fourth output means `reasons[k - 1]`.
        split: key in `training.data.splits.SPLITS`.
    """

    name: str
    summary: str
    fit: Fit
    parameters: Mapping[str, Any]
    score_space: str
    reasons: tuple[str, ...] = ()
    split: str = "standard"

    def with_epochs(self, epochs: int | None) -> Recipe:
        """Return the recipe with another number of epochs; unchanged for None or if it has no epochs."""
        if epochs is None or "epochs" not in self.parameters:
            return self
        return replace(self, parameters={**self.parameters, "epochs": epochs})

    def with_ink_of(self, images: NDArray[np.uint8]) -> Recipe:
        """Return the recipe with guards for images that are not digits; unchanged if it has no guards.

        These guards measure ink as the sum of the differences from the image's own background. Their limits are half of
        the 1st percentile and twice the 99th percentile of the ink of the training images.

        Args:
            images: training images, uint8 [n, 28, 28].
        """
        if "guards" not in self.parameters:
            return self
        least, most = np.quantile(ink(images), (0.01, 0.99))
        limits = {"least_ink": max(0.5, round(least / 2, 2)), "most_ink": max(1.0, round(2 * most, 2))}
        guards = {**self.parameters["guards"], **limits, "own_background": True}
        return replace(self, parameters={**self.parameters, "guards": guards})
