"""Reads the model store for requests, each with a deadline, in a separate thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from app.concurrency.lanes import LaneWorker
from app.problems import DeadlineExceeded, Overloaded

Result = TypeVar("Result")


class ModelStoreReads:
    """The thread that reads the model store for requests.

    If the model store is on a network file system that hangs, a read never returns and nothing can end its thread. In
    the event loop's thread pool, a few such reads would block all routes that use the pool, and the shutdown.

    Args:
        deadline: seconds that a request waits for its read.
        max_waiting: maximum number of reads that wait for the thread.
    """

    def __init__(self, *, deadline: float, max_waiting: int) -> None:
        self._deadline = deadline
        self._max_waiting = max_waiting
        self._worker = LaneWorker("model store")

    async def run(self, read: Callable[[], Result]) -> Result:
        """Return what `read` returns, or raise what it raises.

        Raises:
            DeadlineExceeded: the model store did not respond in time.
            Overloaded: too many reads wait.
        """
        waiting = self._worker.waiting
        if waiting >= self._max_waiting:
            raise Overloaded(f"{waiting} requests wait for the model store", cause="model_store")
        try:
            async with asyncio.timeout(self._deadline):
                return await self._worker.run(read)
        except TimeoutError:
            raise DeadlineExceeded("the model store did not respond in time", cause="model_store") from None

    def close(self) -> None:
        """Accept no more reads. A read that hangs does not delay the end of the process."""
        self._worker.close(timeout=0)
