"""Keeping reconstructions for a while, a micro-batch at a time, without ever standing in a score's way.

Knows: when a store is down, and what to do then. Does not know: which store it is, HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from app.metrics import Metrics
from app.record import Record, unpack
from app.stores import Store, StoreError

Answer = TypeVar("Answer")

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0
_QUIET_SECONDS = 5.0


class Reconstructions:
    """The store as the service uses it.

    While the store fails, records are dropped at once instead of waiting for its time-out; about once a second one
    group is tried, so that the service notices by itself that the store is back.

    Args:
        store: where records go.
        metrics: counts what could not be kept.
        timeout: seconds that a score waits for its record to be kept.
        max_waiting: most records that wait for the store; more are not kept.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        *,
        timeout: float,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._timeout = timeout
        self._clock = clock
        self._retry_at = 0.0
        self._asked_at = 0.0
        self._down = False
        self._max_waiting = max_waiting
        self._waiting = 0

    @property
    def up(self) -> bool:
        """Whether the store answered when it was last asked."""
        return not self._down

    async def keep(self, records: Sequence[tuple[str, Record]]) -> bool:
        """Keep records under their ids, all or none. Returns False, and counts them, when the store is down or slow."""
        count, now = len(records), self._clock()
        if not (self._down and now < self._retry_at) and self._waiting + count <= self._max_waiting:
            self._waiting += count
            # While the store is down, this group is the one that tries.
            self._retry_at = now + _RETRY_SECONDS
            try:
                await self._within(self._store.put([(key, record.pack()) for key, record in records]))
            except StoreError:
                pass
            else:
                return True
            finally:
                self._waiting -= count
        self._metrics.not_kept.inc(count)
        return False

    async def find(self, key: str) -> Record | None:
        """Return what is kept under an id, or None.

        Raises:
            StoreError: the store did not answer in time, so nobody can say.
        """
        content = await self._within(self._store.get(key))
        try:
            return None if content is None else unpack(content)
        except ValueError:
            _log.warning("a record of another format was found and ignored")
            return None

    async def check(self) -> None:
        """Ask the store whether it answers; `up` says what it said."""
        try:
            await self._within(self._store.ping())
        except StoreError:
            return

    async def check_when_quiet(self) -> None:
        """Ask the store whether it answers, unless requests have found that out a moment ago."""
        now = self._clock()
        if now >= (self._retry_at if self._down else self._asked_at + _QUIET_SECONDS):
            await self.check()

    async def aclose(self) -> None:
        """Close the store, which first writes what it was given."""
        await self._store.close()

    async def _within(self, answer: Awaitable[Answer]) -> Answer:
        self._asked_at = self._clock()
        try:
            async with asyncio.timeout(self._timeout):
                found = await answer
        except (StoreError, TimeoutError) as error:
            self._noted_down(error)
            raise StoreError("the store did not answer") from error
        self._noted_up()
        return found

    def _noted_down(self, error: Exception) -> None:
        self._retry_at = self._clock() + _RETRY_SECONDS
        if not self._down:
            self._down = True
            _log.error("store down: %s", str(error) or type(error).__name__)
        self._metrics.store_up.set(0)

    def _noted_up(self) -> None:
        if self._down:
            self._down = False
            _log.warning("store up again")
        self._metrics.store_up.set(1)
