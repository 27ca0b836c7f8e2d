"""The recall of a tested version at a threshold other than its own, from the histogram of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def recall_between(
    histogram: Mapping[str, Sequence[float]], points: Sequence[Mapping[str, Any]], threshold: float
) -> tuple[float, float] | None:
    """Return the least and the greatest possible recall at a threshold; None if the test had no anomalies.

    The histogram gives the number of anomalies in whole bins. At the thresholds of the test, the number is known
    exactly. The recall does not rise with the threshold, so both bound it.

    Args:
        histogram: `edges` [b + 1] and `anomalous` [b]; the first and the last bin contain all scores beyond them.
        points: `metrics.operating_points` of the version that was tested.
        threshold: an image is anomalous if its score is strictly above it.
    """
    counts = np.asarray(histogram["anomalous"], float)
    total = counts.sum()
    if not total:
        return None
    edges = np.asarray(histogram["edges"], float)
    starts, ends = edges[:-1].copy(), edges[1:].copy()
    starts[0], ends[-1] = -np.inf, np.inf
    low, high = counts[starts > threshold].sum() / total, counts[ends > threshold].sum() / total
    for point in points:
        rate = point["detections"]["rate"]
        if rate is None:
            continue
        if point["threshold"] >= threshold:
            low = max(low, rate)
        if point["threshold"] <= threshold:
            high = min(high, rate)
    return float(low), float(max(low, high))
