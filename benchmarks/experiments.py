"""Try other networks and lessons in the standardised space: `python -m benchmarks.experiments`.

The development split of research/experiments.md and nothing else: no test image is read. Writes the figures of each
variant and digit, and what an image costs, to benchmarks/results/variants.json, for research/experiments.md and the
plot of quality against cost. About a minute of one core for a variant and a digit; DATA_DIR names the folder of MNIST.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from app.inference.detector import torchscript_allowed
from benchmarks.processes import ROOT
from training.data.loaders import load
from training.networks.autoencoders import ArticleAutoencoder, DenseAutoencoder, ScaledScoring
from training.networks.components import PrincipalComponents, principal_components
from training.networks.gradients import OrientedGradients, in_chunks
from training.networks.reexpressed import ReexpressedArticle
from training.networks.scoring import StandardisedScoring, rounded
from training.recipes.damage import augmented
from training.recipes.deep import EpochData, MakeEpochData, corrupt_strokes, train_denoising
from training.recipes.instant import fit_instant
from training.recipes.table import RECIPES

RESULTS = ROOT / "benchmarks" / "results" / "variants.json"
DEEP = RECIPES["deep"].parameters

MAPS = 6
Batch = np.ndarray[Any, np.dtype[np.uint8]]


class ConvolutionalAutoencoder(nn.Module):
    """Convolutions over the 6 maps of 14x14 cells, down to 7x7 and a dense code, and back."""

    def __init__(self, subspace: PrincipalComponents, channels: Sequence[int], code: int, *, project: bool) -> None:
        """`channels`: at 14x14 and at 7x7; `project`: keep of the redrawing only its principal components."""
        super().__init__()
        fine, coarse = channels
        self.subspace = subspace
        self.project = project
        self.encoder = nn.Sequential(
            nn.Conv2d(MAPS, fine, 3, padding=1), nn.SiLU(),
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1), nn.SiLU(),
            nn.Flatten(), nn.Linear(coarse * 49, code), nn.SiLU(),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(code, coarse * 49), nn.SiLU(), nn.Unflatten(1, (coarse, 7, 7)),
            nn.ConvTranspose2d(coarse, fine, 2, stride=2), nn.SiLU(),
            nn.Conv2d(fine, MAPS, 3, padding=1), nn.Flatten(),
        )  # fmt: skip
        self.pixel_decoder = nn.Sequential(nn.Linear(code, 256), nn.SiLU(), nn.Linear(256, 784), nn.Sigmoid())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Redraw features, float32 [N, F]; return them redrawn, and as pixels [N, 784] in 0..1."""
        code = self.encoder(features.view(-1, 6, 14, 14))
        redrawn = self.decoder(code)
        if self.project:
            redrawn = self.subspace.back(self.subspace(redrawn))
        return redrawn, self.pixel_decoder(code.detach())


class SlottedAutoencoder(DenseAutoencoder):
    """A dense autoencoder whose code is a blend of learned slots (MemAE: Gong et al., 2019)."""

    def __init__(self, subspace: PrincipalComponents, widths: Sequence[int], brush: int, slots: int) -> None:
        """`slots`: learned codes to blend."""
        super().__init__(subspace, widths, brush)
        self.slots = nn.Parameter(torch.randn(slots, widths[-1]) / widths[-1] ** 0.5)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Redraw features, float32 [N, F]; return them redrawn, and as pixels [N, 784] in 0..1."""
        query = self.encoder(self.subspace(features))
        near = functional.normalize(query, dim=1) @ functional.normalize(self.slots, dim=1).T
        code = torch.softmax(10.0 * near, dim=1) @ self.slots
        return self.subspace.back(self.decoder(code)), self.pixel_decoder(code.detach())


def masked_lesson(
    standardise: nn.Module, pixels: Tensor, generator: torch.Generator, _: Mapping[str, float]
) -> EpochData:
    """Hide two squares of 6 to 12 pixels of every image; the network learns to restore them."""
    clean = augmented(pixels, generator)
    hidden = torch.zeros_like(clean, dtype=torch.bool)
    line = torch.arange(28)
    for _square in range(2):
        sides = torch.randint(6, 13, (len(clean), 2), generator=generator)
        starts = (torch.rand((len(clean), 2), generator=generator) * (29 - sides)).long()
        inside = (line >= starts[:, :, None]) & (line < (starts + sides)[:, :, None])
        hidden |= inside[:, 0, :, None] & inside[:, 1, None, :]
    return in_chunks(standardise, clean.masked_fill(hidden, 0.0)), in_chunks(standardise, clean), clean.flatten(1)


def lesson_of(teachers: Sequence[nn.Module]) -> MakeEpochData:
    """Return a lesson whose answer is the mean of what teachers make of the damaged features."""

    def lesson(
        standardise: nn.Module, pixels: Tensor, generator: torch.Generator, damage: Mapping[str, float]
    ) -> EpochData:
        inputs, _, drawings = corrupt_strokes(standardise, pixels, generator, damage)
        with torch.inference_mode():
            answers = [torch.cat([teacher(part)[0] for part in inputs.split(512)]) for teacher in teachers]
        return inputs, torch.stack(answers).mean(dim=0).clone(), drawings

    return lesson


Make = Callable[["Bench"], nn.Module]


@dataclass
class Bench:
    """The data that the variants of one digit share.

    Attributes:
        images: training images, uint8 [n, 28, 28].
        epochs: number of epochs of variants that do not set their own.
        most_epochs: maximum number of epochs of a variant.
        made: trained networks that other variants reuse.
    """

    images: Batch
    epochs: int
    most_epochs: int = 1000
    made: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Standardise once."""
        self.standardise = OrientedGradients(**DEEP["standardisation"])
        self.pixels = torch.from_numpy(self.images).to(torch.float32) / 255.0
        self.subspace = principal_components(in_chunks(self.standardise, self.pixels), DEEP["components"])

    def taught(
        self, make: Callable[[], nn.Module], epochs: int = 0, lesson: MakeEpochData = corrupt_strokes, **other: Any
    ) -> nn.Module:
        """Return a new network after its lessons; seed 0."""
        torch.manual_seed(0)
        network = make()
        parameters = {**DEEP, "epochs": min(epochs or self.epochs, self.most_epochs), **other}
        train_denoising(
            network, self.standardise, self.pixels, parameters,
            seed=0, progress=lambda _epoch, _loss: None, make_epoch_data=lesson,
        )  # fmt: skip
        return network.requires_grad_(requires_grad=False).eval()

    def dense(self, *widths: int, epochs: int = 0, lesson: MakeEpochData = corrupt_strokes) -> nn.Module:
        """Return a dense autoencoder after its lessons."""
        return self.taught(lambda: DenseAutoencoder(self.subspace, widths, 256), epochs, lesson)

    def convolutional(self, *channels: int, code: int, **other: Any) -> nn.Module:
        """Return a convolutional autoencoder after its lessons."""
        return self.taught(lambda: ConvolutionalAutoencoder(self.subspace, channels, code, project=False), **other)

    def teacher(self) -> nn.Module:
        """Return a large network after long lessons."""
        if "teacher" not in self.made:
            self.made["teacher"] = self.dense(1024, 512, 128, epochs=100)
        return self.made["teacher"]


def projected(network: nn.Module) -> nn.Module:
    """Return a copy of a convolutional autoencoder that keeps only the principal components of its redrawing."""
    network = copy.deepcopy(network)
    network.project = True  # type: ignore[assignment]
    return network


def low_rank(network: nn.Module, rank: int) -> nn.Module:
    """Return a copy with every wide layer cut to its leading singular values, as two thinner layers."""
    network = copy.deepcopy(network)
    for stack in (network.encoder, network.decoder):
        assert isinstance(stack, nn.Sequential)
        for place, layer in enumerate(stack):
            if isinstance(layer, nn.Linear) and rank < min(layer.weight.shape) / 2:
                left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
                first, second = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)
                first.weight.data.copy_(values[:rank, None] * right[:rank])
                second.weight.data.copy_(left[:, :rank])
                second.bias.data.copy_(layer.bias)
                stack[place] = nn.Sequential(first, second)
    return network.requires_grad_(requires_grad=False)


def memory_of(bench: Bench) -> nn.Module:
    """Return the autoencoder of the recipe `instant`."""
    fitted = fit_instant(
        bench.images, RECIPES["instant"].parameters,
        seed=0, device=torch.device("cpu"), progress=lambda _epoch, _loss: None,
    )  # fmt: skip
    network = fitted.autoencoder
    assert isinstance(network, nn.Module)
    return network


VARIANTS: dict[str, Make] = {
    "memory (`instant`)": memory_of,
    "dense 1024-512-128": lambda bench: bench.dense(1024, 512, 128),
    "dense 512-256-64": lambda bench: bench.dense(512, 256, 64),
    "dense 512-256-64, 200 epochs": lambda bench: bench.dense(512, 256, 64, epochs=200),
    "dense 1024-512-256": lambda bench: bench.dense(1024, 512, 256),
    "convolutions 16, 32, code 128": lambda bench: bench.convolutional(16, 32, code=128),
    "convolutions 32, 64, code 128": lambda bench: bench.made.setdefault(
        "convolutional", bench.convolutional(32, 64, code=128)
    ),
    "convolutions 32, 64, projected on the components": lambda bench: projected(bench.made["convolutional"]),
    "convolutions 32, 64, code 128, learning rate 1e-3": lambda bench: bench.convolutional(
        32, 64, code=128, learning_rate=1e-3
    ),
    "masked inpainting, dense 1024-512-128": lambda bench: bench.dense(1024, 512, 128, lesson=masked_lesson),
    "128 learned slots, dense 1024-512-128": lambda bench: bench.taught(
        lambda: SlottedAutoencoder(bench.subspace, (1024, 512, 128), 256, 128)
    ),
    "dense 1024-512-128, 100 epochs": lambda bench: bench.teacher(),
    "large network, rank 128 of each wide layer": lambda bench: low_rank(bench.teacher(), 128),
    "large network, distilled into 512-256-64": lambda bench: bench.dense(
        512, 256, 64, epochs=100, lesson=lesson_of([bench.teacher()])
    ),
    "large network and memory, distilled into 512-256-64": lambda bench: bench.dense(
        512, 256, 64, epochs=100, lesson=lesson_of([bench.teacher(), memory_of(bench)])
    ),
    "large network and memory, distilled into 1024-512-128": lambda bench: bench.dense(
        1024, 512, 128, epochs=100, lesson=lesson_of([bench.teacher(), memory_of(bench)])
    ),
}


def split(digit: int) -> tuple[Batch, Batch, Batch]:
    """Return the development split of a digit: training, held-out normal and anomalous images, uint8 [n, 28, 28]."""
    folder = os.environ.get("DATA_DIR")
    found = load("mnist", Path(folder) if folder else None)
    if found.test_start is None:
        raise SystemExit("the development split is of MNIST's training file: name its folder in DATA_DIR")
    images, labels = found.images[: found.test_start], found.labels[: found.test_start]
    own = np.random.RandomState(0).permutation(np.flatnonzero(labels == digit))
    cut = int(0.8 * len(own))
    others = [np.flatnonzero(labels == other)[:300] for other in range(10) if other != digit]
    return images[own[:cut]], images[own[cut:]], images[np.concatenate(others)]


def judged(scoring: nn.Module, normals: Batch, anomalies: Batch) -> tuple[float, list[float]]:
    """Return AUROC and the shares of anomalies above the normals' 99th and 95th percentile, in %."""
    with torch.inference_mode():
        scores = [
            torch.cat([scoring(part)[0] for part in torch.from_numpy(some)[:, None].split(512)]).numpy()
            for some in (normals, anomalies)
        ]
    truth = np.repeat([0, 1], [len(normals), len(anomalies)])
    caught = [float(100 * (scores[1] > np.quantile(scores[0], level)).mean()) for level in (0.99, 0.95)]
    return 100 * float(roc_auc_score(truth, np.concatenate(scores))), caught


def tried(digit: int, names: Sequence[str], epochs: int) -> dict[str, Any]:
    """Make every variant for one digit, one after the other, on one thread."""
    torch.set_num_threads(1)
    learned, normals, anomalies = split(digit)
    bench, found = Bench(learned, epochs=epochs), {}
    for name in names:
        began = time.process_time()
        network = VARIANTS[name](bench)
        scoring = StandardisedScoring(bench.standardise, rounded(copy.deepcopy(network)), **DEEP["guards"]).eval()
        auroc, caught = judged(scoring, normals, anomalies)
        found[name] = {"auroc": auroc, "caught": caught, "seconds": time.process_time() - began}
        print(digit, name, {"auroc": round(auroc, 2), "caught": [round(share, 1) for share in caught]}, flush=True)
    return found


def costs(names: Sequence[str]) -> dict[str, list[float]]:
    """Return least and median microseconds of one core an image, batch of 32, the variants taking turns.

    What a network has learned does not change what it costs: each is made with a single epoch on few images.
    """
    torch.set_num_threads(1)
    learned, normals, _ = split(0)
    bench = Bench(learned[:512], epochs=1, most_epochs=1)
    images = torch.from_numpy(normals[:32])[:, None]
    modules = {}
    for name in [*names, "article"]:
        scoring = _scoring(name, bench, learned)
        with torchscript_allowed():
            modules[name] = torch.jit.freeze(torch.jit.script(scoring))
    taken: dict[str, list[float]] = {name: [] for name in modules}
    with torch.inference_mode():
        for turn in range(330):
            for name, module in modules.items():
                began = time.process_time()
                module(images)
                if turn >= 30:
                    taken[name].append((time.process_time() - began) / len(images) * 1e6)
    return {name: [min(times), float(np.median(times))] for name, times in taken.items()}


def _scoring(name: str, bench: Bench, learned: Batch) -> nn.Module:
    if name == "article":
        article = ScaledScoring(ReexpressedArticle(ArticleAutoencoder()), -1.0, 1.0)
        return article.requires_grad_(requires_grad=False).eval()
    # The cost of a memory depends on its number of images, so it gets all images.
    network = memory_of(Bench(learned, epochs=1)) if name.startswith("memory") else VARIANTS[name](bench)
    return StandardisedScoring(bench.standardise, network, **DEEP["guards"]).eval()


def main() -> None:
    """Try what was chosen, in one process for each digit, and add it to the file of results."""
    parser = argparse.ArgumentParser(prog="benchmarks.experiments", description=__doc__)
    parser.add_argument("--digits", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--epochs", type=int, default=40, help="where a variant does not say")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only-costs", action="store_true", help="train nothing, measure what an image costs")
    chosen = parser.parse_args()
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"split": "development", "seed": 0, "digits": {}}
    if chosen.only_costs:
        result["microseconds_batch32"] = costs(chosen.variants)
    else:
        with ProcessPoolExecutor(chosen.jobs) as pool:
            runs = {pool.submit(tried, digit, chosen.variants, chosen.epochs): digit for digit in chosen.digits}
            for run in as_completed(runs):
                result["digits"].setdefault(str(runs[run]), {}).update(run.result())
        result["epochs"] = chosen.epochs
    RESULTS.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
