"""Time limits of many things at once.

Knows: asyncio's clock. Does not know: what takes its time, and what happens to it afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")


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
        loop = asyncio.get_running_loop()
        self._expiry[key] = expiry = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_at(expiry, self._look, loop)

    def end(self, key: Key) -> None:
        """Count no longer. Nothing happens when it has missed its deadline, or never began."""
        self._expiry.pop(key, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        late: list[Key] = []
        for key, expiry in self._expiry.items():
            if expiry > loop.time():
                self._timer = loop.call_at(expiry, self._look, loop)
                break
            late.append(key)
        for key in late:
            del self._expiry[key]
        for key in late:
            self._missed(key)
