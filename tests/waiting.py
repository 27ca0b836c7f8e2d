"""Waits of tests: `until` polls a condition of other threads and processes; `virtual_time` makes timers instant."""

from __future__ import annotations

import asyncio
import functools
import inspect
import selectors
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

Condition = Callable[[], object]
Describe = Callable[[], object]

_POLL_SECONDS = 0.005


async def until(condition: Condition, seconds: float = 30, *, describe: Describe = str) -> None:
    """Return when `condition` is true. The event loop runs in between.

    Args:
        condition: returns a truth value, or an awaitable of one.
        seconds: time limit; then an `AssertionError` is raised.
        describe: returns what the error says, for example a log.
    """
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return
        assert time.monotonic() < end, f"the condition is false after {seconds:g} s: {describe()}"
        await asyncio.sleep(_POLL_SECONDS)


def wait_until(condition: Condition, seconds: float = 30, *, describe: Describe = str) -> None:
    """Return when `condition` is true, in a test without an event loop. Arguments as for `until`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition is false after {seconds:g} s: {describe()}"
        time.sleep(_POLL_SECONDS)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer when no callback is ready."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """Return virtual seconds."""
        return self.now


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Without a timer (None), only a thread can make a callback ready.
        events = super().select(None if timeout is None else 0)
        if timeout and not events:
            self._loop.now += timeout
        return events


def virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in a `VirtualTimeLoop`. The code under test must take the loop's time as its clock."""

    @functools.wraps(test)
    def run(*given: Any, **named: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(test(*given, **named))

    return run


def advance(seconds: float) -> Awaitable[None]:
    """Let virtual time pass."""
    assert isinstance(asyncio.get_running_loop(), VirtualTimeLoop), "only a test with `virtual_time` controls the time"
    return asyncio.sleep(seconds)
