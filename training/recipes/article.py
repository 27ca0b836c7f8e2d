"""The recipes `article` and `deeper`: the founding article's training loop around two convolutional autoencoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.networks.autoencoders import AUTOENCODERS, ScaledScoring
from training.recipes.contract import Progress, Recipe, TrainingError


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
        seed: seed of the initial weights and the order; the same seed on the same machine gives the same weights.
        device: device to train on.
        progress: callback for each epoch.

    Raises:
        TrainingError: the loss is not finite.
    """
    # Weights are drawn on the CPU, so that they are the same for every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scoring = ScaledScoring(AUTOENCODERS[parameters["autoencoder"]](), *parameters["input_range"]).to(device)
    generator = torch.Generator().manual_seed(seed)
    inputs = scoring.scale(torch.from_numpy(np.ascontiguousarray(images)).unsqueeze(1).to(device))
    optimiser = torch.optim.Adam(scoring.parameters(), lr=parameters["learning_rate"])
    scoring.train()
    for epoch in range(1, parameters["epochs"] + 1):
        order = torch.randperm(len(inputs), generator=generator).to(device)
        loss = _train_epoch(scoring.autoencoder, optimiser, inputs, torch.split(order, parameters["batch_size"]))
        if not np.isfinite(loss):
            raise TrainingError(f"the loss is {loss} after epoch {epoch}; try a lower learning rate")
        progress(epoch, loss)
    return scoring.eval()


def _train_epoch(
    autoencoder: nn.Module, optimiser: torch.optim.Optimizer, inputs: torch.Tensor, batches: tuple[torch.Tensor, ...]
) -> float:
    """Return the mean loss of one epoch."""
    total = torch.zeros((), device=inputs.device)
    for indices in batches:
        batch = inputs[indices]
        optimiser.zero_grad(set_to_none=True)
        loss = nn.functional.mse_loss(autoencoder(batch), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        total += loss.detach() * len(indices)
    return float(total) / len(inputs)


ARTICLE = Recipe(
    name="article",
    summary="the founding article's autoencoder: two convolutions, a code of 196 numbers, trained to copy its input",
    fit=fit_article,
    parameters={
        "autoencoder": "article",
        "input_range": [-1.0, 1.0],
        "learning_rate": 1e-3,
        "batch_size": 50,
        "epochs": 30,
    },
    score_space="pixels scaled to -1..1, against a reconstruction in 0..1",
    split="article",
)

DEEPER = replace(
    ARTICLE,
    name="deeper",
    summary="the article's training loop with a third convolution stage and a code of 128 numbers",
    # With a background of -1 the sigmoid saturates in the first epoch, and every reconstruction is black.
    parameters={**ARTICLE.parameters, "autoencoder": "deeper", "input_range": [0.0, 1.0]},
    score_space="pixels scaled to 0..1",
)
