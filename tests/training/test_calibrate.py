"""The exact intervals of a split-conformal threshold, compared with simulated scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.models.calibration import CalibrationError, needed
from training.evaluation.calibrate import band, calibrate, check_guards, count_band, score, smallest_alpha

# So rare that a test that draws thousands of times never meets it by chance.
SURELY = 1 - 1e-9


@settings(max_examples=200)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(99, 2000),
    st.sampled_from([0.01, 0.05, 0.1, 0.5]),
    st.sampled_from([None, 0.9]),
)
def test_false_alarms_of_fresh_normals_lie_in_the_exact_band(seed, n, alpha, confidence):
    """For any n, alpha and confidence, the false positives among 1,000 new scores are in the beta-binomial interval."""
    generator = np.random.default_rng(seed)
    if confidence is not None and (1 - alpha) ** n > 1 - confidence:
        return
    calibration, summary = calibrate(generator.exponential(size=n).astype(np.float32), alpha, confidence)
    fresh = generator.exponential(size=1000).astype(np.float32)
    low, high = count_band(n, summary.rank, 1000, SURELY)
    assert low <= (fresh > np.float32(calibration.threshold(alpha))).sum() <= high


def test_the_average_false_alarm_rate_is_the_wanted_one():
    """Over 1,000 calibration draws, the mean false-positive rate is alpha within the sampling error."""
    generator = np.random.default_rng(0)
    rates = []
    for _ in range(1000):
        calibration, _ = calibrate(generator.random(199, dtype=np.float32), 0.05)
        rates.append(1 - calibration.threshold(0.05))  # of uniform scores, the rate is what lies above
    # The Beta(10, 190) law has the mean 0.05 and the standard deviation 0.0154.
    assert abs(np.mean(rates) - 0.05) < 5 * 0.0154 / np.sqrt(1000)


def test_confidence_is_kept_over_calibration_draws():
    """With confidence 0.9, the false-positive rate is at most alpha in at least 90 % of calibration draws."""
    generator = np.random.default_rng(0)
    kept = [
        1 - calibrate(generator.random(500, dtype=np.float32), 0.05, 0.9)[0].threshold(0.05) <= 0.05
        for _ in range(1000)
    ]
    assert np.mean(kept) > 0.9 - 5 * 0.3 / np.sqrt(1000)


def test_the_band_is_the_known_one():
    """For n = 1,200 and alpha 0.01 the 99 % interval of the rate is 0.41 % to 1.89 % (Beta(12, 1189))."""
    assert band(1200, 1189) == pytest.approx((0.00413, 0.01889), abs=1e-5)


@pytest.mark.parametrize(("alpha", "needed"), [(0.01, 99), (0.05, 19), (0.001, 999), (0.3, 3)])
def test_too_few_images_say_how_many_are_needed(alpha, needed):
    """With one image too few, the error contains the minimum number; with that number, calibration succeeds."""
    scores = np.arange(1, needed + 1, dtype=np.float32)
    assert calibrate(scores, alpha)[1].n == needed
    with pytest.raises(CalibrationError, match=f"at least {needed} calibration images"):
        calibrate(scores[1:], alpha)


def test_scoring_is_the_same_in_pieces(detector, digits):
    """Scores do not depend on the batch size, and zero images give zero scores."""
    images = digits.images[:70]
    pieces = score(detector, images, batch_size=32)
    assert np.abs(pieces / score(detector, images, batch_size=7) - 1).max() <= 1e-6
    assert score(detector, images[:0]).shape == (0,)


@pytest.mark.parametrize("confidence", [None, 0.95])
@pytest.mark.parametrize("n", [1, 5, 19, 20, 99, 100, 1185])
def test_the_smallest_alpha_works_and_a_smaller_one_does_not(n: int, confidence: float | None) -> None:
    """The returned rate has enough images; a rate 6 % lower has too few. The rate is rounded to two digits."""
    alpha = smallest_alpha(n, confidence)
    assert alpha is not None
    assert needed(alpha, confidence) <= n < needed(alpha / 1.12, confidence)


def test_no_alpha_works_without_images() -> None:
    """Without images, no rate is possible, and the result is None."""
    assert smallest_alpha(0) is None


def test_a_local_signal_is_no_guard():
    """Calibration images whose score is the local signal are not counted as rejected, and do not fail a calibration."""
    scores, reason = np.array([0.1, 0.2, 0.3, 4.0], np.float32), np.array([0, 3, 3, 1], np.int8)
    names = ("empty", "too_much_ink", "local")
    assert check_guards(scores, reason, names, threshold=0.3, guard_error=4.0) == {"empty": 1}
    with pytest.raises(CalibrationError, match="empty 1"):
        check_guards(scores, reason, names, threshold=4.0, guard_error=4.0)
