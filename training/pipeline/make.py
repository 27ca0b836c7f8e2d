"""The training pipeline of one version: split, fit, export, calibrate, evaluate, report."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.inference.detector import Detector
from app.models.calibration import CalibrationError, needed
from app.models.manifest import CalibrationSummary, Data, Manifest
from app.models.manifest import Recipe as RecipeRecord
from training.data.dataset import Dataset
from training.data.loaders import FASHION, fashion_images
from training.data.splits import SPLITS, Split, images_needed
from training.evaluation.calibrate import (
    calibrate,
    check_guards,
    guard_error,
    score,
    score_alone,
    smallest_alpha,
)
from training.evaluation.figures import evaluate, probe_table
from training.evaluation.probes import probes
from training.publishing.export import Exported, export, golden_images
from training.publishing.publish import publish
from training.recipes.contract import Progress, Recipe
from training.report.examples import ScoredTest
from training.report.files import ReportData, report

FEW_IMAGES = 200
"""Number of normal images below which a version gets a warning."""
_EXTRA_PARAMETERS = ("split", "threads")
"""Keys of a manifest's parameters that are not parameters of the recipe."""


@dataclass(frozen=True)
class TrainingJob:
    """The specification of a version.

    Attributes:
        name: name of the model in the model store.
        recipe: recipe.
        normal: labels of the normal class.
        seed: seed of all random numbers.
        alpha: false-positive rate of the threshold.
        confidence: probability with which the false-positive rate is at most `alpha`; None for the average.
        device: device to train on.
    """

    name: str
    recipe: Recipe
    normal: tuple[int, ...]
    seed: int
    alpha: float
    confidence: float | None
    device: torch.device

    def matches(self, manifest: Manifest, data_sha256: str) -> bool:
        """Return whether a version is the result of this job for the data with that SHA-256."""
        recorded = manifest.recipe.parameters
        parameters = {name: value for name, value in recorded.items() if name not in _EXTRA_PARAMETERS}
        return (
            (manifest.recipe.name, manifest.recipe.seed) == (self.recipe.name, self.seed)
            and parameters == dict(self.recipe.parameters)
            and (manifest.data.sha256, manifest.data.normal) == (data_sha256, self.normal)
            and (manifest.alpha, manifest.calibration.confidence) == (self.alpha, self.confidence)
            and manifest.calibration.recalibrated is None
        )


@dataclass(frozen=True)
class DraftVersion:
    """A complete version that is not published.

    Attributes:
        manifest: manifest without the final `version` and `files`.
        files: contents by path relative to the version's folder.
    """

    manifest: Manifest
    files: dict[str, bytes]

    def publish(self, model_store: Path, *, promote: bool) -> Manifest:
        """Publish the version under the next free number; see `training.publishing.publish.publish`."""
        return publish(model_store, self.manifest, self.files, promote=promote)


def make_version(
    job: TrainingJob,
    dataset: Dataset,
    *,
    progress: Progress,
    log: Callable[[str], None] = lambda _: None,
    reference: Detector | None = None,
) -> DraftVersion:
    """Make a version in memory.

    Args:
        job: specification of the version.
        dataset: images for training, calibration and test.
        progress: callback for each epoch.
        log: callback for a line of text at each step.
        reference: detector of the article's model of the same class, for comparison in the report.

    Raises:
        DataError: the normal class is unknown or too small.
        TrainingError: training diverged.
        ExportError: the module breaks the contract.
        CalibrationError: there are too few calibration images for the false-positive rate, or guards rejected too many.
    """
    normal_class = dataset.describe(job.normal)
    split = SPLITS[job.recipe.split](dataset, job.normal, job.seed)
    if dataset.name == "folder":
        job = replace(job, recipe=job.recipe.with_ink_of(dataset.images[split.train]))
    _check_counts(job, split, dataset)
    losses: list[float] = []

    def on_epoch(epoch: int, loss: float) -> None:
        losses.append(loss)
        progress(epoch, loss)

    log(f"training on {len(split.train):,} images of {normal_class}, on {job.device}")
    scoring = job.recipe.fit(
        dataset.images[split.train], job.recipe.parameters, seed=job.seed, device=job.device, progress=on_epoch
    )
    test_images, test_labels = dataset.images[split.test], dataset.labels[split.test]
    exported = export(scoring, golden_images(test_images, test_labels, job.normal))
    detector = Detector.open(exported.model, torch.device("cpu"))

    log(f"calibrating on {len(split.calibration):,} held-out normal images, testing on {split.test_description}")
    calibration_scores, reason = score_alone(detector, dataset.images[split.calibration])
    calibration, summary = calibrate(calibration_scores, job.alpha, job.confidence)
    threshold = calibration.threshold(job.alpha)
    counts = check_guards(
        calibration_scores,
        reason,
        job.recipe.reasons,
        threshold=threshold,
        guard_error=guard_error(job.recipe.parameters),
    )
    test_scores = score(detector, test_images)
    is_normal = np.isin(test_labels, job.normal)
    other_dataset = None if dataset.name == FASHION else fashion_images()
    probe_images = probes(test_images[is_normal], other_dataset) if is_normal.any() else []
    metrics: dict[str, Any] = {
        "test": split.test_description,
        **evaluate(test_scores, test_labels, job.normal, calibration, job.alpha),
        "also": {
            description: evaluate(
                score(detector, dataset.images[indices]), dataset.labels[indices], job.normal, calibration, job.alpha
            )
            for description, indices in split.further_tests.items()
        },
        "probes": probe_table(detector, probe_images, calibration, job.recipe.reasons),
        "final_loss": losses[-1] if losses else None,
        **({"calibration_caught": counts} if counts else {}),
    }
    manifest = _manifest(
        job,
        dataset,
        split=split,
        summary=summary,
        threshold=threshold,
        normal_class=normal_class,
        metrics=metrics,
    )
    test = ScoredTest(test_images, test_labels, test_scores, is_normal, dataset.label_names)
    data = ReportData(test, probe_images, tuple(losses), detector, reference)
    return DraftVersion(manifest, {**_artifact(exported, calibration_scores), **report(manifest, data)})


def _check_counts(job: TrainingJob, split: Split, dataset: Dataset) -> None:
    """Raise the error for too few calibration images before training.

    Raises:
        CalibrationError: the message contains the number of images, the number needed, and an alpha that works.
    """
    count = len(split.calibration)
    try:
        calibrate(np.zeros(count, np.float32), job.alpha, job.confidence)
    except CalibrationError as error:
        if not 0 < job.alpha < 1 or not 0 < (job.confidence or 0.5) < 1:
            raise
        least = images_needed(needed(job.alpha, job.confidence), has_test_file=dataset.test_start is not None)
        smallest = smallest_alpha(count, job.confidence)
        other = "" if smallest is None else f", or use --alpha {smallest:g}, the smallest that works"
        raise CalibrationError(
            f"{error}. There are {_normal_count(split, dataset, job.normal):,} normal images in all, of which a fifth "
            f"are for the calibration: give at least {least:,}{other}"
        ) from error


def _normal_count(split: Split, dataset: Dataset, normal: tuple[int, ...]) -> int:
    """Return the number of normal images that a split divides. A test file is not divided."""
    divided = len(split.train) + len(split.calibration)
    tested = np.isin(dataset.labels[split.test], normal).sum() if dataset.test_start is None else 0
    return divided + int(tested)


def _warnings(count: int) -> tuple[str, ...]:
    if count >= FEW_IMAGES:
        return ()
    return (
        f"This version was made from {count:,} normal images. With fewer than {FEW_IMAGES}, the model may not know all "
        "normal variations, and threshold and metrics are uncertain.",
    )


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


def _manifest(
    job: TrainingJob,
    dataset: Dataset,
    *,
    split: Split,
    summary: CalibrationSummary,
    threshold: float,
    normal_class: str,
    metrics: dict[str, Any],
) -> Manifest:
    recipe = job.recipe
    parameters = {**recipe.parameters, "split": split.name, "threads": torch.get_num_threads()}
    return Manifest(
        name=job.name,
        version=1,
        created_at=datetime.now(UTC).replace(microsecond=0),
        normal_class=normal_class,
        recipe=RecipeRecord(name=recipe.name, parameters=parameters, seed=job.seed),
        input_shape=(1, 28, 28),
        preparation=dataset.preparation,
        score_space=recipe.score_space,
        alpha=job.alpha,
        threshold=threshold,
        reasons=recipe.reasons,
        calibration=summary,
        metrics=metrics,
        data=Data(
            name=dataset.name,
            source=dataset.source,
            sha256=dataset.sha256,
            normal=job.normal,
            train=len(split.train),
            calibration=len(split.calibration),
            test_normal=metrics["test_normal"],
            test_anomalous=metrics["test_anomalous"],
        ),
        code_version=code_version(),
        torch_version=str(torch.__version__),
        device=_device_name(job.device),
        warnings=_warnings(_normal_count(split, dataset, job.normal)),
        files={},
    )


def code_version() -> str:
    """Return the version of the package and, in a git checkout, the commit: `0.1.0+g1a2b3c4`.

    The suffix `.changed` means that `app` or `training` differ from the commit.
    """
    try:
        version = metadata.version("reconstruction-anomaly")
    except metadata.PackageNotFoundError:
        version = "unknown"
    commit = _git("rev-parse", "--short=10", "HEAD")
    changed = ".changed" if _git("status", "--porcelain", "--", "app", "training") else ""
    return f"{version}+g{commit}{changed}" if commit else version


def _git(*arguments: str) -> str | None:
    try:
        completed = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.strip()


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
