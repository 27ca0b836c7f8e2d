"""Ranks, thresholds and p-values of split-conformal calibration."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from app.models.calibration import Calibration, CalibrationError, confident_rank, conformal_rank

ALPHAS = st.one_of(
    st.integers(1, 999).map(lambda thousandths: thousandths / 1000),
    st.floats(0.001, 0.999, exclude_min=True, exclude_max=True),
)
SCORES = st.lists(st.floats(0, 100, width=32), min_size=1, max_size=300).map(sorted)


@given(st.integers(1, 5000), st.integers(1, 999))
def test_the_rank_is_the_formulas(n, thousandths):
    """The rank is ceil((n + 1)(1 - alpha)) in exact arithmetic, or there are fewer images than 1/alpha - 1."""
    alpha, exact = thousandths / 1000, Fraction(thousandths, 1000)
    rank = math.ceil((n + 1) * (1 - exact))
    if rank <= n:
        assert conformal_rank(n, alpha) == rank
    else:
        assert n < 1 / exact - 1
        with pytest.raises(CalibrationError):
            conformal_rank(n, alpha)


@given(st.integers(1, 5000), ALPHAS)
def test_the_rank_leaves_above_it_what_alpha_allows(n, alpha):
    """The most ranks k with k / (n + 1) at most alpha lie above the rank, also where alpha has no exact decimal."""
    above = max(k for k in range(n + 1) if k / (n + 1) <= alpha)
    if above:
        assert conformal_rank(n, alpha) == n + 1 - above
    else:
        with pytest.raises(CalibrationError):
            conformal_rank(n, alpha)


@pytest.mark.parametrize(
    ("n", "alpha", "rank"),
    [(99, 0.01, 99), (1200, 0.01, 1189), (19, 0.05, 19), (9, 0.1, 9), (1, 0.5, 1), (999, 0.3, 700)],
)
def test_ranks_at_whole_numbers_are_not_moved_by_rounding(n, alpha, rank):
    """Where (n + 1)(1 - alpha) is a whole number, that is the rank, whatever floats make of it."""
    assert conformal_rank(n, alpha) == rank


@given(SCORES, ALPHAS, st.floats(0, 100, width=32))
def test_above_the_threshold_is_a_small_p_value(scores, alpha, mse):
    """A score lies strictly above the threshold of alpha exactly when its p-value is at most alpha, ties included."""
    calibration = Calibration(scores)
    try:
        threshold = calibration.threshold(alpha)
    except CalibrationError:
        assume(False)
    for score in (mse, threshold, math.nextafter(threshold, math.inf)):
        assert (score > threshold) == (calibration.p_value(score) <= alpha)


@given(SCORES, st.floats(0, 100, width=32))
def test_the_p_value_is_the_formulas(scores, mse):
    """The p-value is (1 + number of calibration scores >= mse) / (n + 1)."""
    expected = (1 + sum(score >= mse for score in scores)) / (len(scores) + 1)
    calibration = Calibration(scores)
    assert calibration.p_value(mse) == expected
    assert calibration.p_values([mse, *scores[:3]]) == [expected, *map(calibration.p_value, scores[:3])]


def test_a_p_value_is_never_zero():
    """A score above all calibration scores has the p-value 1 / (n + 1); one below all of them has 1."""
    calibration = Calibration([1.0, 2.0, 3.0])
    assert calibration.p_value(100.0) == 0.25
    assert calibration.p_value(0.0) == 1.0


@given(st.integers(20, 200_000), st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.9]), st.sampled_from([0.6, 0.9, 0.99]))
def test_the_confident_rank_is_the_smallest_that_keeps_its_promise(n, alpha, confidence):
    """By its beta distribution, the rate is below alpha with the requested probability; one rank lower, it is not."""
    try:
        rank = confident_rank(n, alpha, confidence)
    except CalibrationError:
        assert stats.beta(1, n).cdf(alpha) < confidence or n < 1 / alpha - 1
        return
    assert stats.beta(n + 1 - rank, rank).cdf(alpha) >= confidence - 1e-9
    lower = rank - 1
    if lower >= conformal_rank(n, alpha):
        assert stats.beta(n + 1 - lower, lower).cdf(alpha) < confidence + 1e-9


@given(st.integers(1, 200_000), st.floats(1e-6, 0.999), st.sampled_from([0.9, 0.99]))
def test_confidence_asks_for_no_less_than_the_average(n, alpha, confidence):
    """A threshold with confidence is never below the one without."""
    try:
        assert confident_rank(n, alpha, confidence) >= conformal_rank(n, alpha)
    except CalibrationError:
        return


@pytest.mark.parametrize(
    ("alpha", "confidence", "needed"),
    [(0.01, None, 99), (0.05, None, 19), (0.01, 0.99, 459), (0.2, 0.5904, 4), (1 / 3, None, 2)],
)
def test_too_few_scores_say_how_many_are_needed(alpha, confidence, needed):
    """If there are too few images, the error names the required number, and with that number there is a threshold."""
    scores = [float(x) for x in range(needed)]
    assert Calibration(scores, confidence).threshold(alpha) == needed - 1
    for few in (1, needed - 1):
        with pytest.raises(CalibrationError, match=f"at least {needed} calibration images, and there are {few}"):
            Calibration(scores[:few], confidence).threshold(alpha)


@pytest.mark.parametrize("confidence", [None, 0.99])
def test_the_smallest_rate_is_refused_like_any_other(confidence):
    """A client may name any alpha: one for which no number of images is a float is an error of the same kind."""
    with pytest.raises(CalibrationError, match="needs at least"):
        Calibration([1.0] * 100, confidence).threshold(5e-324)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, math.nan, math.inf])
def test_an_alpha_that_is_no_rate_is_refused(alpha):
    """Only a number between 0 and 1 is a false-alarm rate."""
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        Calibration([1.0] * 100).threshold(alpha)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, math.nan])
def test_a_confidence_that_is_no_probability_is_refused(confidence):
    """Only a number between 0 and 1 is a confidence."""
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        confident_rank(1000, 0.05, confidence)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan")])
def test_a_bad_alpha_is_named_also_with_a_confidence(alpha):
    """With a confidence, an alpha outside (0, 1) is rejected as alpha, before it is computed with."""
    with pytest.raises(CalibrationError, match="alpha must lie between 0 and 1"):
        confident_rank(1000, alpha, 0.9)
