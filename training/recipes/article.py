"""The founding article's training loop.

Knows: optimisation. Does not know: data sets, export, the model store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.networks.autoencoders import AUTOENCODERS, ScaledScoring

Progress = Callable[[int, float], None]
"""Is told each finished epoch, counted from 1, and its mean training loss."""


class TrainingError(Exception):
    """Training that cannot go on; the message says why."""


class Fit(Protocol):
    """Make a scoring module from normal images: the one thing that a recipe must be able to do."""

    def __call__(
        self,
        images: NDArray[np.uint8],
        parameters: Mapping[str, Any],
        *,
        seed: int,
        device: torch.device,
        progress: Progress,
    ) -> nn.Module:
        """Fit to `images`, uint8 [n, 28, 28], and return the scoring module of the contract, ready to be scripted."""


def fit_article(
    images: NDArray[np.uint8],
    parameters: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> nn.Module:
    """Train an autoencoder as the founding article does: Adam on the mean squared error, shuffled every epoch.

    Args:
        images: normal images, uint8 [n, 28, 28].
        parameters: `autoencoder`, `input_range`, `learning_rate`, `batch_size`, `epochs`.
        seed: of the weights and of the order; the same seed on the same machine gives the same weights.
        device: where to train.
        progress: is told every epoch's loss.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    # The generators of the caller are left as they were; weights are drawn on the CPU, the same for every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scoring = ScaledScoring(AUTOENCODERS[parameters["autoencoder"]](), *parameters["input_range"]).to(device)
    shuffle = torch.Generator().manual_seed(seed)
    inputs = scoring.scale(torch.from_numpy(np.ascontiguousarray(images)).unsqueeze(1).to(device))
    optimiser = torch.optim.Adam(scoring.parameters(), lr=parameters["learning_rate"])
    scoring.train()
    for epoch in range(1, parameters["epochs"] + 1):
        order = torch.randperm(len(inputs), generator=shuffle).to(device)
        loss = _epoch(scoring.autoencoder, optimiser, inputs, torch.split(order, parameters["batch_size"]))
        if not np.isfinite(loss):
            raise TrainingError(f"the loss is {loss} after epoch {epoch}: try a lower learning rate")
        progress(epoch, loss)
    return scoring.eval()


def _epoch(
    autoencoder: nn.Module, optimiser: torch.optim.Optimizer, inputs: torch.Tensor, batches: tuple[torch.Tensor, ...]
) -> float:
    total = torch.zeros((), device=inputs.device)
    for positions in batches:
        batch = inputs[positions]
        optimiser.zero_grad(set_to_none=True)
        loss = nn.functional.mse_loss(autoencoder(batch), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        total += loss.detach() * len(positions)
    return float(total) / len(inputs)
