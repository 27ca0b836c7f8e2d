"""Anomalies of a whole lot of images at a false-discovery rate, by the Benjamini-Hochberg procedure.

The service does the same for `POST /score/batch?fdr=` (`app/scoring/discoveries.py`); the wheel has neither that code
nor numpy. The source is the same: Bates et al., "Testing for outliers with conformal p-values", 2023.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from anomaly import Score
from anomaly.cli.formats import Result

_LARGEST_CALIBRATION = 10**7
"""More calibration scores than any version has."""


class LotError(Exception):
    """The images were not scored by one model version, so their p-values cannot be compared."""


def q_values(p_values: Sequence[float]) -> list[float]:
    """Return the smallest false-discovery rate at which each image of a lot is a discovery."""
    size, lowest = len(p_values), Fraction(1)
    found = [1.0] * size
    for rank, place in zip(
        range(size, 0, -1), sorted(range(size), key=p_values.__getitem__, reverse=True), strict=True
    ):
        lowest = min(lowest, _exact(p_values[place]) * size / rank)
        found[place] = float(lowest)
    return found


@functools.lru_cache(maxsize=4096)
def _exact(p_value: float) -> Fraction:
    """Return the multiple of 1 / (n + 1) that is meant: a q-value that equals a rate must not be rounded above it."""
    return Fraction(p_value).limit_denominator(_LARGEST_CALIBRATION)


def with_discoveries(results: Sequence[Result], rate: float) -> list[Result]:
    """Return the results with the members `q_value` and `discovery`. Images without a score have none.

    Raises:
        LotError: another model version scored some of the images.
    """
    scored = [result.outcome for result in results if isinstance(result.outcome, Score)]
    versions = sorted({f"{score.model}@{score.version}" for score in scored})
    if len(versions) > 1:
        raise LotError(f"the lot was scored by several model versions: {', '.join(versions)}; name one with --model")
    values = iter(q_values([score.p_value for score in scored]))
    return [
        _with_q_value(result, next(values), rate) if isinstance(result.outcome, Score) else result for result in results
    ]


def _with_q_value(result: Result, value: float, rate: float) -> Result:
    return replace(result, q_value=value, is_discovery=value <= rate)


def summary(results: Sequence[Result], rate: float, calibration_size: int) -> str:
    """Return one line about the discoveries.

    Args:
        results: of `with_discoveries`.
        rate: the false-discovery rate.
        calibration_size: number of calibration scores; it limits the smallest p-value.
    """
    size = sum(result.q_value is not None for result in results)
    count = sum(bool(result.is_discovery) for result in results)
    found = f"discoveries at a false-discovery rate of {rate:g}: {count} of {size} images"
    needed = max(1, math.ceil(size / (Fraction(repr(rate)) * (calibration_size + 1))))
    if count or needed == 1:
        return found
    if needed > size:
        return f"{found}; with {calibration_size} calibration images, no discovery is possible at this rate"
    return (
        f"{found}; with {calibration_size} calibration images, fewer than {needed} anomalies in {size} images cannot "
        "be discovered at this rate"
    )
