"""The recipe `deep`: a dense autoencoder between principal components that learns to undo damage.

Knows: its lesson and its optimisation. Does not know: data sets, export, the model store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from training.networks.autoencoders import DenseAutoencoder
from training.networks.components import PrincipalComponents, principal_components
from training.networks.gradients import OrientedGradients, in_chunks
from training.networks.scoring import StandardisedScoring, rounded
from training.recipes.article import Progress, TrainingError
from training.recipes.damage import another_hand, damaged

_PART = 8192
"""Images damaged at a time: bounds the memory where the normal class is large."""


def fit_deep(
    images: NDArray[np.uint8],
    parameters: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> nn.Module:
    """Train an autoencoder to redraw damaged images undamaged; the damage is made afresh every epoch.

    Args:
        images: normal images, uint8 [n, 28, 28].
        parameters: `standardisation`, `guards`, `components`, `widths`, `brush`, `damage`, `precision`,
            `learning_rate`, `weight_decay`, `batch_size`, `epochs`. The precision `bfloat16` is used where the device
            multiplies in it, and float32 elsewhere: the loss is the same to four digits.
        seed: of the weights, the damage and the order.
        device: where to train.
        progress: is told every epoch's mean squared error in the standardised space.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    class_ = Class.of(images, parameters, device)
    autoencoder = class_.autoencoder(parameters["widths"], parameters["brush"], seed)
    teach(autoencoder, class_.standardise, class_.pixels, parameters, seed=seed, progress=progress)
    return StandardisedScoring(class_.standardise, rounded(autoencoder), **parameters["guards"]).eval()


@dataclass(frozen=True)
class Class:
    """The normal class as the networks see it.

    Attributes:
        standardise: pixels to features.
        pixels: of the normal images, float32 [n, 28, 28] in 0..1, on the device.
        features: the same standardised, float32 [n, F].
        subspace: their principal components.
    """

    standardise: OrientedGradients
    pixels: Tensor
    features: Tensor
    subspace: PrincipalComponents

    @staticmethod
    def of(images: NDArray[np.uint8], parameters: Mapping[str, Any], device: torch.device) -> Class:
        """Standardise images, uint8 [n, 28, 28]; of `parameters`, `standardisation` and `components` are read."""
        standardise = OrientedGradients(**parameters["standardisation"]).to(device)
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).to(torch.float32) / 255.0
        features = in_chunks(standardise, pixels)
        return Class(standardise, pixels, features, principal_components(features, parameters["components"]))

    def autoencoder(self, widths: Sequence[int], brush: int, seed: int) -> DenseAutoencoder:
        """Return a fresh network between the components. Weights are drawn on the CPU, the same for every device."""
        # The generators of the caller are left as they were.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return DenseAutoencoder(self.subspace, widths, brush).to(self.pixels.device)


Lesson = tuple[Tensor, Tensor, Tensor]
"""Damaged features [n, F], clean features [n, F], clean pixels [n, 784]."""
MakeLesson = Callable[[nn.Module, Tensor, torch.Generator, Mapping[str, float]], Lesson]


def stroke_lesson(
    standardise: nn.Module, pixels: Tensor, chance: torch.Generator, damage: Mapping[str, float]
) -> Lesson:
    """Redraw every image as another hand might have, and damage its strokes by `training.recipes.damage`."""
    parts: list[Lesson] = []
    for part in torch.split(pixels, _PART):
        clean = another_hand(part, chance)
        worse = damaged(clean, chance, **damage).clamp_min(0.0)
        parts.append((in_chunks(standardise, worse), in_chunks(standardise, clean), clean.flatten(1)))
    damaged_features, features, drawings = (torch.cat(each) for each in zip(*parts, strict=True))
    return damaged_features, features, drawings


def teach(
    autoencoder: nn.Module,
    standardise: nn.Module,
    pixels: Tensor,
    parameters: Mapping[str, Any],
    *,
    seed: int,
    progress: Progress,
    make_lesson: MakeLesson = stroke_lesson,
) -> None:
    """Train an autoencoder in place, on a lesson made afresh every epoch, and freeze it.

    Args:
        autoencoder: features [N, F] to the same redrawn, and to pixels [N, 784] in 0..1.
        standardise: pixels to features.
        pixels: normal images, float32 [n, 28, 28] in 0..1, where the autoencoder is.
        parameters: as for `fit_deep`; `damage` is what `make_lesson` gets.
        seed: of the damage and the order.
        progress: is told every epoch's mean squared error in the standardised space.
        make_lesson: of the standardisation, the pixels, the chance and the damage.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    device = pixels.device
    chance = torch.Generator(device).manual_seed(seed)
    bfloat16 = parameters["precision"] == "bfloat16" and multiplies_bfloat16(device)
    optimiser = torch.optim.AdamW(
        autoencoder.parameters(), lr=parameters["learning_rate"], weight_decay=parameters["weight_decay"]
    )
    steps = parameters["epochs"] * math.ceil(len(pixels) / parameters["batch_size"])
    # A tenth of exactly ten steps is one, on which the scheduler divides by zero.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, parameters["learning_rate"], total_steps=steps + (steps == 10), pct_start=0.1
    )
    for epoch in range(1, parameters["epochs"] + 1):
        lesson = make_lesson(standardise, pixels, chance, parameters["damage"])
        order = torch.randperm(len(pixels), generator=chance, device=device)
        batches = torch.split(order, parameters["batch_size"])
        loss = _epoch(autoencoder, lesson, batches, optimiser=optimiser, schedule=schedule, bfloat16=bfloat16)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} after epoch {epoch}: try a lower learning rate")
        progress(epoch, loss)
    autoencoder.requires_grad_(requires_grad=False)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether a device has units that multiply bfloat16; one without takes five times as long as in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def _epoch(
    autoencoder: nn.Module,
    lesson: Lesson,
    batches: tuple[Tensor, ...],
    *,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    bfloat16: bool,
) -> float:
    inputs, targets, drawings = lesson
    total = torch.zeros((), device=inputs.device)
    for rows in batches:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bfloat16):
            redrawn, drawing = autoencoder(inputs[rows])
        error = functional.mse_loss(redrawn.to(torch.float32), targets[rows])
        unlike = functional.mse_loss(drawing.to(torch.float32), drawings[rows])
        optimiser.zero_grad(set_to_none=True)
        (error + unlike).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        total += error.detach() * len(rows)
    return float(total) / len(inputs)
