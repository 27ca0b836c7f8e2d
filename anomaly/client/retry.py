"""Decide whether to repeat a request, and after how many seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from anomaly.client.errors import Problem, ServiceError, Unreachable

_TRANSIENT = frozenset((408, 429, 502, 503, 504))
"""Statuses to retry. Scoring an image twice has no side effect but a second id, so every request may be repeated."""


@dataclass(frozen=True)
class Retry:
    """Exponential backoff with full jitter, within a time budget.

    The wait before attempt n + 1 is drawn from 0 to `first` * 2^n seconds, but at most `ceiling`. The jitter spreads
    clients that were rejected at the same time. `Retry-After` is added to the wait. A timeout is not retried: the
    service has its own deadline and returns 504, so a repeated request would only add load.

    Attributes:
        patience: time budget in seconds; no attempt begins later than this after the first one.
        first: upper bound of the first wait, in seconds.
        ceiling: upper bound of every wait without `Retry-After`, in seconds.
    """

    patience: float = 30.0
    first: float = 0.1
    ceiling: float = 5.0

    def wait(
        self, error: ServiceError, attempt: int, elapsed: float, uniform: Callable[[float, float], float] | None = None
    ) -> float | None:
        """Return the seconds to wait before the next attempt, or None if the error is final.

        Args:
            error: error of the last attempt.
            attempt: number of the last attempt, counted from 0.
            elapsed: seconds since the first attempt began.
            uniform: function that draws a number between two others. Default: `random.uniform`.
        """
        if not _is_transient(error):
            return None
        jitter = (uniform or random.uniform)(0.0, min(self.ceiling, self.first * 2.0 ** min(attempt, 60)))
        wait = jitter + ((error.retry_after or 0.0) if isinstance(error, Problem) else 0.0)
        return wait if elapsed + wait <= self.patience else None


NO_RETRY = Retry(patience=-1.0)
"""One attempt."""


def _is_transient(error: ServiceError) -> bool:
    return isinstance(error, Unreachable) or (isinstance(error, Problem) and error.status in _TRANSIENT)
