"""A thread that works for the event loop, one piece of work after the other.

Knows: threads, futures, whose turn it is. Does not know: what the work is.

`concurrent.futures` does the same with a future, a lock and a condition of its own for every piece, which costs a lone
request as much as decoding its image.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable
from queue import SimpleQueue
from typing import Any, TypeVar

Answer = TypeVar("Answer")
Piece = Callable[[], object]

_log = logging.getLogger(__name__)


class Worker:
    """One thread, started with its first piece of work.

    Args:
        name: of the thread.
        begin: is called in the thread before any work.

    Attributes:
        others: one byte, 1 while a lane waits besides the one that is served. Long work looks at it, and ends early.
    """

    def __init__(self, name: str, begin: Callable[[], None] | None = None) -> None:
        self._name = name
        self._begin = begin
        self._lock = threading.Lock()
        self._lanes: dict[Hashable, deque[Piece]] = {}
        self._served: Hashable = None
        self.others = bytearray(1)
        # One True for each piece in a lane, and False after the last one.
        self._given: SimpleQueue[bool] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def give(self, work: Piece, lane: Hashable = None) -> None:
        """Have `work` called when its turn has come. Any thread may give work, which deals with its own errors.

        Args:
            work: called in the worker's thread.
            lane: who wants it. Lanes take turns, piece by piece; within a lane the order is that of the calls.

        Raises:
            RuntimeError: the worker has been closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the worker {self._name} has been closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._lanes.setdefault(lane, deque()).append(work)
            self._look_for_others()
            self._given.put(True)

    async def do(self, work: Callable[[], Answer], lane: Hashable = None) -> Answer:
        """Return what `work` returns, or raise what it raises, when its turn has come. The rest is as for `give`.

        Work that was begun is finished even if nobody waits for it any more; what was not is dropped.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self.give(functools.partial(_answer, work, future, loop), lane)
        return await future

    def close(self) -> None:
        """Finish what was accepted, then end the thread."""
        with self._lock:
            self._closed = True
            self._given.put(False)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        if self._begin is not None:
            self._begin()
        while self._given.get():
            work = self._next()
            try:
                work()
            except BaseException:  # the thread goes on: whoever gives work comes to wait for it
                _log.exception("work failed", extra={"worker": self._name})
            del work  # an idle thread must not keep a retired model version in memory: neither its work nor its lane
            self._forget_lane()

    def _next(self) -> Piece:
        with self._lock:
            if self._served in self._lanes:  # behind those who came while it was served
                self._lanes[self._served] = self._lanes.pop(self._served)
            self._served, pieces = next(iter(self._lanes.items()))
            piece = pieces.popleft()
            if not pieces:
                del self._lanes[self._served]
            self._look_for_others()
            return piece

    def _forget_lane(self) -> None:
        with self._lock:
            if self._served not in self._lanes:
                self._served = None

    def _look_for_others(self) -> None:
        self.others[0] = len(self._lanes) > (self._served in self._lanes)


def _answer(work: Callable[[], Answer], future: asyncio.Future[Answer], loop: asyncio.AbstractEventLoop) -> None:
    if future.done():
        return
    answer, error = None, None
    try:
        answer = work()
    except BaseException as raised:  # it is the waiter's, whatever it is
        error = raised
    # A loop that has ended has nobody left who waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(_settle, future, answer, error)


def _settle(future: asyncio.Future[Any], answer: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(answer)
    else:
        future.set_exception(error)
