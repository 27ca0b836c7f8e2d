"""The recipe `instant`: principal components and a memory, fitted in a second, with nothing left to chance.

Knows: how they are fitted. Does not know: data sets, export, the model store.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.networks.components import principal_components
from training.networks.gradients import OrientedGradients, in_chunks
from training.networks.memory import Memory, MemoryAutoencoder
from training.networks.scoring import StandardisedScoring, rounded
from training.recipes.article import Progress


def fit_instant(
    images: NDArray[np.uint8],
    parameters: Mapping[str, Any],
    *,
    seed: int,  # noqa: ARG001 - the contract's; there is no chance in this recipe
    device: torch.device,
    progress: Progress,  # noqa: ARG001 - the contract's; there are no epochs either
) -> nn.Module:
    """Remember normal images between their principal components.

    Args:
        images: normal images, uint8 [n, 28, 28].
        parameters: `standardisation`, `guards`, `components`, `neighbours`, `penalty`.
        seed: not used.
        device: where to fit.
        progress: not used.
    """
    standardise = OrientedGradients(**parameters["standardisation"]).to(device)
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).to(torch.float32) / 255.0
    features = in_chunks(standardise, pixels)
    subspace = principal_components(features, parameters["components"])
    coefficients = subspace(features)
    memory = Memory(coefficients, parameters["neighbours"], parameters["penalty"])
    autoencoder = MemoryAutoencoder(subspace, memory, _painter(coefficients, pixels.flatten(1)))
    return StandardisedScoring(standardise, rounded(autoencoder), **parameters["guards"]).eval()


def _painter(coefficients: Tensor, pixels: Tensor) -> nn.Linear:
    # The linear map from coefficients [n, K] to pixels [n, 784] with the least squared error. The ridge, far below the
    # variance of any component, keeps it defined where there are fewer images than components.
    known = torch.cat([coefficients, torch.ones_like(coefficients[:, :1])], dim=1).double()
    ridge = 1e-3 * len(known) * torch.eye(known.shape[1], dtype=known.dtype, device=known.device)
    weights = torch.linalg.solve(known.T @ known + ridge, known.T @ pixels.double()).float()
    painter = nn.Linear(coefficients.shape[1], pixels.shape[1], device="meta")
    painter.load_state_dict({"weight": weights[:-1].T.contiguous(), "bias": weights[-1]}, assign=True)
    return painter
