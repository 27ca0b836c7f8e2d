"""Draw digits in scenes, prepare them with `fit=mnist`, judge them, and write the tables of docs/fit.md.

python -m benchmarks.write_fit --data-dir FOLDER_OF_MNIST
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
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
SEED = 20
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
            reasons.append(f"`{error.type.removeprefix('/problems/')}`: {re.sub('[0-9]+', 'N', error.detail)}")
    return planes, taken, reasons


def generator(name: str, seed: int, at: int) -> np.random.Generator:
    """Return the random generator of one digit in one scene."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), at])


def outcome(judge: Judge, scene: Scene, name: str, zeros: Digits, others: Digits, seed: int = SEED) -> Outcome:  # noqa: PLR0917
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


def _measured(name: str, store: Path, zeros: Digits, others: Digits) -> Outcome:
    torch.set_num_threads(1)
    scene = REFUSALS[name] if name in REFUSALS else SCENES[name][1]
    return outcome(Judge(store, "zero"), scene, name, zeros, others)


def _rows(outcomes: dict[str, Outcome], count: int) -> Iterator[str]:
    yield "| scene | kind | lost, 1 % | lost, 5 % | passed, 1 % | passed, 5 % | refused zeros | refused others |"
    yield "| --- | --- |" + " ---: |" * 6
    total = Outcome([0, 0], [0, 0], [0, 0], [0, 0])
    zeros = others = 0
    for name, (kind, _) in SCENES.items():
        found = outcomes[name]
        yield f"| {name} | {kind} | {_cells(found)} | {found.refused[0]} of {count} | {found.refused[1]} of {count} |"
        for rate in range(len(ALPHAS)):
            for sums, more in (
                (total.normal, found.normal),
                (total.lost, found.lost),
                (total.strange, found.strange),
                (total.passed, found.passed),
            ):
                sums[rate] += more[rate]
        zeros, others = zeros + found.refused[0], others + found.refused[1]
    drawn = count * len(SCENES)
    yield f"| **all** | | {_cells(total)} | {zeros} of {drawn} | {others} of {drawn} |"


def _cells(found: Outcome) -> str:
    pairs = [*zip(found.lost, found.normal, strict=True), *zip(found.passed, found.strange, strict=True)]
    return " | ".join(f"{part} of {whole}" for part, whole in pairs)


_REFUSALS_HEAD = "| scene without one whole digit | refused | reasons |"


def _refusals(outcomes: dict[str, Outcome], count: int) -> Iterator[str]:
    yield _REFUSALS_HEAD
    yield "| --- | ---: | --- |"
    for name in REFUSALS:
        found = outcomes[name]
        reasons = "<br>".join(f"{words} ({often})" for words, often in found.reasons.most_common())
        yield f"| {name} | {sum(found.refused)} of {2 * count} | {reasons} |"


def _reasons(outcomes: dict[str, Outcome]) -> Iterator[str]:
    yield "| refused in | times | reason |"
    yield "| --- | ---: | --- |"
    for name in SCENES:
        for words, often in outcomes[name].reasons.most_common():
            yield f"| {name} | {often} | {words} |"


def main() -> None:
    """Measure every scene on digits of MNIST's test file, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's files")
    parser.add_argument("--per-kind", type=int, default=100, help="number of zeros, and of other digits")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument(
        "--only-refusals", action="store_true", help="measure the scenes without one whole digit, and write their table"
    )
    parser.add_argument("--model-store", type=Path, default=ROOT / "model_store")
    arguments = parser.parse_args()
    data, count = load("mnist", arguments.data_dir), arguments.per_kind
    images, labels = data.images[data.test_start or 0 :], data.labels[data.test_start or 0 :]
    zeros, others = images[labels == 0][:count], images[labels != 0][:count]
    measured = partial(_measured, store=arguments.model_store, zeros=zeros, others=others)
    names = [*REFUSALS] if arguments.only_refusals else [*SCENES, *REFUSALS]
    with ProcessPoolExecutor(arguments.jobs) as processes:
        outcomes = dict(zip(names, processes.map(measured, names), strict=True))
    if arguments.only_refusals:
        rows = "\n".join(_refusals(outcomes, count))
        PAGE.write_text(
            re.sub(rf"{re.escape(_REFUSALS_HEAD)}.*?(?=\n\n)", lambda _: rows, PAGE.read_text(), flags=re.DOTALL)
        )
        print(rows)
        return
    text = "\n".join(
        [
            f"{count} zeros and {count} other digits, the first of MNIST's test file, in each scene; seed {SEED}.",
            "",
            *_rows(outcomes, count),
            "",
            *_refusals(outcomes, count),
            "",
            *_reasons(outcomes),
        ]
    )
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
    print(text)


if __name__ == "__main__":
    main()
