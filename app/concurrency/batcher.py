"""Group concurrent calls into micro-batches.

Knows: queues, deadlines, order, whose turn the thread is. Does not know: images, models, HTTP.

    submit ▸ queue ▸ work, in a worker's thread, in order of arrival ▸ done, from any thread ▸ the callers
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from app.concurrency.deadlines import Deadlines
from app.concurrency.lanes import Worker
from app.problems import DeadlineExceeded, InternalError, ModelUnavailable, Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")
Done = Callable[[Callable[[], Sequence[Result | Exception]]], object]
"""Ends a micro-batch, from any thread: the event loop gets what is given, and calls it for the results."""


class MicroBatcher(Generic[Item, Result]):
    """Turns single calls into calls with a list of what is waiting, in order of arrival.

    Work-conserving: a batch is whatever waits when the worker's thread turns to this batcher; a lone item never waits
    for company unless `max_delay` says so. The thread takes what waits by itself, and `work` may pass it on to another
    thread, so that the event loop, which others keep busy, is waited for once: when there are results.

    Args:
        work: gets 1 to `max_size` items in the worker's thread, and sees to it that its second argument is called
            once, or raises. It gets the next items as soon as it has returned. Of the results, as many as items and in
            the same order, an exception is raised for its caller alone.
        worker: whose thread it is. The batcher is a lane of its own.
        max_size: most items in one call.
        max_waiting: most items that may wait; one more is refused.
        deadline: seconds after which nobody waits for a result any more, and `DeadlineExceeded` takes its place.
        max_delay: seconds that the first item of a batch waits for company.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        work: Callable[[list[Item], Done[Result]], object],
        worker: Worker,
        *,
        max_size: int,
        max_waiting: int,
        deadline: float,
        max_delay: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._worker = worker
        self._max_size = max_size
        self._max_waiting = max_waiting
        self._max_delay = max_delay
        self._clock = clock
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._deadlines: Deadlines[asyncio.Future[Result]] = Deadlines(deadline, _too_late)
        # Held by whoever adds an item and looks whether a turn is coming, or takes the last one and says that none is.
        self._lock = threading.Lock()
        self._turn_is_coming = False
        self._delay: asyncio.TimerHandle | None = None
        self._busy_since: float | None = None
        self._accepted = 0
        self._closed: asyncio.Event | None = None

    @property
    def waiting(self) -> int:
        """Items that have been accepted and were not given to `work` yet."""
        return len(self._waiting)

    @property
    def busy_seconds(self) -> float:
        """How long ago the first item came, or `work` last returned; 0.0 while it has nothing to do."""
        since = self._busy_since
        return 0.0 if since is None else self._clock() - since

    async def submit(self, item: Item) -> Result:
        """Wait for the result of one item. Arguments and errors as for `enqueue`."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.enqueue(item, future)
        return await future

    def enqueue(self, item: Item, future: asyncio.Future[Result]) -> None:
        """Accept one item, whose result or error `future` will hold.

        Args:
            item: what `work` will get in its list.
            future: fresh; whoever cancels it wants no result any more.

        Raises:
            Overloaded: too many items are waiting; this one was not accepted.
            ModelUnavailable: the batcher has been closed.
        """
        if self._closed is not None:
            raise ModelUnavailable("the model version is being retired")
        self.check_room()
        with self._lock:
            self._waiting.append((item, future))
            first, self._turn_is_coming = not self._turn_is_coming, True
        self._accepted += 1
        if first:
            self._busy_since = self._clock()
            loop = asyncio.get_running_loop()
            loop.call_soon(self._ask_for_turn, loop)  # when what comes in this turn of the event loop is in the queue
        elif self._delay is not None and len(self._waiting) >= self._max_size:
            self._delay.cancel()
            self._give_turn(asyncio.get_running_loop())
        self._deadlines.begin(future)

    def check_room(self, coming: int = 0) -> None:
        """Find out whether one more item would be accepted, when `coming` others are before it.

        Raises:
            Overloaded: it would not.
        """
        if self.waiting + coming >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} images are waiting already")

    async def aclose(self) -> None:
        """Refuse new items and wait until the accepted ones have their results."""
        if self._closed is None:
            self._closed = asyncio.Event()
        if self._accepted:
            await self._closed.wait()
        # The owner's bound method refers back to the owner: break that cycle, so that refcounting frees both at once.
        self._work = _closed

    def _ask_for_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._max_delay and len(self._waiting) < self._max_size:
            self._delay = loop.call_later(self._max_delay, self._give_turn, loop)
        else:
            self._give_turn(loop)

    def _give_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._delay = None
        self._worker.give(functools.partial(self._turn, loop), self)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        batch, gone = self._take()
        if gone:
            _call(loop, self._settle, gone, lambda: [None] * len(gone))
        if batch:
            done = functools.partial(_call, loop, self._settle, [future for _, future in batch])
            try:
                self._work([item for item, _ in batch], done)
            except BaseException as error:  # every waiter must hear of it, whatever it was
                done(functools.partial(_failed, error, len(batch)))
        with self._lock:
            self._turn_is_coming = more = bool(self._waiting)
            self._busy_since = self._clock() if more else None
        if more and self._max_delay:
            _call(loop, self._ask_for_turn, loop)
        elif more:
            self._worker.give(functools.partial(self._turn, loop), self)

    def _take(self) -> tuple[list[tuple[Item, asyncio.Future[Result]]], list[asyncio.Future[Result]]]:
        """Return what is to be done, and of whom nobody waits any more: the caller left, or its deadline has passed."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        gone: list[asyncio.Future[Result]] = []
        while self._waiting and len(batch) < self._max_size:
            item, future = self._waiting.popleft()
            if future.done():
                gone.append(future)
            else:
                batch.append((item, future))
        return batch, gone

    def _settle(self, futures: list[asyncio.Future[Result]], make: Callable[[], Sequence[Any]]) -> None:
        if not futures:
            return  # `work` failed after it had passed on what then had its results
        try:
            results = make()
            if len(results) != len(futures):
                raise RuntimeError(f"{len(futures)} items in, {len(results)} results out")
        except Exception as error:
            results = _failed(error, len(futures))
        for future, result in zip(futures, results, strict=True):
            self._deadlines.end(future)
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
        self._accepted -= len(futures)
        futures.clear()
        if self._closed is not None and not self._accepted:
            self._closed.set()


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *given: object) -> None:
    # A loop that has ended has nobody left who waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *given)


def _closed(_: list[Any], __: Done[Any]) -> None:
    raise RuntimeError("the batcher has been closed")


def _too_late(future: asyncio.Future[Result]) -> None:
    if not future.done():
        future.set_exception(DeadlineExceeded("the deadline passed before the model had answered"))


def _failed(error: BaseException, count: int) -> list[Exception]:
    # One exception object must not be raised for many callers: each raise would grow its traceback.
    failures: list[Exception] = []
    for _ in range(count):
        failure = InternalError()
        failure.__cause__ = error
        failures.append(failure)
    return failures
