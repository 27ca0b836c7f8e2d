"""The metrics of a version, on images outside its training and calibration sets.

An image is anomalous if its score is strictly above the threshold. In the JSON values, `false_alarms` is the
false-positive rate, and `detections` the true-positive rate (recall).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from app.inference.detector import Detector
from app.models.calibration import Calibration, CalibrationError
from training.evaluation.calibrate import BAND_LEVEL, count_band, guard_counts
from training.evaluation.probes import Probe

INTERVAL_LEVEL = 0.95
USUAL_ALPHAS = (0.01, 0.05, 0.1)
PROBE_ALPHAS = (0.01, 0.05)

Scores = NDArray[np.float32]


def evaluate(
    scores: Scores, labels: NDArray[np.uint8], normal: Iterable[int], calibration: Calibration, alpha: float
) -> dict[str, Any]:
    """Compute the metrics of a test set.

    Args:
        scores: MSE of the test images, float32 [n].
        labels: labels of the test images, uint8 [n].
        normal: labels of the normal class.
        calibration: thresholds by false-positive rate.
        alpha: false-positive rate of the version.

    Returns:
        JSON values: `auroc` and `average_precision` (None if the test set has only one class), `operating_points` by
        alpha, `labels` with the metrics of each label, and the counts and levels of the intervals.
    """
    is_anomalous = ~np.isin(labels, list(normal))
    threshold = calibration.threshold(alpha)
    normals = scores[~is_anomalous]
    return {
        **ranking(normals, scores[is_anomalous]),
        "alpha": alpha,
        "interval_level": INTERVAL_LEVEL,
        "band_level": BAND_LEVEL,
        "operating_points": [
            operating_point(scores, is_anomalous, calibration, each)
            for each in sorted({alpha, *USUAL_ALPHAS})
            if supports(calibration, each)
        ],
        "labels": {
            str(label): {
                "normal": bool(not is_anomalous[labels == label][0]),
                "mean_mse": _mean(scores[labels == label]),
                "auroc": ranking(normals, scores[labels == label])["auroc"] if label not in set(normal) else None,
                "flagged": proportion(scores[labels == label] > threshold),
            }
            for label in np.unique(labels).tolist()
        },
    }


def probe_table(
    detector: Detector, probes: Sequence[Probe], calibration: Calibration, reasons: Sequence[str]
) -> list[dict[str, Any]]:
    """Compute the share of anomalous images in each probe.

    Args:
        detector: detector of the version.
        probes: images to score.
        calibration: thresholds by false-positive rate.
        reasons: names of the detector's guards.

    Returns:
        For each probe: `name`, `kind`, `images`, `flagged` (the share for each alpha that the calibration supports,
        by alpha as text) and `reasons` (the number of images that each guard rejected).
    """
    thresholds = {f"{alpha:g}": calibration.threshold(alpha) for alpha in PROBE_ALPHAS if supports(calibration, alpha)}
    table = []
    for probe in probes:
        detections = detector.detect(np.array(probe.images[:, None], order="C"))
        table.append(
            {
                "name": probe.name,
                "kind": probe.kind,
                "images": len(probe.images),
                "flagged": {alpha: float((detections.mse > limit).mean()) for alpha, limit in thresholds.items()},
                "reasons": guard_counts(detections.reason, reasons),
            }
        )
    return table


def ranking(normals: Scores, anomalies: Scores) -> dict[str, Any]:
    """Return the metrics without a threshold: counts, AUROC and average precision."""
    truth = np.repeat([0, 1], [len(normals), len(anomalies)])
    scores = np.concatenate([normals, anomalies])
    both = len(normals) > 0 and len(anomalies) > 0
    return {
        "test_normal": len(normals),
        "test_anomalous": len(anomalies),
        "auroc": float(roc_auc_score(truth, scores)) if both else None,
        "average_precision": float(average_precision_score(truth, scores)) if both else None,
    }


def operating_point(
    scores: Scores, is_anomalous: NDArray[np.bool_], calibration: Calibration, alpha: float
) -> dict[str, Any]:
    """Return false positives, their expected number, and true positives at the threshold of `alpha`."""
    threshold = calibration.threshold(alpha)
    false_positives = proportion(scores[~is_anomalous] > threshold)
    expected = count_band(len(calibration.scores), calibration.rank(alpha), false_positives["of"])
    return {
        "alpha": alpha,
        "threshold": threshold,
        "false_alarms": false_positives,
        "false_alarms_expected": list(expected),
        "detections": proportion(scores[is_anomalous] > threshold),
    }


def proportion(hits: NDArray[np.bool_]) -> dict[str, Any]:
    """Return a rate with its exact binomial interval (Clopper and Pearson, 1934) at `INTERVAL_LEVEL`."""
    count, total = int(hits.sum()), len(hits)
    if total == 0:
        return {"count": 0, "of": 0, "rate": None, "low": 0.0, "high": 1.0}
    interval = stats.binomtest(count, total).proportion_ci(INTERVAL_LEVEL, method="exact")
    low, high = float(interval.low), float(interval.high)
    return {"count": count, "of": total, "rate": count / total, "low": low, "high": high}


def supports(calibration: Calibration, alpha: float) -> bool:
    """Return whether there are enough calibration images for the false-positive rate `alpha`."""
    try:
        calibration.rank(alpha)
    except CalibrationError:
        return False
    return True


def _mean(scores: Scores) -> float:
    return float(scores.mean(dtype=np.float64))
