"""The recalibration pipeline: a new threshold for the same model, for another camera or another false-positive rate."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.inference.detector import Detector
from app.models.calibration import CalibrationError
from app.models.manifest import LOCAL, Manifest, Preparation, Recalibration
from app.models.repository import Artifact, Repository, RepositoryError
from training.evaluation.calibrate import BAND_LEVEL, calibrate, check_guards, guard_error, score_alone
from training.evaluation.figures import INTERVAL_LEVEL, proportion
from training.evaluation.recall import recall_between
from training.pipeline.make import DraftVersion, code_version
from training.report import examples, pictures
from training.report.files import histogram
from training.report.recalibrated_card import recalibrated_card

_SHOWN = 8
"""Number of images in the picture of the highest scores."""
_THRESHOLD_FREE = ("test_normal", "test_anomalous", "auroc", "average_precision", "final_loss")
"""Metrics that do not depend on the threshold."""


class RecalibrationError(CalibrationError):
    """A recalibration without a change, or on images that the model was made from."""


def recalibrate(
    repository: Repository,
    origin: Manifest,
    images: NDArray[np.uint8] | None,
    *,
    alpha: float | None = None,
    confidence: float | None = None,
    preparation: Preparation | None = None,
    names: Sequence[str] = (),
) -> DraftVersion:
    """Make a version in memory with the model of another version and its own threshold.

    Args:
        repository: model store.
        origin: manifest of the version with the model.
        images: normal images that the model was not trained on, uint8 [n, 28, 28]; None for the calibration scores of
            `origin`.
        alpha: false-positive rate; None for that of `origin`.
        confidence: probability that the rate is at most alpha; None for that of `origin`.
        preparation: how the images were prepared; None for that of `origin`.
        names: a name for each image, for the picture of those with the highest scores.

    Raises:
        RecalibrationError: images, rate and confidence are all None, or the version was made from these images.
        RepositoryError: the version differs from its manifest.
        DetectorError: the version does not reproduce its golden scores.
        CalibrationError: there are too few images for the rate, or guards rejected too many of them.
    """
    if images is None and alpha is None and confidence is None:
        raise RecalibrationError("nothing to change: give --data-dir, --alpha or --confidence")
    artifact = repository.open(origin.name, origin.version)
    alpha = origin.alpha if alpha is None else alpha
    confidence = origin.calibration.confidence if confidence is None else confidence
    if images is not None:
        _check_unseen(artifact, images)
    detector = Detector.load(artifact, torch.device("cpu"))
    scores, reason, guards = (
        _own_scores(artifact) if images is None else (*score_alone(detector, images), origin.reasons)
    )
    calibration, summary = calibrate(scores, alpha, confidence)
    threshold = calibration.threshold(alpha)
    counts = check_guards(
        scores, reason, guards, threshold=threshold, guard_error=guard_error(origin.recipe.parameters)
    )
    manifest = origin.model_copy(
        update={
            "created_at": datetime.now(UTC).replace(microsecond=0),
            "alpha": alpha,
            "threshold": threshold,
            "calibration": summary.model_copy(update={"recalibrated": _recalibration(origin, images)}),
            "metrics": {
                **_metrics(repository, origin, scores, alpha, threshold),
                **({"calibration_caught": counts} if counts else {}),
            },
            "data": origin.data if images is None else origin.data.model_copy(update={"calibration": 0}),
            "code_version": code_version(),
            "files": {},
            **({"preparation": preparation} if preparation else {}),
        }
    )
    highest = {} if images is None else _highest(images, names, scores, detector, threshold)
    return DraftVersion(
        manifest, {**_artifact(repository, origin, scores), **_report(repository, origin, manifest, scores, highest)}
    )


def _highest(
    images: NDArray[np.uint8],
    names: Sequence[str],
    scores: NDArray[np.float32],
    detector: Detector,
    threshold: float,
) -> dict[str, bytes]:
    """Draw the images with the highest scores: a single odd image may decide the threshold."""
    order = np.argsort(-scores, kind="stable")[:_SHOWN]
    chosen = [(names[index] if names else f"image {index}", images[index]) for index in order]
    title = "Calibration images with the highest scores"
    return {"highest.png": pictures.gallery(examples.reconstruct(chosen, detector, threshold), title)}


def _check_unseen(artifact: Artifact, images: NDArray[np.uint8]) -> None:
    # For a folder of PNGs, the golden images are from the folder that the model was made from. For other data sets they
    # are from the test file.
    if artifact.manifest.data.name != "folder":
        return
    golden = {image.tobytes() for image in artifact.golden.images if image.any()}
    if any(image.tobytes() in golden for image in images):
        raise RecalibrationError(
            f"the folder contains images that {'{}@{}'.format(*artifact.key)} was made from; "
            "give normal images that were not used for training"
        )


def _own_scores(artifact: Artifact) -> tuple[NDArray[np.float32], NDArray[np.int8], Sequence[str]]:
    # A version contains only the scores: the guard error identifies rejected images, but not which guard it was.
    scores = np.asarray(artifact.calibration.scores, np.float32)
    of_rejected = np.float32(guard_error(artifact.manifest.recipe.parameters))
    return (
        scores,
        (scores == of_rejected).astype(np.int8),
        [" or ".join(name for name in artifact.manifest.reasons if name != LOCAL)],
    )


def _recalibration(origin: Manifest, images: NDArray[np.uint8] | None) -> Recalibration:
    if images is None:
        before = origin.calibration.recalibrated
        source = before.source if before else f"{origin.data.name} ({origin.data.source}), held out from training"
        return Recalibration(version=origin.version, source=source, sha256=before.sha256 if before else None)
    sha256 = hashlib.sha256(images.tobytes()).hexdigest()
    return Recalibration(version=origin.version, source=f"folder of {len(images):,} image files", sha256=sha256)


def _recall(repository: Repository, origin: Manifest, threshold: float) -> tuple[float, float] | None:
    """Return the bounds of the recall on the test of the trained version; None if they are not known."""
    try:
        tested = repository.manifest(origin.name, _tested_version(origin))
        evaluation = json.loads(repository.read(tested, "report/evaluation.json"))
    except (RepositoryError, KeyError):
        return None  # The trained version was deleted, or published by an older training.
    return recall_between(evaluation["histogram"], tested.metrics["operating_points"], threshold)


def _metrics(
    repository: Repository, origin: Manifest, scores: NDArray[np.float32], alpha: float, threshold: float
) -> dict[str, Any]:
    # Metrics that depend on the threshold were measured at another one, and are left out.
    return {
        "test": origin.metrics["test"],
        "tested_version": _tested_version(origin),
        **{name: origin.metrics.get(name) for name in _THRESHOLD_FREE},
        "alpha": alpha,
        "interval_level": INTERVAL_LEVEL,
        "band_level": BAND_LEVEL,
        "operating_points": [],
        "labels": {},
        "also": {},
        "probes": [],
        "before": {
            "alpha": origin.alpha,
            "threshold": origin.threshold,
            "band": origin.calibration.band,
            "flagged": proportion(scores > np.float32(origin.threshold)),
            "recall": _recall(repository, origin, origin.threshold),
        },
        "recall": _recall(repository, origin, threshold),
    }


def _tested_version(origin: Manifest) -> int:
    """Return the number of the version that was trained and tested: `origin`, or the one that it recalibrates."""
    recalibrated = origin.calibration.recalibrated
    return origin.version if recalibrated is None else int(origin.metrics.get("tested_version", recalibrated.version))


def _artifact(repository: Repository, origin: Manifest, scores: NDArray[np.float32]) -> dict[str, bytes]:
    sorted_scores = io.BytesIO()
    np.save(sorted_scores, np.sort(scores))
    copied = {file: repository.read(origin, file) for file in ("model.pt", "golden.npz")}
    return {**copied, "calibration.npy": sorted_scores.getvalue()}


def _report(
    repository: Repository,
    origin: Manifest,
    manifest: Manifest,
    scores: NDArray[np.float32],
    highest: dict[str, bytes],
) -> dict[str, bytes]:
    bins = histogram(scores, np.ones(len(scores), np.bool_), manifest.threshold)
    title = "Scores of the calibration images"
    picture = pictures.histogram(bins, manifest.threshold, manifest.alpha, manifest.normal_class, title)
    files = {"histogram.png": picture, **highest}
    if "report/loss.png" in origin.files:
        files["loss.png"] = repository.read(origin, "report/loss.png")
    files["model-card.md"] = recalibrated_card(manifest, sorted(files)).encode()
    return {f"report/{name}": content for name, content in files.items()}
