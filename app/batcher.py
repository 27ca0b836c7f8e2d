"""Group concurrent calls into micro-batches.

Knows: queues, deadlines, order. Does not know: images, models, HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from app.problems import DeadlineExceeded, InternalError, ModelUnavailable, Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")


class MicroBatcher(Generic[Item, Result]):
    """Turns single calls into calls with a list of what is waiting, one list at a time, in order of arrival.

    Work-conserving: a batch is whatever waits when the one before is done; a lone item never waits for company
    unless `max_delay` says so.

    Args:
        run: gets 1 to `max_size` items and returns as many results in the same order; one call at a time.
        max_size: most items in one call.
        max_waiting: most items that may wait; one more is refused.
        max_delay: seconds that the first item of a batch waits for company.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        *,
        max_size: int,
        max_waiting: int,
        max_delay: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._max_size = max_size
        self._max_waiting = max_waiting
        self._max_delay = max_delay
        self._clock = clock
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        # One timer for all deadlines: a timer of its own costs a caller more than all the rest of `submit`.
        self._deadlines: dict[asyncio.Future[Result], float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._runner: asyncio.Task[None] | None = None
        self._running_since: float | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Items that have been accepted and not yet handed to `run`."""
        return len(self._waiting)

    @property
    def busy_seconds(self) -> float:
        """How long the call in progress has taken so far; 0.0 between calls."""
        return 0.0 if self._running_since is None else self._clock() - self._running_since

    async def submit(self, item: Item, *, deadline: float) -> Result:
        """Wait for the result of one item.

        Args:
            item: what `run` will get in its list.
            deadline: seconds from now after which nobody waits for the result any more.

        Raises:
            Overloaded: too many items are waiting; this one was not accepted.
            DeadlineExceeded: no result in time.
            ModelUnavailable: the batcher has been closed.
        """
        if self._closed:
            raise ModelUnavailable("the model version is being retired")
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} images are waiting already")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future))
        if self._runner is None:
            self._runner = loop.create_task(self._drain())
        self._deadlines[future] = expiry = loop.time() + deadline
        if self._timer is None or expiry < self._timer.when():
            self._arm(loop, expiry)
        try:
            return await future
        finally:
            del self._deadlines[future]

    async def aclose(self) -> None:
        """Refuse new items and wait until the accepted ones have their results."""
        self._closed = True
        if self._runner is not None:
            await asyncio.shield(self._runner)

    def _arm(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(when, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for future, expiry in self._deadlines.items():
            if expiry <= now and not future.done():
                future.set_exception(DeadlineExceeded("the deadline passed before the model had answered"))
        later = [expiry for future, expiry in self._deadlines.items() if not future.done()]
        if later:
            self._arm(loop, min(later))

    async def _drain(self) -> None:
        try:
            while self._waiting:
                if self._max_delay and len(self._waiting) < self._max_size:
                    await asyncio.sleep(self._max_delay)
                batch = self._take()
                if batch:
                    await self._run_one(batch)
        finally:
            self._runner = None

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self._max_size:
            pair = self._waiting.popleft()
            if not pair[1].done():  # the caller left, or its deadline has passed
                batch.append(pair)
        return batch

    async def _run_one(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        self._running_since = self._clock()
        try:
            results = await self._run([item for item, _ in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(batch)} items in, {len(results)} results out")
        except BaseException as error:
            # Every waiter must hear of it, whatever it was; what ends the loop itself goes on its way.
            for _, future in batch:
                if not future.done():
                    future.set_exception(_for_waiters(error))
            if not isinstance(error, Exception):
                raise
        else:
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
        finally:
            self._running_since = None


def _for_waiters(error: BaseException) -> Exception:
    # One exception object must not be raised in many tasks: each raise would grow its traceback.
    wrapped = InternalError()
    wrapped.__cause__ = error
    return wrapped
