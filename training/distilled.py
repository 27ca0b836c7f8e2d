"""The recipe `distilled`: one small network that redraws as a large one and a memory do on average.

Knows: who teaches whom. Does not know: data sets, export, the model store.

The idea: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015. A network and a memory are
wrong in different places; their average is better than either, and a smaller network can learn it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.deep import Class, Lesson, stroke_lesson, teach
from training.memory import Memory
from training.scoring import StandardisedScoring, rounded
from training.standardisation import CHUNK
from training.train import Progress


def fit_distilled(
    images: NDArray[np.uint8],
    parameters: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> nn.Module:
    """Train a teacher as `deep` does, fit a memory as `instant` does, and teach a student what both make of damage.

    Args:
        images: normal images, uint8 [n, 28, 28].
        parameters: those of `deep`, of which `widths` are the student's and `epochs` are divided evenly between
            teacher and student, and `teacher_widths`, `neighbours`, `penalty`.
        seed: of the weights, the damage and the order.
        device: where to train.
        progress: is told every epoch's mean squared error, the teacher's epochs before the student's.

    Raises:
        TrainingError: a loss is no longer finite.
    """
    class_ = Class.of(images, parameters, device)
    first = parameters["epochs"] // 2
    teacher = class_.autoencoder(parameters["teacher_widths"], parameters["brush"], seed)
    teach(teacher, class_.standardise, class_.pixels, {**parameters, "epochs": first}, seed=seed, progress=progress)
    memory = Memory(class_.subspace(class_.features), parameters["neighbours"], parameters["penalty"])

    def redrawn(features: Tensor) -> Tensor:
        recalled = class_.subspace.back(memory(class_.subspace(features)))
        answer: Tensor = (teacher(features)[0] + recalled) / 2
        return answer

    def lesson(standardise: nn.Module, pixels: Tensor, chance: torch.Generator, damage: Mapping[str, float]) -> Lesson:
        damaged, _, drawings = stroke_lesson(standardise, pixels, chance, damage)
        with torch.no_grad():
            return damaged, torch.cat([redrawn(part) for part in torch.split(damaged, CHUNK)]), drawings

    student = class_.autoencoder(parameters["widths"], parameters["brush"], seed)
    rest = {**parameters, "epochs": parameters["epochs"] - first}
    teach(
        student, class_.standardise, class_.pixels, rest,
        seed=seed, progress=lambda epoch, loss: progress(first + epoch, loss), make_lesson=lesson,
    )  # fmt: skip
    return StandardisedScoring(class_.standardise, rounded(student), **parameters["guards"]).eval()
