"""Dynamic batching: groups concurrent requests into micro-batches for one worker thread.

enqueue > prepare > queue > run_batch, in the worker's thread, in order > resolve, from any thread > futures
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from app.concurrency.deadlines import Deadlines
from app.concurrency.lanes import LaneWorker
from app.problems import DeadlineExceeded, InternalError, ModelUnavailable, Overloaded, Problem

_log = logging.getLogger(__name__)

_ADMISSION_SECONDS = 0.005
"""Time after which the preparation of arrived items continues in the next event-loop iteration."""


class HasFuture(Protocol):
    """An item of the queue; its future receives the result or the error."""

    @property
    def future(self) -> asyncio.Future[Any]:
        """The future, unique to the item. Cancelling it removes the item from the queue."""


Item = TypeVar("Item", bound=HasFuture)
Resolve = Callable[[Callable[[], Sequence[Any]]], object]
"""Ends a micro-batch. Any thread may call it. Its argument is a function, which the event loop calls afterwards. The
function returns a result or an exception for each item, in order."""


class MicroBatcher(Generic[Item]):
    """A bounded queue whose items are processed in micro-batches.

    Items that arrive in one event-loop iteration are prepared and queued together, for larger micro-batches.

    There is no batching delay by default: a micro-batch contains the items that wait when the worker's thread turns to
    this batcher. The thread pulls micro-batches from the queue itself, and `run_batch` may pass a micro-batch on to
    another thread. So the event loop, which is busy under load, schedules a request once: when there are results.

    Args:
        run_batch: gets 1 to `max_size` items in the worker's thread and must call its second argument once, or raise.
            It gets the next items as soon as it has returned. An exception among the results is set for its item alone.
        worker: the thread. Each batcher has its own lane.
        prepare: called on the event loop for each accepted item before it is queued. An exception becomes its result.
        max_size: maximum number of items per micro-batch.
        max_waiting: maximum number of items in the queue.
        deadline: seconds after which an unfinished item gets `DeadlineExceeded`.
        max_delay: batching delay: seconds that the first item of a micro-batch waits for further items.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        run_batch: Callable[[list[Item], Resolve], object],
        worker: LaneWorker,
        *,
        prepare: Callable[[Item], object] = lambda _: None,
        max_size: int,
        max_waiting: int,
        deadline: float,
        max_delay: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_batch = run_batch
        self._worker = worker
        self._prepare = prepare
        self._max_size = max_size
        self._max_waiting = max_waiting
        self._max_delay = max_delay
        self._clock = clock
        self._arrivals: list[Item] = []
        self._waiting: deque[Item] = deque()
        self._deadlines: Deadlines[asyncio.Future[Any]] = Deadlines(deadline, _set_deadline_exceeded, clock)
        # Guards the decision between "a turn is scheduled" and "the queue is empty" against a race condition.
        self._lock = threading.Lock()
        self._turn_scheduled = False
        self._delay: asyncio.TimerHandle | None = None
        self._busy_since: float | None = None
        self._unfinished = 0
        self._closed: asyncio.Event | None = None

    @property
    def waiting(self) -> int:
        """Number of items that have been accepted and are not in a micro-batch."""
        return len(self._arrivals) + len(self._waiting)

    @property
    def busy_seconds(self) -> float:
        """Seconds since the first item arrived or the last micro-batch ended; 0.0 while the queue is empty."""
        since = self._busy_since
        return 0.0 if since is None else self._clock() - since

    def enqueue(self, item: Item) -> None:
        """Accept one item; its future gets the result, or `DeadlineExceeded`, `InternalError` or `Overloaded`.

        Raises:
            Overloaded: the queue is full.
            ModelUnavailable: the batcher has been closed.
        """
        if self._closed is not None:
            raise ModelUnavailable("the model version is being retired", cause="version_retired")
        if self.waiting >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} images are waiting already", cause="queue")
        if not self._arrivals:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._admit, loop)  # after the other items of this event-loop iteration
        self._arrivals.append(item)
        self._unfinished += 1

    async def aclose(self) -> None:
        """Reject new items and wait until the accepted items have their results."""
        if self._closed is None:
            self._closed = asyncio.Event()
        if self._unfinished:
            await self._closed.wait()
        # The owner's bound method refers back to the owner: break that cycle, so that refcounting frees both at once.
        self._run_batch = _raise_closed

    def _admit(self, loop: asyncio.AbstractEventLoop) -> None:
        """Prepare and queue the items that arrived in one event-loop iteration."""
        arrivals, self._arrivals = self._arrivals, []
        accepted: list[Item] = []
        until = self._clock() + _ADMISSION_SECONDS
        for place, item in enumerate(arrivals):
            if place and self._clock() > until:
                self._arrivals = arrivals[place:]
                loop.call_soon(self._admit, loop)
                break
            try:
                if item.future.done():  # cancelled
                    raise asyncio.CancelledError
                self._prepare(item)
            except (Exception, asyncio.CancelledError) as error:
                self._finish([item.future], [error])
            else:
                accepted.append(item)
        if not accepted:
            return
        self._deadlines.begin(*[item.future for item in accepted])
        with self._lock:
            self._waiting.extend(accepted)
            idle, self._turn_scheduled = not self._turn_scheduled, True
        if idle:
            self._busy_since = self._clock()
            self._schedule_turn(loop)
        elif self._delay is not None and len(self._waiting) >= self._max_size:
            self._delay.cancel()
            self._submit_turn(loop)

    def _schedule_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._max_delay and len(self._waiting) < self._max_size:
            self._delay = loop.call_later(self._max_delay, self._submit_turn, loop)
        else:
            self._submit_turn(loop)

    def _submit_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._delay = None
        try:
            self._worker.submit(functools.partial(self._turn, loop), self)
        except Overloaded as error:  # without a turn, no item would ever get a result
            self._reject_waiting(error.detail)

    def _reject_waiting(self, detail: str) -> None:
        with self._lock:
            futures = [item.future for item in self._waiting]
            self._waiting.clear()
            self._turn_scheduled, self._busy_since = False, None
        self._finish(futures, [Overloaded(detail, cause="thread") for _ in futures])

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        batch, cancelled = self._next_batch()
        if cancelled:
            _call_soon(loop, self._set_results, cancelled, lambda: [None] * len(cancelled))
        if batch:
            resolve = functools.partial(_call_soon, loop, self._set_results, [item.future for item in batch])
            try:
                self._run_batch(batch, resolve)
            except BaseException as error:  # every item must get the error, even a KeyboardInterrupt
                resolve(functools.partial(_failures, error, len(batch)))
        with self._lock:
            self._turn_scheduled = more = bool(self._waiting)
            self._busy_since = self._clock() if more else None
        if more and self._max_delay:
            _call_soon(loop, self._schedule_turn, loop)
        elif more:
            self._worker.submit(functools.partial(self._turn, loop), self)

    def _next_batch(self) -> tuple[list[Item], list[asyncio.Future[Any]]]:
        """Return the next micro-batch, and the futures of skipped items: cancelled, or past their deadline."""
        batch: list[Item] = []
        skipped: list[asyncio.Future[Any]] = []
        while self._waiting and len(batch) < self._max_size:
            item = self._waiting.popleft()
            if item.future.done():
                skipped.append(item.future)
            else:
                batch.append(item)
        return batch, skipped

    def _set_results(self, futures: list[asyncio.Future[Any]], make_results: Callable[[], Sequence[Any]]) -> None:
        if not futures:
            return  # `run_batch` raised after it had resolved the micro-batch
        try:
            results = make_results()
            if len(results) != len(futures):
                raise RuntimeError(f"{len(futures)} items in, {len(results)} results out")
        except Exception as error:
            _log.exception("results of a micro-batch failed", extra={"images": len(futures)})
            results = _failures(error, len(futures))
        self._finish(futures, results)
        futures.clear()

    def _finish(self, futures: Sequence[asyncio.Future[Any]], results: Sequence[Any]) -> None:
        self._deadlines.end(*futures)
        for future, result in zip(futures, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Problem):
                # The frames of its traceback refer to the future. With the traceback, they would be a cycle, and the
                # image would stay until the garbage collector runs.
                future.set_exception(result.with_traceback(None))
            elif isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
        self._unfinished -= len(futures)
        if self._closed is not None and not self._unfinished:
            self._closed.set()


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *given: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, so the futures are not awaited any more
        loop.call_soon_threadsafe(callback, *given)


def _set_deadline_exceeded(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(DeadlineExceeded("the deadline passed before the forward pass ended", cause="deadline"))


def _failures(error: BaseException, count: int) -> list[Exception]:
    # One exception object per caller: each raise would extend the traceback of a shared one. The frames of the cause's
    # traceback refer to the items, and their futures to these exceptions: with the traceback, they would be a cycle.
    failures: list[Exception] = []
    for _ in range(count):
        failure = InternalError()
        failure.__cause__ = error.with_traceback(None)
        failures.append(failure)
    return failures


def _raise_closed(_: list[Any], __: Resolve) -> None:
    raise RuntimeError("the batcher has been closed")
