"""How good the verdicts are, on images that neither training nor calibration saw.

Knows: scores, labels, statistics. Does not know: models, files. Anomalous means a score strictly above the threshold.
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
from training.evaluation.calibrate import BAND_LEVEL, caught, count_band
from training.evaluation.probes import Probe

INTERVAL_LEVEL = 0.95
USUAL_ALPHAS = (0.01, 0.05, 0.1)
PROBE_ALPHAS = (0.01, 0.05)

Scores = NDArray[np.float32]


def evaluate(
    scores: Scores, labels: NDArray[np.uint8], normal: Iterable[int], calibration: Calibration, alpha: float
) -> dict[str, Any]:
    """Measure the verdicts on a test set.

    Args:
        scores: MSE of the test images, float32 [n].
        labels: of those, [n].
        normal: the labels of the normal class.
        calibration: gives the threshold of a false-alarm rate.
        alpha: the false-alarm rate that the version answers with.

    Returns:
        JSON values: `auroc` and `average_precision` (None where the test has only one kind), `operating_points` by
        alpha, `labels` with the figures of each label, and the counts and the level of the intervals.
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
            operating_point(scores, is_anomalous, calibration, point)
            for point in sorted({alpha, *USUAL_ALPHAS})
            if supports(calibration, point)
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
    """Measure which share of each probe is called anomalous.

    Args:
        detector: scores them.
        probes: what to score.
        calibration: gives the thresholds.
        reasons: names of the detector's guards.

    Returns:
        For each probe: `name`, `kind`, `images`, `flagged` (the share at each alpha that the calibration supports, by
        alpha as text) and `reasons` (how many images each guard caught).
    """
    thresholds = {f"{alpha:g}": calibration.threshold(alpha) for alpha in PROBE_ALPHAS if supports(calibration, alpha)}
    table = []
    for probe in probes:
        found = detector.detect(np.array(probe.images[:, None], order="C"))
        table.append(
            {
                "name": probe.name,
                "kind": probe.kind,
                "images": len(probe.images),
                "flagged": {alpha: float((found.mse > limit).mean()) for alpha, limit in thresholds.items()},
                "reasons": caught(found.reason, reasons),
            }
        )
    return table


def ranking(normals: Scores, anomalies: Scores) -> dict[str, Any]:
    """Return the counts, AUROC and average precision of telling `anomalies` from `normals`, without a threshold."""
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
    """Return false alarms and detections at the threshold of `alpha`, and how many false alarms were to be expected."""
    threshold = calibration.threshold(alpha)
    false_alarms = proportion(scores[~is_anomalous] > threshold)
    expected = count_band(len(calibration.scores), calibration.rank(alpha), false_alarms["of"])
    return {
        "alpha": alpha,
        "threshold": threshold,
        "false_alarms": false_alarms,
        "false_alarms_expected": list(expected),
        "detections": proportion(scores[is_anomalous] > threshold),
    }


def proportion(hits: NDArray[np.bool_]) -> dict[str, Any]:
    """Return a rate with its exact binomial interval (Clopper and Pearson, 1934) at `INTERVAL_LEVEL`."""
    count, of = int(hits.sum()), len(hits)
    if of == 0:
        return {"count": 0, "of": 0, "rate": None, "low": 0.0, "high": 1.0}
    interval = stats.binomtest(count, of).proportion_ci(INTERVAL_LEVEL, method="exact")
    return {"count": count, "of": of, "rate": count / of, "low": float(interval.low), "high": float(interval.high)}


def supports(calibration: Calibration, alpha: float) -> bool:
    """Say whether there are enough calibration images for a false-alarm rate of `alpha`."""
    try:
        calibration.rank(alpha)
    except CalibrationError:
        return False
    return True


def _mean(scores: Scores) -> float:
    return float(scores.mean(dtype=np.float64))
