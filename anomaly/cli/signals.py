"""Stop a command on Ctrl-C and SIGTERM."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import FrameType


class StopFlag:
    """A flag that a signal handler may set, and a wait that ends when it is set.

    A signal handler must not set a `threading.Event`: if it interrupts the thread that holds the event's lock, it waits
    for that lock forever. `SimpleQueue.put` is reentrant.

    Attributes:
        is_set: whether the command should stop.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._queue: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Set the flag, and end a wait."""
        self.is_set = True
        self._queue.put(None)

    def wait(self, seconds: float) -> None:
        """Return when the flag is set, or after this many seconds."""
        with suppress(Empty):
            self._queue.get(timeout=seconds)


@contextmanager
def stop_on(signals: Iterable[int], stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` at the first of these signals; the second one ends the process at once.

    Signals that are ignored stay ignored: a shell ignores SIGINT for its background jobs.
    """
    previous = {number: signal.getsignal(number) for number in signals}
    handled = [number for number, handler in previous.items() if handler != signal.SIG_IGN]

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
        with suppress(OSError):
            os.write(2, b"stopping; press Ctrl-C again to end at once\n")  # the signal may interrupt `sys.stderr`
        stop()

    for number in handled:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])


def interrupt() -> None:
    """Raise KeyboardInterrupt."""
    raise KeyboardInterrupt
