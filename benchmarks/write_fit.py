"""Draw digits in scenes, prepare them with `fit=mnist`, judge them, and write the tables of docs/fit.md.

python -m benchmarks.write_fit --data-dir FOLDER_OF_MNIST
"""

from __future__ import annotations

import argparse
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from app.images.fit import fit
from app.inference.detector import Detector
from app.models.repository import Repository
from app.problems import InvalidImage
from benchmarks.scenes import REFUSALS, SCENES, Scene
from training.data.loaders import load

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "fit.md"
BEGIN, END = "<!-- scenes -->", "<!-- end of scenes -->"
ALPHAS = (0.01, 0.05)
MAX_PIXELS = 1 << 22
Digits = NDArray[np.uint8]


class Judge:
    """The current version of a model, at two false-positive rates."""

    def __init__(self, store: Path, name: str) -> None:
        repository = Repository(store)
        artifact = repository.open(name, repository.current(name) or 0)
        self.thresholds = np.array([artifact.calibration.threshold(alpha) for alpha in ALPHAS])
        self._detector = Detector.load(artifact, torch.device("cpu"), (1,))

    def anomalous(self, digits: Digits) -> NDArray[np.bool_]:
        """Return whether each digit, uint8 [n, 28, 28], is anomalous at each rate: bool [n, 2]."""
        if not len(digits):
            return np.zeros((0, len(ALPHAS)), np.bool_)
        found = self._detector.detect(np.ascontiguousarray(digits[:, None]))
        return found.mse.astype(float)[:, None] > self.thresholds


@dataclass
class Outcome:
    """What became of the digits of one scene.

    Attributes:
        normal, lost: zeros whose original is normal and that were scored, and how many of them became anomalous.
        strange, passed: the same of other digits whose original is anomalous, and how many became normal.
        refused: number of refused zeros and of refused others.
        reasons: how often each reason was given.
    """

    normal: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    strange: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)
    refused: tuple[int, int] = (0, 0)
    reasons: Counter[str] = field(default_factory=Counter)
    lost_at: list[int] = field(default_factory=list)
    refused_at: list[int] = field(default_factory=list)


def fitted(scene: Scene, name: str, digits: Digits, seed: int) -> tuple[Digits, NDArray[np.bool_], list[str]]:
    """Return what `fit` makes of digits in a scene, which of them it took, and the reasons for the others."""
    planes, taken, reasons = np.zeros_like(digits), np.ones(len(digits), np.bool_), []
    for at, digit in enumerate(digits):
        try:
            planes[at] = np.frombuffer(
                fit(scene(digit, generator(name, seed, at)), MAX_PIXELS).pixels, np.uint8
            ).reshape(28, 28)
        except InvalidImage as error:
            taken[at] = False
            reasons.append(f"{error.type.removeprefix('/problems/')}: {error.detail}")
    return planes, taken, reasons


def generator(name: str, seed: int, at: int) -> np.random.Generator:
    """Return the random generator of one digit in one scene."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), at])


def outcome(judge: Judge, scene: Scene, name: str, zeros: Digits, others: Digits, seed: int) -> Outcome:
    """Return what becomes of zeros and of other digits in a scene."""
    result = Outcome()
    refused = []
    for digits, wanted in ((zeros, False), (others, True)):
        planes, taken, reasons = fitted(scene, name, digits, seed)
        before, after = judge.anomalous(digits), judge.anomalous(planes)
        for rate in range(len(ALPHAS)):
            counted = taken & (before[:, rate] == wanted)
            changed = counted & (after[:, rate] != wanted)
            (result.strange if wanted else result.normal).append(int(counted.sum()))
            (result.passed if wanted else result.lost).append(int(changed.sum()))
            if rate == 0:
                result.lost_at += [int(each) + (1000 if wanted else 0) for each in np.flatnonzero(changed)]
        result.refused_at += [int(each) + (1000 if wanted else 0) for each in np.flatnonzero(~taken)]
        refused.append(int((~taken).sum()))
        result.reasons.update(reasons)
    result.refused = refused[0], refused[1]
    return result
