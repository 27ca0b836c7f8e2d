"""Time limits of many things at once.

Knows: the clock, asyncio's timers. Does not know: what takes its time, and what happens to it afterwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")

LEAST_WAIT = 0.001
"""Seconds. uvloop's timers go off up to a millisecond early, and for less than half of one it does not wait at all."""


class Deadlines(Generic[Key]):
    """Says which things took too long, with one timer for all of them.

    A timer of its own would cost each request as much as decoding its image. All things have the same time, so that it
    runs out in the order in which they began.

    Args:
        seconds: how long each may take.
        missed: is called on the event loop with each that took longer.
    """

    def __init__(self, seconds: float, missed: Callable[[Key], object]) -> None:
        self._seconds = seconds
        self._missed = missed
        self._expiry: dict[Key, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many things have begun and neither ended nor missed their deadline."""
        return len(self._expiry)

    def begin(self, key: Key) -> None:
        """Count from now."""
        self._expiry[key] = time.monotonic() + self._seconds
        if self._timer is None:  # asking for the event loop is a system call
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)

    def end(self, key: Key) -> None:
        """Count no longer. Nothing happens when it has missed its deadline, or never began."""
        self._expiry.pop(key, None)

    def _look(self) -> None:
        self._timer = None
        late: list[Key] = []
        now = time.monotonic()
        for key, expiry in self._expiry.items():
            if expiry > now:
                self._timer = asyncio.get_running_loop().call_later(max(expiry - now, LEAST_WAIT), self._look)
                break
            late.append(key)
        for key in late:
            del self._expiry[key]
        for key in late:
            self._missed(key)
