"""What a person looks at: the pictures, the curves and the model card of a version.

Knows: pictures, tables, words. Does not know: how the figures came about, nor the model store. Every figure in the
card is taken from the manifest.
"""

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
from training.report.examples import Tested

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
"""The probes of which the report shows an image."""


@dataclass(frozen=True)
class Evidence:
    """What the report shows besides the manifest.

    Attributes:
        tested: the test images with their labels and scores.
        probes: what the manifest's table of probes was measured on.
        losses: mean training loss of each epoch; empty where the recipe has no epochs.
        detector: redraws the examples.
        reference: the article's model of the same class, to be shown beside it, if there is one.
    """

    tested: Tested
    probes: Sequence[Probe]
    losses: tuple[float, ...]
    detector: Detector
    reference: Detector | None = None


def report(manifest: Manifest, evidence: Evidence) -> dict[str, bytes]:
    """Return the files of the folder `report`, by path relative to the version's folder."""
    tested, threshold = evidence.tested, manifest.threshold
    curve = roc(tested.scores, tested.is_normal)
    bins = histogram(tested.scores, tested.is_normal, threshold)
    files: dict[str, bytes] = {
        "evaluation.json": _json({"histogram": bins, "roc": curve, "losses": list(evidence.losses)}),
        "histogram.png": pictures.histogram(bins, threshold, manifest.alpha, manifest.normal_class),
        **_galleries(evidence, threshold),
    }
    if evidence.losses:
        files["loss.png"] = pictures.loss(evidence.losses)
    if curve:
        files["roc.png"] = pictures.roc(curve, manifest.metrics["auroc"], manifest.metrics["operating_points"])
    files["model-card.md"] = model_card(manifest, tested.label_names, sorted(files)).encode()
    return {f"report/{name}": content for name, content in files.items()}


def _galleries(evidence: Evidence, threshold: float) -> dict[str, bytes]:
    tested, detector = evidence.tested, evidence.detector
    above = f"(anomaly: mse above {threshold:.3g})"
    wanted = {
        "reconstructions.png": (examples.overview(tested), f"What the model redraws {above}", None),
        "normals.png": (examples.normals(tested), "The best and the worst redrawn normal images", None),
        "kinds.png": (examples.kinds(tested), "A typical image of every kind", evidence.reference),
        "probes.png": (examples.probed(evidence.probes, SHOWN_PROBES), f"Probes {above}", None),
    }
    return {
        name: pictures.gallery(examples.redraw(chosen, detector, threshold, reference), title)
        for name, (chosen, title, reference) in wanted.items()
        if chosen
    }


def histogram(scores: NDArray[np.float32], is_normal: NDArray[np.bool_], threshold: float) -> dict[str, list[float]]:
    """Return `edges` [61] and the counts `normal` and `anomalous` [60] of the scores.

    The last bin takes everything above: the axis ends at the 99.5th percentile, or beyond the threshold.
    """
    end = max(float(np.quantile(scores, 0.995)), 1.1 * threshold)
    least = float(scores.min())
    # Where all scores are the same, an axis from the least of them would have no length.
    edges = np.linspace(least if least < end <= 3 * least else min(0.0, least), end, _BINS + 1)
    clipped = np.clip(scores, edges[0], edges[-1])
    return {
        "edges": edges.tolist(),
        "normal": np.histogram(clipped[is_normal], edges)[0].tolist(),
        "anomalous": np.histogram(clipped[~is_normal], edges)[0].tolist(),
    }


def roc(scores: NDArray[np.float32], is_normal: NDArray[np.bool_]) -> dict[str, list[float]]:
    """Return `false_alarms` and `detections`, at most a few hundred points; empty where the test has only one kind."""
    if is_normal.all() or not is_normal.any():
        return {}
    false_alarms, detections, _ = roc_curve(~is_normal, scores)
    grid = np.unique(np.concatenate([[0.0], np.geomspace(1e-3, 1.0, _ROC_POINTS)]))
    # The last point at or before each place of the grid keeps the curve a staircase from below.
    at = np.searchsorted(false_alarms, grid, side="right") - 1
    return {"false_alarms": grid.round(6).tolist(), "detections": detections[at].round(6).tolist()}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"
