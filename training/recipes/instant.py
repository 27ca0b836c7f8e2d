"""The recipe `instant`: principal components and a memory of the training images, fitted without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.networks.memory import Memory, MemoryAutoencoder
from training.networks.scoring import REASONS, SCORE_SPACE, StandardisedScoring, rounded
from training.recipes import standardised
from training.recipes.contract import Progress, Recipe
from training.recipes.standardised import NormalClass


def fit_instant(
    images: NDArray[np.uint8],
    parameters: Mapping[str, Any],
    *,
    seed: int,  # noqa: ARG001 - part of the contract; this recipe is deterministic
    device: torch.device,
    progress: Progress,  # noqa: ARG001 - part of the contract; this recipe has no epochs
) -> nn.Module:
    """Store the principal coefficients of normal images as the memory of an autoencoder.

    Args:
        images: normal images, uint8 [n, 28, 28].
        parameters: `standardisation`, `guards`, `components`, `neighbours`, `penalty`.
        seed: not used.
        device: device to fit on.
        progress: not used.
    """
    normal = NormalClass.of(images, parameters, device)
    coefficients = normal.subspace(normal.features)
    memory = Memory(coefficients, parameters["neighbours"], parameters["penalty"])
    decoder = _pixel_decoder(coefficients, normal.pixels.flatten(1))
    autoencoder = MemoryAutoencoder(normal.subspace, memory, decoder)
    return StandardisedScoring(normal.standardise, rounded(autoencoder), **parameters["guards"]).eval()


def _pixel_decoder(coefficients: Tensor, pixels: Tensor) -> nn.Linear:
    """Return the ridge regression from coefficients [n, K] to pixels [n, 784].

    The penalty is far below the variance of any component. It makes the solution unique if there are fewer images
    than components.
    """
    design = torch.cat([coefficients, torch.ones_like(coefficients[:, :1])], dim=1).double()
    ridge = 1e-3 * len(design) * torch.eye(design.shape[1], dtype=design.dtype, device=design.device)
    weights = torch.linalg.solve(design.T @ design + ridge, design.T @ pixels.double()).float()
    decoder = nn.Linear(coefficients.shape[1], pixels.shape[1], device="meta")
    decoder.load_state_dict({"weight": weights[:-1].T.contiguous(), "bias": weights[-1]}, assign=True)
    return decoder


INSTANT = Recipe(
    name="instant",
    summary="a blend of the 40 nearest training images, between 128 principal components; deterministic",
    fit=fit_instant,
    parameters={**standardised.PARAMETERS, "neighbours": 40, "penalty": 200.0},
    score_space=SCORE_SPACE,
    reasons=REASONS,
)
