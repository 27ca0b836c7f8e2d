"""A thread that works for the event loop, one piece of work after the other, what is urgent first.

Knows: threads, futures. Does not know: what the work is.

`concurrent.futures` does the same with a future, a lock and a condition of its own for every piece, which costs a lone
request as much as decoding its image.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

Answer = TypeVar("Answer")
Piece = tuple[Callable[[], Any], "asyncio.Future[Any]", asyncio.AbstractEventLoop]


class Worker:
    """One thread, started with its first piece of work.

    Args:
        name: of the thread.
        begin: is called in the thread before any work.
    """

    def __init__(self, name: str, begin: Callable[[], None] | None = None) -> None:
        self._name = name
        self._begin = begin
        self._urgent: deque[Piece] = deque()
        self._patient: deque[Piece] = deque()
        # One item for each piece in the two queues, and the first that is False after the last one.
        self._given: SimpleQueue[bool] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def do(self, work: Callable[[], Answer], *, patient: bool = False) -> Answer:
        """Return what `work` returns, or raise what it raises, when its turn has come. Cancelling does not stop it.

        Args:
            work: called in the thread.
            patient: do all other work that waits first.

        Raises:
            RuntimeError: the worker has been closed.
        """
        if self._closed:
            raise RuntimeError(f"the worker {self._name} has been closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        (self._patient if patient else self._urgent).append((work, future, loop))
        self._given.put(True)
        return await future

    def close(self) -> None:
        """Finish what was accepted, then end the thread."""
        self._closed = True
        self._given.put(False)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        if self._begin is not None:
            self._begin()
        while self._given.get():
            work, future, loop = (self._urgent or self._patient).popleft()
            answer, error = None, None
            try:
                answer = work()
            except BaseException as raised:  # it is the waiter's, whatever it is
                error = raised
            # A loop that has ended has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, future, answer, error)
            del work, future, answer, error  # an idle thread holds nothing


def _settle(future: asyncio.Future[Any], answer: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(answer)
    else:
        future.set_exception(error)
