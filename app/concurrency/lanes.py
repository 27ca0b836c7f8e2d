"""A thread that works for the event loop, one piece of work after the other, with fair turns between lanes.

`concurrent.futures` creates a future, a lock and a condition per piece of work, which costs a lone request as much as
decoding its image.
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

from app.problems import Overloaded

Result = TypeVar("Result")
Work = Callable[[], object]

_log = logging.getLogger(__name__)


class LaneWorker:
    """One thread, started with its first piece of work.

    Args:
        name: name of the thread.
        initializer: called in the thread before any work.

    Attributes:
        others_waiting: one byte, 1 while a lane other than the served one has work. Long work polls it to return early.
    """

    def __init__(self, name: str, initializer: Callable[[], None] | None = None) -> None:
        self._name = name
        self._initializer = initializer
        self._lock = threading.Lock()
        self._lanes: dict[Hashable, deque[Work]] = {}
        self._served: Hashable = None
        self.others_waiting = bytearray(1)
        # One True per piece of work in a lane, and False after the last one.
        self._submitted: SimpleQueue[bool] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Number of pieces of work that have not begun, also of callers that were cancelled."""
        return self._submitted.qsize()

    def submit(self, work: Work, lane: Hashable = None) -> None:
        """Call `work` in the worker's thread when its turn comes. Any thread may submit; `work` handles its own errors.

        Args:
            work: what to call.
            lane: whose work it is. Lanes take turns, one piece each; within a lane the order is that of submission.

        Raises:
            Overloaded: the system cannot start the thread, and the error is logged.
            RuntimeError: the worker has been closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the worker {self._name} has been closed")
            if self._thread is None or not self._thread.is_alive():  # it has not begun, or its initializer failed
                self._start_thread()
            self._lanes.setdefault(lane, deque()).append(work)
            self._update_others_waiting()
            self._submitted.put(True)

    async def run(self, work: Callable[[], Result], lane: Hashable = None) -> Result:
        """Return what `work` returns, or raise what it raises. Arguments and errors as for `submit`.

        If the caller is cancelled, work that has not begun is skipped; work that has begun is finished.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self.submit(functools.partial(_run_for, future, work, loop), lane)
        try:
            return await future
        finally:
            # An error refers to this frame, and the future to the error: with this reference they would be a cycle,
            # and the garbage collector would free it, and the images of its frames, only much later.
            del future

    def close(self, timeout: float | None = None) -> bool:
        """Finish the submitted work, then end the thread. Return False if `timeout` seconds were not enough."""
        with self._lock:
            self._closed = True
            self._submitted.put(False)
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # at the system's limit of threads
            _log.exception("a thread could not be started", extra={"worker": self._name})
            raise Overloaded(f"the thread {self._name} could not be started", cause="thread") from None
        self._thread = thread  # only now: `close` cannot join a thread that the system did not start

    def _run(self) -> None:
        if self._initializer is not None:
            self._initializer()
        while self._submitted.get():
            work = self._next()
            try:
                work()
            except BaseException:  # the thread must survive: later work depends on it
                _log.exception("work failed", extra={"worker": self._name})
            del work  # an idle thread must not keep a retired model version in memory: neither its work nor its lane
            self._forget_empty_lane()

    def _next(self) -> Work:
        with self._lock:
            if self._served in self._lanes:  # after the lanes that submitted while it was served
                self._lanes[self._served] = self._lanes.pop(self._served)
            self._served, pieces = next(iter(self._lanes.items()))
            work = pieces.popleft()
            if not pieces:
                del self._lanes[self._served]
            self._update_others_waiting()
            return work

    def _forget_empty_lane(self) -> None:
        with self._lock:
            if self._served not in self._lanes:
                self._served = None

    def _update_others_waiting(self) -> None:
        self.others_waiting[0] = len(self._lanes) > (self._served in self._lanes)


def _run_for(future: asyncio.Future[Any], work: Callable[[], object], loop: asyncio.AbstractEventLoop) -> None:
    if future.done():
        return
    result, error = None, None
    try:
        result = work()
    except BaseException as raised:  # the waiter handles it, even a KeyboardInterrupt
        error = raised
    try:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so the future is not awaited any more
            loop.call_soon_threadsafe(_set_result, future, result, error)
    finally:
        del future, error  # as in `LaneWorker.run`


def _set_result(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
