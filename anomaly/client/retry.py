"""When to ask again, and how long to wait before. Knows: errors, waiting. Does not know: HTTP libraries, threads."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from anomaly.client.errors import Problem, ServiceError, Unreachable

_PASSING = frozenset((408, 429, 502, 503, 504))
"""Statuses that may be gone in a moment. Scoring an image twice changes nothing, so every route may be repeated."""


@dataclass(frozen=True)
class Retry:
    """Exponential back-off with full jitter, within a budget of time.

    The wait before attempt n + 1 is drawn from 0 to `first` x 2^n seconds, at most `ceiling`: callers that were
    refused together do not come back together. Where the service names a time (Retry-After), it is kept, and the
    jitter comes on top. A time-out is not retried: the service has a deadline of its own and says so when it is busy,
    so silence is not cured by more load.

    Attributes:
        patience: seconds from the first attempt after which none is begun.
        first: upper bound of the first wait, in seconds.
        ceiling: upper bound of every wait that the service does not name, in seconds.
    """

    patience: float = 30.0
    first: float = 0.1
    ceiling: float = 5.0

    def wait(
        self, error: ServiceError, attempt: int, elapsed: float, uniform: Callable[[float, float], float] | None = None
    ) -> float | None:
        """Return the seconds to wait before the next attempt, or None when the error should be raised.

        Args:
            error: how the attempt failed.
            attempt: its number, from 0.
            elapsed: seconds since the first attempt began.
            uniform: draws a number between two others; `random.uniform` unless told.
        """
        if not _passes(error):
            return None
        jitter = (uniform or random.uniform)(0.0, min(self.ceiling, self.first * 2.0 ** min(attempt, 60)))
        wait = jitter + ((error.retry_after or 0.0) if isinstance(error, Problem) else 0.0)
        return wait if elapsed + wait <= self.patience else None


NO_RETRY = Retry(patience=-1.0)
"""Ask once."""


def _passes(error: ServiceError) -> bool:
    return isinstance(error, Unreachable) or (isinstance(error, Problem) and error.status in _PASSING)
