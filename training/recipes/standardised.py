"""The common part of recipes in the standardised space: parameters, features and principal components of a class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.networks.components import PrincipalComponents, principal_components
from training.networks.gradients import OrientedGradients, in_chunks

PARAMETERS: Mapping[str, Any] = {
    "standardisation": {"directions": 6, "cells": 14, "edge_sigma": 0.7, "pool_sigma": 1.7},
    # Ink of MNIST: at least 19.9 for a digit, 4 at a fifth of its contrast, and at most 312 for a zero.
    "guards": {"least_ink": 3.0, "most_ink": 400.0, "guard_error": 4.0},
    "components": 128,
}


@dataclass(frozen=True)
class NormalClass:
    """The normal images in the forms that recipes train on.

    Attributes:
        standardise: module from pixels to features.
        pixels: normal images, float32 [n, 28, 28] in 0..1, on the device.
        features: their features, float32 [n, F].
        subspace: principal components of the features.
    """

    standardise: OrientedGradients
    pixels: Tensor
    features: Tensor
    subspace: PrincipalComponents

    @staticmethod
    def of(images: NDArray[np.uint8], parameters: Mapping[str, Any], device: torch.device) -> NormalClass:
        """Standardise images, uint8 [n, 28, 28], with the parameters `standardisation` and `components`."""
        standardise = OrientedGradients(**parameters["standardisation"]).to(device)
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).to(torch.float32) / 255.0
        features = in_chunks(standardise, pixels)
        return NormalClass(standardise, pixels, features, principal_components(features, parameters["components"]))
