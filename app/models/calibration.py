"""From the scores of held-out normal images to thresholds and p-values.

Scope: order statistics. Independent of images, models, files and HTTP.

Split-conformal prediction: with n calibration scores exchangeable with the score of a new normal image, the
threshold at rank ceil((n + 1)(1 - alpha)) is exceeded by that image with probability at most alpha, averaged over
calibration draws (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005; Papadopoulos et al.,
"Inductive Confidence Machines for Regression", 2002). Conditional on the calibration draw, and for continuous scores,
the false-positive rate at rank r follows Beta(n + 1 - r, r) (Vovk, "Conditional validity of inductive conformal
predictors", 2012), which gives the exact band and the ranks for a wanted confidence.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache


class CalibrationError(ValueError):
    """There are too few calibration scores for the rate; the message contains the number that is needed."""


def _binomial_tail(n: int, successes: int, p: float) -> float:
    """Return P(Binomial(n, p) >= successes), for p in (0, 1) and 1 <= successes <= (n + 1) p."""
    # The lower tail, from its largest term down to the term that no longer changes the sum. A client may send any
    # alpha, and this runs on the event loop.
    below = successes - 1
    ways = math.lgamma(n + 1) - math.lgamma(below + 1) - math.lgamma(n - below + 1)
    term = total = math.exp(ways + below * math.log(p) + (n - below) * math.log1p(-p))
    odds = p / (1.0 - p)
    for k in range(below, 0, -1):
        term *= k / (n - k + 1) / odds
        if total + term == total:
            break
        total += term
    return 1.0 - min(1.0, total)


def needed(alpha: float, confidence: float | None = None) -> int:
    """Return the minimum number of calibration images for a false-positive rate of `alpha`, both in (0, 1)."""
    average = math.ceil(1 / Fraction(repr(alpha))) - 1
    # One image less is enough for an alpha such as 1/3: see `conformal_rank`.
    average -= 1 / average <= alpha
    certain = 0.0 if confidence is None else math.log1p(-confidence) / math.log1p(-alpha)
    # For the smallest floats that a client may send, the quotient is infinite.
    return max(average, math.ceil(certain)) if certain < math.inf else average


def conformal_rank(n: int, alpha: float) -> int:
    """Return the rank ceil((n + 1)(1 - alpha)), counted from 1, of the threshold among `n` sorted scores.

    `alpha` is taken as the decimal number that it prints as, so that no rounding error moves the rank, and an image is
    above the threshold exactly when its p-value is at most `alpha`, in floating point too.

    Raises:
        CalibrationError: `alpha` is not in (0, 1), or `n` is below 1/alpha - 1.
    """
    _check_rate(alpha)
    exact = Fraction(repr(alpha))
    above = math.floor((n + 1) * exact)
    # 1/3, for example, has no exact decimal. 3 of 9 equals `alpha` if both round to the same float.
    above += (above + 1) / (n + 1) <= alpha
    rank = n + 1 - above
    if rank > n:
        least = _rounded(needed(alpha))
        raise CalibrationError(
            f"a false-positive rate of {alpha:g} needs at least {least} calibration images, and there are {n}"
        )
    return rank


def _rounded(count: int) -> str:
    return str(count) if count < 10**12 else f"10^{len(str(count)) - 1}"


def confident_rank(n: int, alpha: float, confidence: float) -> int:
    """Return the smallest rank whose false-positive rate is at most `alpha` with probability `confidence`.

    The false-positive rate at rank r is Beta(n + 1 - r, r), so this is the smallest r with
    P(Beta(n + 1 - r, r) <= alpha) >= confidence, where that probability equals P(Binomial(n, alpha) >= n + 1 - r).

    Raises:
        CalibrationError: `alpha` or `confidence` is not in (0, 1), or `n` is too small for both.
    """
    if not 0.0 < confidence < 1.0:
        raise CalibrationError(f"confidence must lie between 0 and 1, not {confidence:g}")
    _check_rate(alpha)
    if n < needed(alpha, confidence):
        raise CalibrationError(
            f"a false-positive rate of {alpha:g} with confidence {confidence:g} needs at least "
            f"{_rounded(needed(alpha, confidence))} calibration images, and there are {n}"
        )
    low, high = conformal_rank(n, alpha), n
    while low < high:
        middle = (low + high) // 2
        if _binomial_tail(n, n + 1 - middle, alpha) >= confidence:
            high = middle
        else:
            low = middle + 1
    return low


def _check_rate(alpha: float) -> None:
    if not 0.0 < alpha < 1.0:
        raise CalibrationError(f"alpha must lie between 0 and 1, not {alpha:g}")


@dataclass(frozen=True)
class Calibration:
    """The sorted scores of held-out normal images, and what follows from them.

    Attributes:
        scores: MSE of every calibration image, ascending, [n].
        confidence: None for the average guarantee, else the probability over calibration draws with which the
            false-positive rate stays at or below alpha.
    """

    scores: Sequence[float]
    confidence: float | None = None

    def rank(self, alpha: float) -> int:
        """Return the rank of the threshold for a false-positive rate of `alpha`.

        Raises:
            CalibrationError: there are too few scores for `alpha`.
        """
        return _rank(len(self.scores), alpha, self.confidence)

    def threshold(self, alpha: float) -> float:
        """Return the score that a normal image exceeds with probability at most `alpha`.

        Raises:
            CalibrationError: there are too few scores for `alpha`.
        """
        return float(self.scores[self.rank(alpha) - 1])

    def p_value(self, mse: float) -> float:
        """Return (1 + number of calibration scores >= `mse`) / (n + 1), in (0, 1]."""
        n = len(self.scores)
        return (1 + n - bisect_left(self.scores, mse)) / (n + 1)

    def p_values(self, mses: Iterable[float]) -> list[float]:
        """Return the p-value of each score."""
        n, scores = len(self.scores), self.scores
        return [(1 + n - bisect_left(scores, mse)) / (n + 1) for mse in mses]


@lru_cache(maxsize=1024)
def _rank(n: int, alpha: float, confidence: float | None) -> int:
    return conformal_rank(n, alpha) if confidence is None else confident_rank(n, alpha, confidence)
