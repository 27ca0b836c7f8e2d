"""Anomalies of a whole batch at a false-discovery rate, by the Benjamini-Hochberg procedure.

P-values that share one calibration depend on each other, but the procedure still controls the rate over one batch
(Bates et al., "Testing for outliers with conformal p-values", 2023). It does not control the rate over several batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Discoveries:
    """The anomalies of a batch.

    Attributes:
        q_values: the smallest rate at which each image is a discovery, [N].
        count: number of discoveries.
        cutoff: an image is a discovery if its p-value is at most this; None without discoveries.
        min_discoveries: minimum number of discoveries. The smallest possible p-value, 1 / (n + 1), limits it.
        resolution_limited: whether nothing was discovered and `min_discoveries` is above 1.
    """

    q_values: list[float]
    count: int
    cutoff: float | None
    min_discoveries: int
    resolution_limited: bool


def discoveries(p_values: Sequence[float], rate: float, calibration_size: int) -> Discoveries:
    """Return the images that are anomalous at a false-discovery rate.

    Args:
        p_values: of the N images of a batch.
        rate: the maximum expected share of normal images among the discoveries.
        calibration_size: number of calibration scores, n.
    """
    size = len(p_values)
    # The decimal that is meant: 0.1 * 1000 / 100 must not need two discoveries instead of one.
    needed = max(1, math.ceil(size / (Fraction(repr(rate)) * (calibration_size + 1))))
    if size == 0:
        return Discoveries([], 0, None, needed, resolution_limited=False)
    p = np.asarray(p_values)
    order = np.argsort(p, kind="stable")
    # P-values are multiples of 1 / (n + 1). With one division, a q-value that equals the rate is not rounded above it.
    multiples = np.rint(p[order] * (calibration_size + 1))
    raw = multiples * size / (np.arange(1, size + 1) * (calibration_size + 1.0))
    q = np.empty(size)
    q[order] = np.minimum(np.minimum.accumulate(raw[::-1])[::-1], 1.0)
    found = q <= rate
    count = int(np.count_nonzero(found))
    cutoff = float(p[found].max()) if count else None
    return Discoveries(q.tolist(), count, cutoff, needed, resolution_limited=not count and needed > 1)
