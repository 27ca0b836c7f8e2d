"""The recipe `deep`: a dense denoising autoencoder between principal components."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from app.models.manifest import LOCAL
from training.networks.autoencoders import DenseAutoencoder
from training.networks.gradients import CHUNK, in_chunks
from training.networks.local import LocalSignal
from training.networks.scoring import REASONS, SCORE_SPACE, StandardisedScoring, rounded
from training.recipes import standardised
from training.recipes.contract import Progress, Recipe, TrainingError
from training.recipes.damage import augmented, corrupted
from training.recipes.standardised import NormalClass

_CHUNK = 8192
"""Number of images that are corrupted at a time. It limits the memory for a large normal class."""

EpochData = tuple[Tensor, Tensor, Tensor]
"""Corrupted features [n, F], clean features [n, F], clean pixels [n, 784]."""
MakeEpochData = Callable[[nn.Module, Tensor, torch.Generator, Mapping[str, float]], EpochData]
"""Function from the standardisation, pixels [n, 28, 28], a generator and `damage` to the data of one epoch."""


def fit_deep(
    images: NDArray[np.uint8],
    parameters: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> nn.Module:
    """Train an autoencoder to reconstruct clean images from corrupted ones; the corruption is new in every epoch.

    Args:
        images: normal images, uint8 [n, 28, 28].
        parameters: `standardisation`, `guards`, `components`, `widths`, `brush`, `damage`, `precision`,
            `learning_rate`, `weight_decay`, `batch_size`, `epochs`, and optionally `local`. `brush` is the hidden width
            of the pixel decoder. The precision `bfloat16` is used on devices that multiply in it, and float32
            elsewhere: the loss is the same to four digits. `local` adds the signal of `training.networks.local`.
        seed: seed of the weights, the corruption and the order.
        device: device to train on.
        progress: callback for each epoch; the loss is the mean squared error in the standardised space.

    Raises:
        TrainingError: the loss is not finite.
    """
    normal = NormalClass.of(images, parameters, device)
    # Weights are drawn on the CPU, so that they are the same for every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = DenseAutoencoder(normal.subspace, parameters["widths"], parameters["brush"]).to(device)
    train_denoising(autoencoder, normal.standardise, normal.pixels, parameters, seed=seed, progress=progress)
    scoring = StandardisedScoring(normal.standardise, rounded(autoencoder), **parameters["guards"]).eval()
    if "local" in parameters:
        scoring.local = LocalSignal.of(_errors(scoring, images, device), **parameters["local"])
    return scoring


def _errors(scoring: StandardisedScoring, images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Return the squared errors of images, uint8 [n, 28, 28], per cell: float32 [n, cells, cells]."""
    step = images.shape[1] // scoring.cells
    with torch.inference_mode():
        chunks = torch.split(torch.from_numpy(np.ascontiguousarray(images))[:, None], CHUNK)
        return torch.cat([scoring(chunk.to(device))[2][:, ::step, ::step] for chunk in chunks]).clone()


def corrupt_strokes(
    standardise: nn.Module, pixels: Tensor, generator: torch.Generator, damage: Mapping[str, float]
) -> EpochData:
    """Augment every image, and corrupt the result by `training.recipes.damage.corrupted`."""
    chunks: list[EpochData] = []
    for chunk in torch.split(pixels, _CHUNK):
        clean = augmented(chunk, generator)
        noisy = corrupted(clean, generator, **damage).clamp_min(0.0)
        chunks.append((in_chunks(standardise, noisy), in_chunks(standardise, clean), clean.flatten(1)))
    inputs, targets, target_pixels = (torch.cat(each) for each in zip(*chunks, strict=True))
    return inputs, targets, target_pixels


def train_denoising(
    autoencoder: nn.Module,
    standardise: nn.Module,
    pixels: Tensor,
    parameters: Mapping[str, Any],
    *,
    seed: int,
    progress: Progress,
    make_epoch_data: MakeEpochData = corrupt_strokes,
) -> None:
    """Train an autoencoder in place on data that are new in every epoch, then freeze it.

    Args:
        autoencoder: module from features [N, F] to their reconstruction and to pixels [N, 784] in 0..1.
        standardise: module from pixels to features.
        pixels: normal images, float32 [n, 28, 28] in 0..1, on the device of the autoencoder.
        parameters: as for `fit_deep`; `damage` is passed to `make_epoch_data`.
        seed: seed of the corruption and the order.
        progress: callback for each epoch; the loss is the mean squared error in the standardised space.
        make_epoch_data: corruption process.

    Raises:
        TrainingError: the loss is not finite.
    """
    device = pixels.device
    generator = torch.Generator(device).manual_seed(seed)
    bfloat16 = parameters["precision"] == "bfloat16" and supports_bfloat16(device)
    optimiser = torch.optim.AdamW(
        autoencoder.parameters(), lr=parameters["learning_rate"], weight_decay=parameters["weight_decay"]
    )
    steps = parameters["epochs"] * math.ceil(len(pixels) / parameters["batch_size"])
    # With exactly ten steps the warm-up has one step, and OneCycleLR divides by zero.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, parameters["learning_rate"], total_steps=steps + (steps == 10), pct_start=0.1
    )
    for epoch in range(1, parameters["epochs"] + 1):
        data = make_epoch_data(standardise, pixels, generator, parameters["damage"])
        order = torch.randperm(len(pixels), generator=generator, device=device)
        batches = torch.split(order, parameters["batch_size"])
        loss = _train_epoch(autoencoder, data, batches, optimiser=optimiser, schedule=schedule, bfloat16=bfloat16)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} after epoch {epoch}; try a lower learning rate")
        progress(epoch, loss)
    autoencoder.requires_grad_(requires_grad=False)


def supports_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware; emulation is five times as slow as float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(present for name, present in torch.cpu.get_capabilities().items() if "bf16" in name)


def _train_epoch(
    autoencoder: nn.Module,
    data: EpochData,
    batches: tuple[Tensor, ...],
    *,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    bfloat16: bool,
) -> float:
    """Return the mean squared error of one epoch in the standardised space."""
    inputs, targets, target_pixels = data
    total = torch.zeros((), device=inputs.device)
    for indices in batches:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bfloat16):
            features, pixels = autoencoder(inputs[indices])
        feature_loss = functional.mse_loss(features.to(torch.float32), targets[indices])
        pixel_loss = functional.mse_loss(pixels.to(torch.float32), target_pixels[indices])
        optimiser.zero_grad(set_to_none=True)
        (feature_loss + pixel_loss).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        total += feature_loss.detach() * len(indices)
    return float(total) / len(inputs)


DEEP = Recipe(
    name="deep",
    summary="a dense denoising autoencoder between 128 principal components",
    fit=fit_deep,
    parameters={
        **standardised.PARAMETERS,
        "widths": [512, 256, 64],
        "brush": 256,
        "damage": {"gain": 0.5, "loss": 0.5, "noise": 0.1},
        "precision": "bfloat16",
        "learning_rate": 2e-3,
        "weight_decay": 1e-3,
        "batch_size": 256,
        "epochs": 200,
    },
    score_space=SCORE_SPACE,
    reasons=REASONS,
)

DEEP_LOCAL = replace(
    DEEP,
    name="deep-local",
    summary="`deep` with a second, local signal for small defects",
    parameters={**DEEP.parameters, "local": {"window": 1, "floor": 0.2, "share": 0.5, "alpha": 0.01}},
    score_space=f"{SCORE_SPACE}; the mean, or the largest cell in units of its own spread",
    reasons=(*REASONS, LOCAL),
)
