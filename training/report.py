"""What a person looks at: the pictures, the curves and the model card of a version.

Knows: pictures, tables, words. Does not know: how the figures came about, nor the model store. Every figure in the
card is taken from the manifest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from app.detector import Detector
from app.manifest import Manifest
from training import pictures
from training.card import model_card
from training.datasets import Dataset

_BINS = 60
_ROC_POINTS = 200


@dataclass(frozen=True)
class Evidence:
    """What the report shows besides the manifest.

    Attributes:
        dataset: for the words.
        images: of the test, uint8 [n, 28, 28].
        labels: of the test, [n].
        scores: of the test, float32 [n].
        losses: mean training loss of each epoch; empty where the recipe has no epochs.
        detector: redraws the examples.
    """

    dataset: Dataset
    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    scores: NDArray[np.float32]
    losses: tuple[float, ...]
    detector: Detector

    def is_normal(self, normal: tuple[int, ...]) -> NDArray[np.bool_]:
        """Say of each test image whether it is of the normal class."""
        return np.isin(self.labels, normal)


def report(manifest: Manifest, evidence: Evidence) -> dict[str, bytes]:
    """Return the files of the folder `report`, by path relative to the version's folder."""
    is_normal = evidence.is_normal(manifest.data.normal)
    curve = roc(evidence.scores, is_normal)
    bins = histogram(evidence.scores, is_normal, manifest.threshold)
    files: dict[str, bytes] = {
        "evaluation.json": _json({"histogram": bins, "roc": curve, "losses": list(evidence.losses)}),
        "histogram.png": pictures.histogram(bins, manifest.threshold, manifest.alpha, manifest.normal_class),
        "reconstructions.png": pictures.reconstructions(
            examples(evidence, is_normal, manifest.threshold), manifest.threshold
        ),
    }
    if evidence.losses:
        files["loss.png"] = pictures.loss(evidence.losses)
    if curve:
        files["roc.png"] = pictures.roc(curve, manifest.metrics["auroc"], manifest.metrics["operating_points"])
    files["model-card.md"] = model_card(manifest, evidence.dataset.label_names, sorted(files)).encode()
    return {f"report/{name}": content for name, content in files.items()}


def histogram(scores: NDArray[np.float32], is_normal: NDArray[np.bool_], threshold: float) -> dict[str, list[float]]:
    """Return `edges` [61] and the counts `normal` and `anomalous` [60] of the scores.

    The last bin takes everything above: the axis ends at the 99.5th percentile, or beyond the threshold.
    """
    end = max(float(np.quantile(scores, 0.995)), 1.1 * threshold)
    edges = np.linspace(
        min(0.0, float(scores.min())) if end > 3 * scores.min() else float(scores.min()), end, _BINS + 1
    )
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


def examples(evidence: Evidence, is_normal: NDArray[np.bool_], threshold: float) -> list[pictures.Example]:
    """Choose what to show: a typical normal, a typical six (or the first other label), and the extremes of both kinds.

    Typical is the image whose score is the median of its kind.
    """
    names, normals, anomalies = evidence.dataset.label_names, np.flatnonzero(is_normal), np.flatnonzero(~is_normal)
    chosen: list[tuple[str, int]] = []
    if len(normals):
        ranked = normals[np.argsort(evidence.scores[normals])]
        typical, worst = int(ranked[len(ranked) // 2]), int(ranked[-1])
        chosen += [(f"a typical {names[evidence.labels[typical]]}", typical)]
    if len(anomalies):
        shown = 6 if (evidence.labels[anomalies] == 6).any() else evidence.labels[anomalies[0]]
        ranked_label = np.flatnonzero(evidence.labels == shown)
        ranked_label = ranked_label[np.argsort(evidence.scores[ranked_label])]
        chosen.append((f"a typical {names[shown]}", int(ranked_label[len(ranked_label) // 2])))
    if len(normals):
        chosen.append((f"the worst {names[evidence.labels[worst]]}", worst))
    if len(anomalies):
        ranked_all = anomalies[np.argsort(evidence.scores[anomalies])]
        first, last = int(ranked_all[0]), int(ranked_all[-1])
        chosen.append((f"best hidden: {names[evidence.labels[first]]}", first))
        chosen.append((f"most anomalous: {names[evidence.labels[last]]}", last))
    found = evidence.detector.detect(np.ascontiguousarray(evidence.images[[at for _, at in chosen]][:, None]))
    return [
        pictures.Example(
            title=title,
            image=evidence.images[at],
            reconstruction=found.reconstruction[row, 0],
            error_map=found.error_map[row],
            mse=float(found.mse[row]),
            flagged=bool(found.mse[row] > threshold),
        )
        for row, (title, at) in enumerate(chosen)
    ]


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"
