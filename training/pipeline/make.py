"""Make one model version: data, fit, export, calibrate, evaluate, report, publish.

Knows: the order of the steps. Does not know: how any of them is done, nor the command line.
"""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.inference.detector import Detector
from app.models.manifest import CalibrationSummary, Data, Manifest
from app.models.manifest import Recipe as RecipeRecord
from training.data.dataset import Dataset
from training.data.loaders import FASHION, fashion_images
from training.data.splits import SPLITS, Split
from training.evaluation.calibrate import calibrate, check_guards, guard_error, judge, score
from training.evaluation.figures import evaluate, probe_table
from training.evaluation.probes import probes
from training.publishing.export import Exported, export, golden_images
from training.publishing.publish import publish
from training.recipes.article import Progress
from training.recipes.table import Recipe
from training.report.examples import Tested
from training.report.files import Evidence, report


@dataclass(frozen=True)
class Order:
    """What is wanted.

    Attributes:
        name: of the model in the model store.
        recipe: how to make it.
        normal: labels of the normal class.
        seed: of everything random.
        alpha: the wanted false-alarm rate.
        confidence: None, or the probability with which the false-alarm rate must stay at or below `alpha`.
        device: where to train.
    """

    name: str
    recipe: Recipe
    normal: tuple[int, ...]
    seed: int
    alpha: float
    confidence: float | None
    device: torch.device

    def made(self, manifest: Manifest, data_sha256: str) -> bool:
        """Say whether a version is what this order would make of the data with that SHA-256."""
        parameters = {name: value for name, value in manifest.recipe.parameters.items() if name not in _ADDED}
        return (
            (manifest.recipe.name, manifest.recipe.seed) == (self.recipe.name, self.seed)
            and parameters == dict(self.recipe.parameters)
            and (manifest.data.sha256, manifest.data.normal) == (data_sha256, self.normal)
            and (manifest.alpha, manifest.calibration.confidence) == (self.alpha, self.confidence)
            and manifest.calibration.recalibrated is None
        )


_ADDED = ("split", "threads")
"""What a manifest has among the parameters besides those of its recipe."""


@dataclass(frozen=True)
class Made:
    """A finished version that is not published yet: its manifest without number, and its files by path."""

    draft: Manifest
    files: dict[str, bytes]

    def publish(self, model_store: Path, *, promote: bool) -> Manifest:
        """Publish it under the next free number; see `training.publishing.publish.publish`."""
        return publish(model_store, self.draft, self.files, promote=promote)


def make(
    order: Order,
    dataset: Dataset,
    *,
    progress: Progress,
    say: Callable[[str], None] = lambda _: None,
    reference: Detector | None = None,
) -> Made:
    """Make a model version in memory. Nothing is written to the disk.

    Args:
        order: what is wanted.
        dataset: what to learn from and to measure on.
        progress: is told every epoch's loss.
        say: is told each step, in words.
        reference: the article's model of the same class, for the report to show beside it.

    Raises:
        DataError: the normal class is unknown or too small.
        TrainingError: training diverged.
        ExportError: the module breaks the contract.
        CalibrationError: too few calibration images for the wanted false-alarm rate, or guards caught too many of them.
    """
    normal_class = dataset.describe(order.normal)
    split = SPLITS[order.recipe.split](dataset, order.normal, order.seed)
    calibrate(np.zeros(len(split.calibration), np.float32), order.alpha, order.confidence)  # too few: say so now
    losses: list[float] = []

    def record(epoch: int, loss: float) -> None:
        losses.append(loss)
        progress(epoch, loss)

    say(f"learning {normal_class} from {len(split.train):,} images, on {order.device}")
    scoring = order.recipe.fit(
        dataset.images[split.train], order.recipe.parameters, seed=order.seed, device=order.device, progress=record
    )
    test_images, test_labels = dataset.images[split.test], dataset.labels[split.test]
    exported = export(scoring, golden_images(test_images, test_labels, order.normal))
    detector = Detector.open(exported.model, torch.device("cpu"))

    say(f"calibrating on {len(split.calibration):,} held-out normal images, testing on {split.test_words}")
    calibration_scores, reason = judge(detector, dataset.images[split.calibration])
    calibration, summary = calibrate(calibration_scores, order.alpha, order.confidence)
    threshold = calibration.threshold(order.alpha)
    counts = check_guards(
        calibration_scores,
        reason,
        order.recipe.reasons,
        threshold=threshold,
        guard_error=guard_error(order.recipe.parameters),
    )
    test_scores = score(detector, test_images)
    is_normal = np.isin(test_labels, order.normal)
    far_away = None if dataset.name == FASHION else fashion_images()
    tried = probes(test_images[is_normal], far_away) if is_normal.any() else []
    metrics: dict[str, Any] = {
        "test": split.test_words,
        **evaluate(test_scores, test_labels, order.normal, calibration, order.alpha),
        "also": {
            words: evaluate(
                score(detector, dataset.images[places]), dataset.labels[places], order.normal, calibration, order.alpha
            )
            for words, places in split.also.items()
        },
        "probes": probe_table(detector, tried, calibration, order.recipe.reasons),
        "final_loss": losses[-1] if losses else None,
        **({"calibration_caught": counts} if counts else {}),
    }
    draft = _draft(
        order,
        dataset,
        split=split,
        summary=summary,
        threshold=threshold,
        normal_class=normal_class,
        metrics=metrics,
    )
    tested = Tested(test_images, test_labels, test_scores, is_normal, dataset.label_names)
    evidence = Evidence(tested, tried, tuple(losses), detector, reference)
    return Made(draft, {**_artifact(exported, calibration_scores), **report(draft, evidence)})


def _artifact(exported: Exported, calibration_scores: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, bytes]:
    golden, scores = io.BytesIO(), io.BytesIO()
    np.savez_compressed(
        golden,
        images=exported.golden.images,
        mse=exported.golden.mse,
        reconstructions=exported.golden.reconstructions,
    )
    np.save(scores, np.sort(calibration_scores))
    return {"model.pt": exported.model, "calibration.npy": scores.getvalue(), "golden.npz": golden.getvalue()}


def _draft(
    order: Order,
    dataset: Dataset,
    *,
    split: Split,
    summary: CalibrationSummary,
    threshold: float,
    normal_class: str,
    metrics: dict[str, Any],
) -> Manifest:
    recipe = order.recipe
    parameters = {**recipe.parameters, "split": split.name, "threads": torch.get_num_threads()}
    return Manifest(
        name=order.name,
        version=1,
        created_at=datetime.now(UTC).replace(microsecond=0),
        normal_class=normal_class,
        recipe=RecipeRecord(name=recipe.name, parameters=parameters, seed=order.seed),
        input_shape=(1, 28, 28),
        score_space=recipe.score_space,
        alpha=order.alpha,
        threshold=threshold,
        reasons=recipe.reasons,
        calibration=summary,
        metrics=metrics,
        data=Data(
            name=dataset.name,
            source=dataset.source,
            sha256=dataset.sha256,
            normal=order.normal,
            train=len(split.train),
            calibration=len(split.calibration),
            test_normal=metrics["test_normal"],
            test_anomalous=metrics["test_anomalous"],
        ),
        code_version=code_version(),
        torch_version=str(torch.__version__),
        device=_device_words(order.device),
        files={},
    )


def code_version() -> str:
    """Return the package's version and, in a git checkout, the commit: `0.1.0+g1a2b3c4`.

    It ends in `.changed` where `app` or `training` differ from that commit.
    """
    try:
        version = metadata.version("reconstruction-anomaly")
    except metadata.PackageNotFoundError:
        version = "unknown"
    commit = _git("rev-parse", "--short=10", "HEAD")
    changed = ".changed" if _git("status", "--porcelain", "--", "../app", ".") else ""
    return f"{version}+g{commit}{changed}" if commit else version


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _device_words(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
