"""Deadlines of many operations with one timer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")

_MIN_WAIT = 0.001
"""Seconds. uvloop's timers fire up to a millisecond early, and with less than half of one uvloop does not wait."""


class Deadlines(Generic[Key]):
    """Reports operations that exceed their time limit.

    A timer per operation would cost each request as much as decoding its image. All operations have the same time
    limit, so they expire in the order in which they began. Any thread may begin and end them.

    Args:
        seconds: time limit of each operation.
        on_missed: called on the event loop with the key of each operation that exceeds it; must not raise.
        clock: monotonic seconds.
    """

    def __init__(
        self, seconds: float, on_missed: Callable[[Key], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._on_missed = on_missed
        self._clock = clock
        self._lock = threading.Lock()
        self._expiry: dict[Key, float] = {}
        self._timer_runs = False

    def __len__(self) -> int:
        """Return the number of operations that have begun and neither ended nor missed their deadline."""
        return len(self._expiry)

    def __contains__(self, key: Key) -> bool:
        """Return whether an operation has begun and neither ended nor missed its deadline."""
        return key in self._expiry

    def begin(self, *keys: Key, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Start the time limit of operations. From any thread but the event loop's, `loop` is required."""
        with self._lock:
            if not self._timer_runs:
                loop = loop or asyncio.get_running_loop()  # this system call is needed for a timer only
                loop.call_soon_threadsafe(loop.call_later, self._seconds, self._expire, loop)
                self._timer_runs = True
            expiry = self._clock() + self._seconds
            for key in keys:
                self._expiry[key] = expiry

    def end(self, *keys: Key) -> bool:
        """End operations. Return False if one of them has missed its deadline or never began."""
        with self._lock:
            return None not in [self._expiry.pop(key, None) for key in keys]

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        late: list[Key] = []
        with self._lock:
            now = self._clock()
            wait = None
            for key, expiry in self._expiry.items():
                if expiry > now:
                    wait = max(expiry - now, _MIN_WAIT)
                    break
                late.append(key)
            for key in late:
                del self._expiry[key]
            self._timer_runs = wait is not None
        if wait is not None:
            loop.call_later(wait, self._expire, loop)
        for key in late:
            self._on_missed(key)
