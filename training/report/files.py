"""The files of a report: pictures, evaluation.json and the model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from app.inference.detector import Detector
from app.models.manifest import Manifest
from training.evaluation.probes import Probe
from training.report import examples, pictures
from training.report.card import model_card
from training.report.examples import ScoredTest

_BINS = 60
_ROC_POINTS = 200

SHOWN_PROBES = (
    "blank",
    "white",
    "inverted",
    "uniform noise",
    "Fashion-MNIST",
    "4x4 square in a corner",
    "vertical line through",
    "lower half erased",
    "contrast 0.2",
    "moved by 2 px",
    "turned by 30 degrees",
    "scaled to 70 %",
)
"""Names of the probes with a picture in the report."""


@dataclass(frozen=True)
class ReportData:
    """The contents of a report apart from the manifest.

    Attributes:
        test: test images with their labels and scores.
        probes: images of the probes.
        losses: mean training loss of each epoch; empty for a recipe without epochs.
        detector: detector of the version.
        reference: detector of the article's model of the same class, to compare with, if there is one.
    """

    test: ScoredTest
    probes: Sequence[Probe]
    losses: tuple[float, ...]
    detector: Detector
    reference: Detector | None = None


def report(manifest: Manifest, data: ReportData) -> dict[str, bytes]:
    """Return the files of the folder `report`, by path relative to the version's folder."""
    test, threshold = data.test, manifest.threshold
    curve = roc(test.scores, test.is_normal)
    bins = histogram(test.scores, test.is_normal, threshold)
    files: dict[str, bytes] = {
        "evaluation.json": _json({"histogram": bins, "roc": curve, "losses": list(data.losses)}),
        "histogram.png": pictures.histogram(bins, threshold, manifest.alpha, manifest.normal_class),
        **_galleries(data, threshold),
    }
    if data.losses:
        files["loss.png"] = pictures.loss(data.losses)
    if curve:
        files["roc.png"] = pictures.roc(curve, manifest.metrics["auroc"], manifest.metrics["operating_points"])
    files["model-card.md"] = model_card(manifest, test.label_names, sorted(files)).encode()
    return {f"report/{name}": content for name, content in files.items()}


def _galleries(data: ReportData, threshold: float) -> dict[str, bytes]:
    test, detector = data.test, data.detector
    rule = f"(anomalous: mse above {threshold:.3g})"
    galleries = {
        "reconstructions.png": (examples.overview(test), f"Reconstructions {rule}", None),
        "normals.png": (examples.normals(test), "Normal images with the lowest and the highest scores", None),
        "kinds.png": (examples.kinds(test), "A typical image of every label", data.reference),
        "probes.png": (examples.of_probes(data.probes, SHOWN_PROBES), f"Probes {rule}", None),
    }
    return {
        name: pictures.gallery(examples.reconstruct(chosen, detector, threshold, reference), title)
        for name, (chosen, title, reference) in galleries.items()
        if chosen
    }


def histogram(scores: NDArray[np.float32], is_normal: NDArray[np.bool_], threshold: float) -> dict[str, list[float]]:
    """Return `edges` [61] and the counts `normal` and `anomalous` [60] of scores.

    The axis ends at the 99.5th percentile or beyond the threshold; the last bin contains all higher scores.
    """
    end = max(float(np.quantile(scores, 0.995)), 1.1 * threshold)
    lowest = float(scores.min())
    # If all scores are equal, an axis that starts at the lowest has no length.
    edges = np.linspace(lowest if lowest < end <= 3 * lowest else min(0.0, lowest), end, _BINS + 1)
    clipped = np.clip(scores, edges[0], edges[-1])
    return {
        "edges": edges.tolist(),
        "normal": np.histogram(clipped[is_normal], edges)[0].tolist(),
        "anomalous": np.histogram(clipped[~is_normal], edges)[0].tolist(),
    }


def roc(scores: NDArray[np.float32], is_normal: NDArray[np.bool_]) -> dict[str, list[float]]:
    """Return `false_alarms` and `detections` at no more than 201 rates; empty if the test set has only one class."""
    if is_normal.all() or not is_normal.any():
        return {}
    false_positive_rate, recall, _ = roc_curve(~is_normal, scores)
    grid = np.unique(np.concatenate([[0.0], np.geomspace(1e-3, 1.0, _ROC_POINTS)]))
    # With the last point at or before each rate of the grid, the curve is nowhere above the exact one.
    at = np.searchsorted(false_positive_rate, grid, side="right") - 1
    return {"false_alarms": grid.round(6).tolist(), "detections": recall[at].round(6).tolist()}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"
