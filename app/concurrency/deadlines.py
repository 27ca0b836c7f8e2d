"""Time limits of many things at once.

Knows: the clock, asyncio's timers. Does not know: what takes its time, and what happens to it afterwards.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")

_LEAST_WAIT = 0.001
"""Seconds. uvloop's timers go off up to a millisecond early, and for less than half of one it does not wait at all."""


class Deadlines(Generic[Key]):
    """Says which things took too long, with one timer for all of them.

    A timer of its own would cost each request as much as decoding its image. All things have the same time, so that it
    runs out in the order in which they began. Any thread may begin and end them.

    Args:
        seconds: how long each may take.
        missed: is called on the event loop with each that took longer, and must not raise.
    """

    def __init__(self, seconds: float, missed: Callable[[Key], object]) -> None:
        self._seconds = seconds
        self._missed = missed
        self._lock = threading.Lock()
        self._expiry: dict[Key, float] = {}
        self._timer_runs = False

    def __len__(self) -> int:
        """How many things have begun and neither ended nor missed their deadline."""
        return len(self._expiry)

    def __contains__(self, key: Key) -> bool:
        """Whether a thing has begun and neither ended nor missed its deadline."""
        return key in self._expiry

    def begin(self, key: Key, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Count from now. From any other thread than the event loop's, `loop` must be given."""
        with self._lock:
            if not self._timer_runs:
                loop = loop or asyncio.get_running_loop()  # asked for seldom: it is a system call
                loop.call_soon_threadsafe(loop.call_later, self._seconds, self._look, loop)
                self._timer_runs = True
            self._expiry[key] = time.monotonic() + self._seconds

    def end(self, key: Key) -> bool:
        """Count no longer. Returns False when it has missed its deadline, or never began."""
        with self._lock:
            return self._expiry.pop(key, None) is not None

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        late: list[Key] = []
        with self._lock:
            now = time.monotonic()
            wait = None
            for key, expiry in self._expiry.items():
                if expiry > now:
                    wait = max(expiry - now, _LEAST_WAIT)
                    break
                late.append(key)
            for key in late:
                del self._expiry[key]
            self._timer_runs = wait is not None
        if wait is not None:
            loop.call_later(wait, self._look, loop)
        for key in late:
            self._missed(key)
