"""A new threshold for a model that stays as it is: another camera, another false-alarm rate.

Knows: versions, scores, the order of the steps. Does not know: how an autoencoder is trained, the command line.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.inference.detector import Detector
from app.models.calibration import CalibrationError
from app.models.manifest import Manifest, Recalibration
from app.models.repository import Artifact, Repository
from training.evaluation.calibrate import BAND_LEVEL, calibrate, check_guards, guard_error, judge
from training.evaluation.figures import INTERVAL_LEVEL, proportion
from training.pipeline.make import Made, code_version
from training.report import pictures
from training.report.card import recalibrated_card
from training.report.files import histogram

_KEPT = ("test_normal", "test_anomalous", "auroc", "average_precision", "final_loss")
"""Figures that no threshold enters: they are of the model, which stays."""


class RecalibrationError(CalibrationError):
    """There is nothing to choose a threshold anew from, or for."""


def recalibrate(
    repository: Repository,
    origin: Manifest,
    images: NDArray[np.uint8] | None,
    *,
    alpha: float | None = None,
    confidence: float | None = None,
) -> Made:
    """Make a version with the model of another one and a threshold of its own. Nothing is written to the disk.

    Args:
        repository: the model store.
        origin: of the version whose model it is.
        images: normal images that the model has not learned from, uint8 [n, 28, 28]; None: those that `origin` was
            calibrated on, for another rate.
        alpha: the wanted false-alarm rate; that of `origin` unless told.
        confidence: see `training.evaluation.calibrate.calibrate`; that of `origin` unless told.

    Raises:
        RecalibrationError: neither images nor a rate nor a confidence is given, or the version was made from these
            images.
        RepositoryError: the version is not as it was published.
        DetectorError: it does not reproduce its golden scores.
        CalibrationError: too few images for the rate, or guards caught too many of them.
    """
    if images is None and alpha is None and confidence is None:
        raise RecalibrationError("nothing would change: give --data-dir, --alpha or --confidence")
    artifact = repository.open(origin.name, origin.version)
    alpha = origin.alpha if alpha is None else alpha
    confidence = origin.calibration.confidence if confidence is None else confidence
    if images is not None:
        _check_unseen(artifact, images)
    detector = Detector.load(artifact, torch.device("cpu"))
    scores, reason, guards = _own(artifact) if images is None else (*judge(detector, images), origin.reasons)
    calibration, summary = calibrate(scores, alpha, confidence)
    threshold = calibration.threshold(alpha)
    counts = check_guards(
        scores, reason, guards, threshold=threshold, guard_error=guard_error(origin.recipe.parameters)
    )
    draft = origin.model_copy(
        update={
            "created_at": datetime.now(UTC).replace(microsecond=0),
            "alpha": alpha,
            "threshold": threshold,
            "calibration": summary.model_copy(update={"recalibrated": _origin(origin, images)}),
            "metrics": {**_metrics(origin, scores, alpha), **({"calibration_caught": counts} if counts else {})},
            "data": origin.data if images is None else origin.data.model_copy(update={"calibration": 0}),
            "code_version": code_version(),
            "files": {},
        }
    )
    return Made(draft, {**_artifact(repository, origin, scores), **_report(repository, origin, draft, scores)})


def _check_unseen(artifact: Artifact, images: NDArray[np.uint8]) -> None:
    # The golden images of a folder's model lie in the folder that it learned from; of other sets, in the test file.
    if artifact.manifest.data.name != "folder":
        return
    golden = {image.tobytes() for image in artifact.golden.images if image.any()}
    if any(image.tobytes() in golden for image in images):
        raise RecalibrationError(
            f"the folder holds images that {'{}@{}'.format(*artifact.key)} was made from: "
            "calibrate on normal images that it has not seen"
        )


def _own(artifact: Artifact) -> tuple[NDArray[np.float32], NDArray[np.int8], Sequence[str]]:
    # Only the scores were kept: those of caught images are known by the guards' error, but not which guard it was.
    scores = np.asarray(artifact.calibration.scores, np.float32)
    of_caught = np.float32(guard_error(artifact.manifest.recipe.parameters))
    return scores, (scores == of_caught).astype(np.int8), [" or ".join(artifact.manifest.reasons)]


def _origin(origin: Manifest, images: NDArray[np.uint8] | None) -> Recalibration:
    if images is None:
        before = origin.calibration.recalibrated
        source = before.source if before else f"{origin.data.name} ({origin.data.source}), held out from training"
        return Recalibration(version=origin.version, source=source, sha256=before.sha256 if before else None)
    sha256 = hashlib.sha256(images.tobytes()).hexdigest()
    return Recalibration(version=origin.version, source=f"folder of {len(images):,} PNG files", sha256=sha256)


def _metrics(origin: Manifest, scores: NDArray[np.float32], alpha: float) -> dict[str, Any]:
    # What a threshold enters was measured at another one, and is left out rather than passed on.
    return {
        "test": origin.metrics["test"],
        "tested_version": _tested(origin),
        **{name: origin.metrics.get(name) for name in _KEPT},
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
            "flagged": proportion(scores > np.float32(origin.threshold)),
        },
    }


def _tested(origin: Manifest) -> int:
    """Return the version whose training the figures are of: not `origin`, where its threshold too was chosen anew."""
    anew = origin.calibration.recalibrated
    return origin.version if anew is None else int(origin.metrics.get("tested_version", anew.version))


def _artifact(repository: Repository, origin: Manifest, scores: NDArray[np.float32]) -> dict[str, bytes]:
    sorted_scores = io.BytesIO()
    np.save(sorted_scores, np.sort(scores))
    kept = {file: repository.read(origin, file) for file in ("model.pt", "golden.npz")}
    return {**kept, "calibration.npy": sorted_scores.getvalue()}


def _report(repository: Repository, origin: Manifest, draft: Manifest, scores: NDArray[np.float32]) -> dict[str, bytes]:
    bins = histogram(scores, np.ones(len(scores), np.bool_), draft.threshold)
    title = "Scores of the calibration images"
    files = {"histogram.png": pictures.histogram(bins, draft.threshold, draft.alpha, draft.normal_class, title)}
    if "report/loss.png" in origin.files:
        files["loss.png"] = repository.read(origin, "report/loss.png")
    files["model-card.md"] = recalibrated_card(draft, sorted(files)).encode()
    return {f"report/{name}": content for name, content in files.items()}
