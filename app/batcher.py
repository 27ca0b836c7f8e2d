"""Group concurrent calls into micro-batches.

Knows: queues, deadlines, order. Does not know: images, models, HTTP.

    submit ▸ queue ▸ run, in order of arrival ▸ finish, beside the next micro-batch's run ▸ the callers
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from app.deadlines import Deadlines
from app.problems import DeadlineExceeded, InternalError, ModelUnavailable, Overloaded

Item = TypeVar("Item")
Made = TypeVar("Made")
Result = TypeVar("Result")


class MicroBatcher(Generic[Item, Made, Result]):
    """Turns single calls into calls with a list of what is waiting, in order of arrival.

    Work-conserving: a batch is whatever waits when what went before is done; a lone item never waits for company
    unless `max_delay` says so. What is too much for one batch is given to `run` in several at once: while thousands of
    requests come in, the event loop turns too slowly to hand over one batch a turn. Who leaves after that is run for
    nothing.

    Args:
        run: gets 1 to `max_size` items and makes something of each, in the same order. It is called again before its
            last call has returned, and does its calls one after the other.
        finish: turns what `run` made into what the callers get, while the next micro-batch runs. An exception among
            its results is raised for that caller alone.
        max_size: most items in one call.
        max_waiting: most items that may wait; one more is refused.
        deadline: seconds after which nobody waits for a result any more, and `DeadlineExceeded` takes its place.
        max_delay: seconds that the first item of a batch waits for company.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Made]]],
        finish: Callable[[list[Item], Sequence[Made]], Awaitable[Sequence[Result | Exception]]],
        *,
        max_size: int,
        max_waiting: int,
        deadline: float,
        max_delay: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._finish = finish
        self._finishing: set[asyncio.Task[None]] = set()
        self._max_size = max_size
        self._max_waiting = max_waiting
        self._max_delay = max_delay
        self._clock = clock
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._deadlines: Deadlines[asyncio.Future[Result]] = Deadlines(deadline, _too_late)
        self._handed = 0
        self._runner: asyncio.Task[None] | None = None
        self._running_since: float | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Items that have been accepted and are not among those that `run` is busy with."""
        return len(self._waiting) + self._handed

    @property
    def busy_seconds(self) -> float:
        """How long ago `run` got something to do, or last finished some of it; 0.0 while it has nothing to do."""
        return 0.0 if self._running_since is None else self._clock() - self._running_since

    async def submit(self, item: Item) -> Result:
        """Wait for the result of one item. Arguments and errors as for `enqueue`."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.enqueue(item, future)
        return await future

    def enqueue(self, item: Item, future: asyncio.Future[Result]) -> None:
        """Accept one item, whose result or error `future` will hold.

        Args:
            item: what `run` will get in its list.
            future: fresh; whoever cancels it wants no result any more.

        Raises:
            Overloaded: too many items are waiting; this one was not accepted.
            ModelUnavailable: the batcher has been closed.
        """
        if self._closed:
            raise ModelUnavailable("the model version is being retired")
        self.check_room()
        self._waiting.append((item, future))
        if self._runner is None:
            self._runner = asyncio.create_task(self._drain())
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
        self._closed = True
        if self._runner is not None:
            await asyncio.shield(self._runner)
        await asyncio.gather(*self._finishing)

    async def _drain(self) -> None:
        try:
            while self._waiting:
                if self._max_delay and len(self._waiting) < self._max_size:
                    await asyncio.sleep(self._max_delay)
                await self._run_all(list(iter(self._take, [])))
        finally:
            self._runner = None

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self._max_size:
            item, future = self._waiting.popleft()
            if future.done():  # the caller left, or its deadline has passed
                self._deadlines.end(future)
            else:
                batch.append((item, future))
        return batch

    async def _run_all(self, batches: list[list[tuple[Item, asyncio.Future[Result]]]]) -> None:
        self._handed = sum(map(len, batches))
        self._running_since = self._clock()
        # The first needs no task of its own, and is mostly the only one.
        later = [asyncio.create_task(self._run_one(batch)) for batch in batches[1:]]
        try:
            for place, batch in enumerate(batches):
                self._handed -= len(batch)
                await (later[place - 1] if place else self._run_one(batch))
        finally:
            self._handed, self._running_since = 0, None

    async def _run_one(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        items = [item for item, _ in batch]
        futures = [future for _, future in batch]
        try:
            made = await self._run(items)
            _compare(items, made)
        except BaseException as error:
            # Every waiter must hear of it, whatever it was; what ends the loop itself goes on its way.
            self._fail(futures, error)
            if not isinstance(error, Exception):
                raise
            return
        finally:
            self._running_since = self._clock()
        task = asyncio.create_task(self._finish_one(items, futures, made))
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def _finish_one(self, items: list[Item], futures: list[asyncio.Future[Result]], made: Sequence[Made]) -> None:
        try:
            results = await self._finish(items, made)
            _compare(items, results)
        except BaseException as error:
            self._fail(futures, error)
            if not isinstance(error, Exception):
                raise
            return
        for future, result in zip(futures, results, strict=True):
            self._deadlines.end(future)
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _fail(self, futures: Sequence[asyncio.Future[Result]], error: BaseException) -> None:
        for future in futures:
            self._deadlines.end(future)
            if not future.done():
                future.set_exception(_for_waiters(error))


def _too_late(future: asyncio.Future[Result]) -> None:
    if not future.done():
        future.set_exception(DeadlineExceeded("the deadline passed before the model had answered"))


def _compare(items: Sequence[object], results: Sequence[object]) -> None:
    if len(results) != len(items):
        raise RuntimeError(f"{len(items)} items in, {len(results)} results out")


def _for_waiters(error: BaseException) -> Exception:
    # One exception object must not be raised in many tasks: each raise would grow its traceback.
    wrapped = InternalError()
    wrapped.__cause__ = error
    return wrapped
