"""An interval for the share of images that are called anomalous, valid at all times at once."""

from __future__ import annotations

import math
from collections.abc import Callable


def share_interval(successes: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return a confidence sequence for a share: it contains the true share at every count at once with `level`.

    An image counts as a draw with a fixed probability. The interval contains the shares that the beta-binomial mixture
    with Jeffreys' prior does not reject at the factor 1 / (1 - level) (Robbins, "Statistical methods related to the law
    of the iterated logarithm", 1970).

    Args:
        successes: number of images called anomalous.
        count: number of images.
        level: between 0 and 1.
    """
    if count == 0:
        return 0.0, 1.0
    failures = count - successes
    evidence = _log_beta(successes + 0.5, failures + 0.5) - _log_beta(0.5, 0.5) + math.log1p(-level)

    def rejected(share: float) -> bool:
        likelihood = (successes * math.log(share) if successes else 0.0) + (
            failures * math.log1p(-share) if failures else 0.0
        )
        return evidence > likelihood

    middle = successes / count
    low = 0.0 if successes == 0 else _boundary(0.0, middle, rejected_at_first=True, rejected=rejected)
    high = 1.0 if failures == 0 else _boundary(middle, 1.0, rejected_at_first=False, rejected=rejected)
    return low, high


def _boundary(low: float, high: float, *, rejected_at_first: bool, rejected: Callable[[float], bool]) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        if rejected(middle) == rejected_at_first:
            low = middle
        else:
            high = middle
    return low if rejected_at_first else high


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
