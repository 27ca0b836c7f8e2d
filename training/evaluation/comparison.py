"""Tests whether the scores of new normal images are like the calibration scores of a version."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.01
"""A recalibration counts as needed if the p-value is below this."""


@dataclass(frozen=True)
class Comparison:
    """The result for m new images.

    Attributes:
        above: number of images above the version's threshold.
        rate_p: p-value of that number, two-sided. If the new scores are exchangeable with the calibration scores, the
            number has a beta-binomial distribution.
        shape_p: p-value of the two-sample Kolmogorov-Smirnov test, which compares the whole distributions.
    """

    above: int
    rate_p: float
    shape_p: float

    @property
    def p_value(self) -> float:
        """Twice the smaller p-value, at most 1: valid for both tests together (Bonferroni)."""
        return min(1.0, 2 * min(self.rate_p, self.shape_p))

    @property
    def is_needed(self) -> bool:
        """Whether the scores differ at `LEVEL`."""
        return self.p_value < LEVEL


def compare(calibration: NDArray[np.float32], rank: int, new: NDArray[np.float32]) -> Comparison:
    """Compare the scores of new images with calibration scores.

    Args:
        calibration: sorted calibration scores, [n].
        rank: rank of the threshold among them, from 1.
        new: scores of the new images, [m], m at least 1.
    """
    size = len(calibration)
    above = int(np.count_nonzero(new > calibration[rank - 1]))
    number = stats.betabinom(len(new), size + 1 - rank, rank)
    rate_p = min(1.0, 2 * float(min(number.cdf(above), number.sf(above - 1))))
    shape_p = float(stats.ks_2samp(calibration, new, method="auto").pvalue)
    return Comparison(above, rate_p, shape_p)
