"""The metrics of an evaluation, on scores with a known result."""

from __future__ import annotations

import json

import numpy as np
import pytest

from app.models.calibration import Calibration
from training.evaluation.figures import evaluate, proportion, ranking

CALIBRATION = Calibration([float(x) for x in range(1, 100)])


def scores(*values: float) -> np.ndarray:
    """Return float32 scores."""
    return np.array(values, np.float32)


def test_perfect_and_useless_rankings():
    """Separated scores have an AUROC of 1, swapped scores 0, and equal scores 0.5."""
    assert ranking(scores(1, 2), scores(3, 4))["auroc"] == 1.0
    assert ranking(scores(3, 4), scores(1, 2))["auroc"] == 0.0
    assert ranking(scores(1, 1), scores(1, 1))["auroc"] == 0.5


def test_a_test_of_one_kind_has_no_ranking():
    """For a test set of one class, the AUROC and the recall are None."""
    assert ranking(scores(1, 2), scores())["auroc"] is None
    metrics = evaluate(scores(1, 200), np.array([0, 0], np.uint8), (0,), CALIBRATION, 0.01)
    assert metrics["auroc"] is None
    assert metrics["operating_points"][0]["detections"]["rate"] is None


def test_at_the_threshold_is_normal():
    """A score equal to the threshold is normal; the next float above it is anomalous."""
    found = evaluate(
        scores(99, np.nextafter(np.float32(99), np.float32(100))), np.array([0, 1], np.uint8), (0,), CALIBRATION, 0.01
    )
    point = found["operating_points"][0]
    assert point["threshold"] == 99.0
    assert point["false_alarms"]["count"] == 0
    assert point["detections"]["count"] == 1


def test_each_label_has_its_figures():
    """Every label has a count, a mean score and a share of anomalous images; anomalous labels also have an AUROC."""
    found = evaluate(scores(1, 2, 100, 50, 200), np.array([0, 0, 1, 1, 7], np.uint8), (0,), CALIBRATION, 0.05)
    assert set(found["labels"]) == {"0", "1", "7"}
    assert found["labels"]["0"]["auroc"] is None
    assert found["labels"]["1"] == {
        "normal": False,
        "mean_mse": 75.0,
        "auroc": 1.0,
        "flagged": {
            "count": 1,
            "of": 2,
            "rate": 0.5,
            "low": pytest.approx(0.0126, abs=1e-4),
            "high": pytest.approx(0.9874, abs=1e-4),
        },
    }
    assert json.loads(json.dumps(found)) == found


def test_usual_rates_are_reported_where_the_calibration_supports_them():
    """Operating points are the version's alpha and the usual ones, without those that need more calibration images."""
    few = Calibration([float(x) for x in range(1, 31)])
    found = evaluate(scores(1, 50), np.array([0, 1], np.uint8), (0,), few, 0.2)
    assert [point["alpha"] for point in found["operating_points"]] == [0.05, 0.1, 0.2]


def test_intervals_are_clopper_and_pearsons():
    """The interval of 0 in 10 is 0 to 30.85 %, and the rate of 0 in 0 is None."""
    none = proportion(np.zeros(10, bool))
    assert (none["low"], none["high"]) == pytest.approx((0.0, 0.3085), abs=1e-4)
    assert proportion(np.zeros(0, bool))["rate"] is None
