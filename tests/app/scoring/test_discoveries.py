"""Discoveries of a batch at a false-discovery rate, compared with scipy and with a simulation."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from app.models.calibration import Calibration
from app.scoring.discoveries import Discoveries, discoveries


@given(st.lists(st.integers(1, 101), min_size=1, max_size=300), st.sampled_from([0.01, 0.05, 0.1, 0.5]))
def test_q_values_equal_those_of_scipy(ranks: list[int], rate: float) -> None:
    """The q-values are those of scipy, and the cut-off separates the discoveries."""
    p_values = [rank / 101 for rank in ranks]
    found = discoveries(p_values, rate, 100)
    expected = false_discovery_control(p_values, method="bh")
    assert np.allclose(found.q_values, expected, rtol=1e-12)
    by_cutoff = [found.cutoff is not None and p <= found.cutoff for p in p_values]
    assert by_cutoff == [q <= rate for q in found.q_values]
    assert found.count == sum(by_cutoff)
    assert found.count == 0 or found.count >= found.min_discoveries


@pytest.mark.parametrize(
    ("size", "strongest", "count", "needed", "limited"),
    [
        (100, 1, 0, 10, True),
        (100, 9, 0, 10, True),
        (100, 10, 10, 10, False),
        (10, 1, 1, 1, False),
        (10, 0, 0, 1, False),
    ],
)
def test_the_resolution_is_reported(size: int, strongest: int, count: int, needed: int, limited: bool) -> None:
    """At a rate of 0.1 with 99 calibration scores, N images need N / 10 discoveries."""
    found = discoveries([0.01] * strongest + [0.9] * (size - strongest), 0.1, 99)
    assert (found.count, found.min_discoveries, found.resolution_limited) == (count, needed, limited)


@given(st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(1, 10), st.integers(1, 100_000))
def test_any_rate_has_a_minimum_number_of_discoveries(rate: float, size: int, calibration_size: int) -> None:
    """Below the minimum number of discoveries, even the smallest possible p-values exceed the rate."""
    found = discoveries([1.0] * size, rate, calibration_size)
    assert found.min_discoveries * Fraction(repr(rate)) * (calibration_size + 1) >= size
    fewer = found.min_discoveries - 1
    assert fewer == 0 or fewer * Fraction(repr(rate)) * (calibration_size + 1) < size


def test_an_empty_batch_has_no_discoveries() -> None:
    """Nothing is found among no images."""
    assert discoveries([], 0.1, 99) == Discoveries([], 0, None, 1, resolution_limited=False)


def test_the_rate_holds_on_average() -> None:
    """Over 5,000 fresh calibrations, the mean share of normal images among the discoveries is at most the rate."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(5000):
        calibration = Calibration(np.sort(rng.normal(size=200)).tolist())
        scores = np.concatenate([rng.normal(size=90), rng.normal(3, 1, size=10)])
        found = discoveries(calibration.p_values(scores.tolist()), 0.2, 200)
        is_found = np.array(found.q_values) <= 0.2
        shares.append(is_found[:90].sum() / max(1, is_found.sum()))
    assert np.mean(shares) <= 0.2
    assert np.mean(shares) > 0.1
