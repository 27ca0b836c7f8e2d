"""Try a second, local signal on the development split: `python -m benchmarks.local_signal --data-dir FOLDER_OF_MNIST`.

Each cell of the error map is measured in units of its own spread over normal images; the local signal is the maximum
over a window. It is combined with the mean error to one score: the larger of both, each divided by its own quantile
over normal images. The quantiles and spreads come from one half of the held-out normal images or from the training
images; the other half gives false-positive rates and carries the defects. No test image is read.

Writes benchmarks/results/local-signal.json and prints the tables of research/experiments.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.inference.detector import Detector
from app.models.repository import Repository
from benchmarks import further
from training.data.dataset import Dataset
from training.data.loaders import load
from training.data.splits import SPLITS
from training.recipes.instant import INSTANT

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "local-signal.json"
HALVINGS = 5
"""Number of random halves of the held-out normal images, seeds 0 to 4; figures are means over them."""
ALPHA = 0.01
Images = NDArray[np.uint8]


def whole_line(image: Images, _: np.random.Generator) -> Images:
    """Draw a vertical line of one pixel from top to bottom."""
    image[:, 14] = 255
    return image


DEFECTS = {**further.DEFECTS, "line from top to bottom": whole_line}
Maps = NDArray[np.float32]
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Figures:
    """Error maps of one normal digit, float32 [n, cells, cells].

    Attributes:
        trained: of the training images.
        held: of the held-out normal images.
        others: of the other digits.
        defects: of the held-out normal images with a defect, by its name.
    """

    trained: Maps
    held: Maps
    others: Maps
    defects: dict[str, Maps]


@dataclass(frozen=True)
class Local:
    """A way to measure the local signal and to combine it.

    Attributes:
        unit: what a cell is divided by: `deviation`, `mean`, or `level`, its own 99th percentile; `excess` subtracts
            the mean before it divides by the deviation.
        window: side of the window that cells are averaged over.
        floor: minimum unit, as a share of the mean unit of all cells.
        share: part of the false-positive rate that the local signal gets. 1: the local signal alone.
        trained: whether spreads come from the training images, not from held-out ones.
    """

    unit: str = "deviation"
    window: int = 1
    floor: float = 0.1
    share: float = 0.5
    trained: bool = False

    def scores(self, normal: Maps) -> Callable[[Maps], Scores]:
        """Return the function from error maps to combined scores, with spreads and quantiles of normal images."""
        middle = normal.mean(0) if self.unit == "excess" else np.zeros(normal.shape[1:])
        unit = {"mean": normal.mean, "level": lambda axis: np.quantile(normal, 0.99, axis=axis)}.get(
            self.unit, normal.std
        )(0)
        unit = np.maximum(unit, self.floor * unit.mean())

        def local(maps: Maps) -> Scores:
            cells = np.lib.stride_tricks.sliding_window_view((maps - middle) / unit, (self.window,) * 2, (1, 2))
            highest: Scores = cells.mean((3, 4)).max((1, 2))
            return highest

        if self.share == 1:
            return local
        mean_level = np.quantile(normal.mean((1, 2)), 1 - (1 - self.share) * ALPHA)
        local_level = np.quantile(local(normal), 1 - self.share * ALPHA)
        return lambda maps: np.maximum(maps.mean((1, 2)) / mean_level, local(maps) / local_level)


@dataclass(frozen=True)
class Worst:
    """The mean over the cells with the largest errors.

    Attributes:
        cells: their share of all cells.
        in_units: whether each cell is divided by its deviation first, at least half the mean deviation.
    """

    cells: float = 1.0
    in_units: bool = False
    trained: bool = False

    def scores(self, normal: Maps) -> Callable[[Maps], Scores]:
        """Return the function from error maps to scores, with the deviations of normal images."""
        deviation = normal.std(0)
        unit = np.maximum(deviation, 0.5 * deviation.mean()) if self.in_units else np.ones_like(deviation)

        def worst(maps: Maps) -> Scores:
            cells = np.sort((maps / unit).reshape(len(maps), -1), axis=1)
            mean: Scores = cells[:, -round(self.cells * cells.shape[1]) :].mean(1, dtype=np.float64)
            return mean

        return worst


VARIANTS: dict[str, Local | Worst] = {
    "mean error alone": Worst(),
    "mean of the worst half of the cells": Worst(0.5),
    "mean of the worst quarter of the cells": Worst(0.25),
    "mean of the worst eighth of the cells": Worst(0.125),
    "mean, cell / deviation": Worst(in_units=True),
    "mean of the worst quarter, cell / deviation": Worst(0.25, in_units=True),
    "local alone, cell / deviation": Local(share=1),
    "local alone, window of 2": Local(share=1, window=2),
    "local alone, window of 3": Local(share=1, window=3),
    "local alone, (cell - mean) / deviation": Local(share=1, unit="excess"),
    "local alone, cell / mean": Local(share=1, unit="mean"),
    "local alone, cell / 99th percentile": Local(share=1, unit="level"),
    "local alone, cell / deviation, floor 0.5": Local(share=1, floor=0.5),
    "local alone, cell / deviation, floor 0.02": Local(share=1, floor=0.02),
    "combined, cell / deviation": Local(),
    "combined, window of 2": Local(window=2),
    "combined, window of 3": Local(window=3),
    "combined, floor 0.5": Local(floor=0.5),
    "combined, floor 0.02": Local(floor=0.02),
    "combined, window of 2, floor 0.02": Local(window=2, floor=0.02),
    "combined, window of 3, floor 0.5": Local(window=3, floor=0.5),
    "combined, window of 3, floor 1": Local(window=3, floor=1.0),
    "combined, window of 3, floor 2": Local(window=3, floor=2.0),
    "combined, window of 5, floor 2": Local(window=5, floor=2.0),
    "combined, window of 3, floor 1, local rate 0.2 %": Local(window=3, floor=1.0, share=0.2),
    "combined, local rate 0.2 %": Local(share=0.2),
    "combined, window of 2, local rate 0.2 %": Local(window=2, share=0.2),
    "combined, spreads of the training images": Local(trained=True),
    "combined, window of 3, floor 1, spreads of the training images": Local(window=3, floor=1.0, trained=True),
    "combined, floor 0.2, spreads of the training images": Local(floor=0.2, trained=True),
    "combined, floor 0.2, local rate 0.2 %, spreads of the training images": Local(floor=0.2, share=0.2, trained=True),
    "combined, floor 0.2, local rate 0.8 %, spreads of the training images": Local(floor=0.2, share=0.8, trained=True),
    "combined, window of 2, spreads of the training images": Local(window=2, trained=True),
    "combined, window of 2, local rate 0.2 %, spreads of the training images": Local(window=2, share=0.2, trained=True),
}


def maps_of(module: Callable[[torch.Tensor], Any], images: Images) -> Maps:
    """Return the error maps of images, uint8 [n, 28, 28], one value per cell: float32 [n, 14, 14]."""
    with torch.inference_mode():
        parts = [module(part)[2][:, ::2, ::2] for part in torch.from_numpy(images)[:, None].split(256)]
    return torch.cat(parts).numpy()


def figures(data: Dataset, digit: int, store: Path | None) -> Figures:
    """Return the error maps of a digit, by the shipped module if a model store is given, else by `instant`."""
    assert data.test_start is not None
    split = SPLITS["standard"](data, (digit,), 0)
    train, held = data.images[split.train], data.images[split.calibration]
    if store:
        repository = Repository(store)
        detector = Detector.load(repository.open("zero", repository.current("zero") or 0), torch.device("cpu"))

        def module(images: torch.Tensor) -> Any:
            found = detector.detect(images.numpy())
            return None, None, torch.from_numpy(found.error_map)
    else:
        module = INSTANT.fit(
            train, INSTANT.parameters, seed=0, device=torch.device("cpu"), progress=lambda _epoch, _loss: None
        )
    labels = data.labels[: data.test_start]
    others = np.concatenate([np.flatnonzero(labels == other)[:300] for other in range(10) if other != digit])
    rng = np.random.default_rng(0)
    return Figures(
        maps_of(module, train),
        maps_of(module, held),
        maps_of(module, data.images[others]),
        {
            name: maps_of(module, np.stack([change(each.copy(), rng) for each in held]))
            for name, change in DEFECTS.items()
        },
    )


def recalls(found: Figures, variant: Local | Worst) -> dict[str, float]:
    """Return the recall in % at equal false-positive rates of 1 %, mean over the halvings, by kind of anomaly."""
    kinds: dict[str, list[float]] = {}
    for seed in range(HALVINGS):
        order = np.random.default_rng(seed).permutation(len(found.held))
        first, second = np.array_split(order, 2)
        score = variant.scores(found.trained if variant.trained else found.held[first])
        threshold = np.quantile(score(found.held[second]), 1 - ALPHA, method="higher")
        for name, maps in (
            ("other digits", found.others),
            *((name, maps[second]) for name, maps in found.defects.items()),
        ):
            kinds.setdefault(name, []).append(100 * float((score(maps) > threshold).mean()))
    return {name: float(np.mean(values)) for name, values in kinds.items()}


def main() -> None:
    """Try every variant, write the figures and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's files")
    parser.add_argument("--model-store", type=Path, default=ROOT / "model_store")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = load("mnist", given.data_dir)
    sets = {"zero": figures(data, 0, given.model_store)}
    sets |= {f"instant {digit}": figures(data, digit, None) for digit in range(10)}
    result = {of: {name: recalls(maps, variant) for name, variant in VARIANTS.items()} for of, maps in sets.items()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    kinds = ["other digits", *DEFECTS]
    print("\n".join(table(kinds, {name: [result["zero"][name][kind] for kind in kinds] for name in VARIANTS})))
    tens = {
        name: [float(np.mean([result[f"instant {digit}"][name][kind] for digit in range(10)])) for kind in kinds]
        for name in VARIANTS
    }
    print("\n" + "\n".join(table(kinds, tens)))


def table(kinds: list[str], rows: dict[str, list[float]]) -> list[str]:
    """Return the lines of a Markdown table with one row per variant."""
    lines = [f"| score | {' | '.join(kinds)} |", "| --- |" + " ---: |" * len(kinds)]
    return lines + [f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |" for name, values in rows.items()]


if __name__ == "__main__":
    main()
