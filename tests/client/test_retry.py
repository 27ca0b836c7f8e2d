"""The wait before a retry, without a server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomaly import NO_RETRY, Retry, TimedOut, UnexpectedReply, Unreachable
from anomaly.client.errors import problem
from anomaly.client.wire import _retry_after

RETRY = Retry(patience=30.0, first=0.1, ceiling=5.0)


def largest(low: float, high: float) -> float:
    """Return the upper bound of the jitter."""
    assert low == 0.0
    return high


@pytest.mark.parametrize(("attempt", "wait"), [(0, 0.1), (1, 0.2), (2, 0.4), (5, 3.2), (6, 5.0), (1000, 5.0)])
def test_the_wait_doubles_up_to_its_ceiling(attempt: int, wait: float) -> None:
    """Without Retry-After the longest possible wait doubles with each attempt, up to the ceiling."""
    assert RETRY.wait(Unreachable("gone"), attempt, 0.0, largest) == pytest.approx(wait)


@given(attempt=st.integers(0, 10_000), elapsed=st.floats(0, 100))
def test_a_wait_never_passes_the_patience(attempt: int, elapsed: float) -> None:
    """No attempt begins later than the patience allows, and no wait is negative or above the ceiling."""
    wait = RETRY.wait(Unreachable("gone"), attempt, elapsed)
    assert wait is None or (0 <= wait <= RETRY.ceiling and elapsed + wait <= RETRY.patience)


def test_retry_after_is_kept_and_jitter_comes_on_top() -> None:
    """The wait is at least the service's Retry-After, plus jitter, so that clients do not retry at the same time."""
    busy = problem(503, {"type": "/problems/overloaded"}, retry_after=3.0)
    waits = {RETRY.wait(busy, 0, 0.0) for _ in range(50)}
    assert all(wait is not None and 3.0 <= wait <= 3.1 for wait in waits)
    assert len(waits) > 10


def test_a_service_that_asks_for_an_hour_is_not_waited_for() -> None:
    """A Retry-After beyond the patience raises at once instead of sleeping through it."""
    assert RETRY.wait(problem(503, {}, retry_after=3600.0), 0, 0.0) is None


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_what_passes_is_tried_again(status: int) -> None:
    """Temporary statuses are retried."""
    assert RETRY.wait(problem(status, {}), 0, 0.0) is not None


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 415, 422, 500])
def test_what_stays_is_raised(status: int) -> None:
    """A request is not retried if its error would be the same again."""
    assert RETRY.wait(problem(status, {}), 0, 0.0) is None


@pytest.mark.parametrize("error", [TimedOut("slow"), UnexpectedReply("html")], ids=["timed out", "unexpected"])
def test_silence_and_nonsense_are_raised(error: TimedOut | UnexpectedReply) -> None:
    """A timeout and a reply of another server are not retried."""
    assert RETRY.wait(error, 0, 0.0) is None


def test_no_retry_means_none() -> None:
    """`NO_RETRY` raises after the first attempt, for any error."""
    assert NO_RETRY.wait(Unreachable("gone"), 0, 0.0) is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("7", 7.0), (" 0 ", 0.0), ("soon", None), ("-1", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)
def test_retry_after_is_read_in_both_forms(header: str | None, seconds: float | None) -> None:
    """Seconds and dates (RFC 9110, 10.2.3) are accepted; any other value is ignored."""
    assert _retry_after(header) == seconds
