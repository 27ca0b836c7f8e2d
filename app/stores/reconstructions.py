"""Keeping reconstructions for a while, a micro-batch at a time, without ever standing in a score's way.

Knows: when a store is down, and what to do then. Does not know: which store it is, HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from app.concurrency.deadlines import Deadlines
from app.stores import Store, StoreError
from app.stores.record import Record, unpack
from app.telemetry.metrics import Metrics

Answer = TypeVar("Answer")

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0
_QUIET_SECONDS = 5.0


@dataclass(eq=False, slots=True)
class _Put:
    """A group that the store was given."""

    size: int
    then: Callable[[bool], object]


class Reconstructions:
    """The store as the service uses it. The event loop has to `check` it before anything is kept.

    While the store fails, records are dropped at once instead of waiting for its time-out; about once a second it is
    tried with one group or a check, so that the service notices by itself that the store is back.

    Args:
        store: where records go.
        metrics: counts what could not be kept.
        timeout: seconds that a score waits for its record to be kept.
        max_waiting: most records that wait for the store; more are not kept.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        *,
        timeout: float,
        max_waiting: int,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._timeout = timeout
        self._retry_at = 0.0
        self._asked_at = 0.0
        self._down = False
        self._max_waiting = max_waiting
        self._waiting = 0
        # Held for all that is noted of the store: its answers come in any thread.
        self._lock = threading.Lock()
        self._puts: Deadlines[_Put] = Deadlines(timeout, lambda put: self._tell(put, TimeoutError()))
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def up(self) -> bool:
        """Whether the store wrote when it was last asked to, and has given what was asked for since."""
        return not self._down

    def keep(self, records: Sequence[tuple[str, Record]], then: Callable[[bool], object]) -> None:
        """Keep records under their ids, all or none. Any thread may call it.

        Args:
            records: each with its id.
            then: is called once, in any thread: with False, when the store is down or slow and the records are counted
                as not kept. They may be in the store nevertheless, if it was slow.
        """
        put = _Put(len(records), then)
        if not self._begin(put):
            self._metrics.not_kept.inc(put.size)
            then(False)
            return
        try:
            entries = [(key, record.pack()) for key, record in records]
            self._store.put(entries, functools.partial(self._answered, put), lambda: put in self._puts)
        except Exception as error:
            self._answered(put, error)

    async def kept(self, records: Sequence[tuple[str, Record]]) -> bool:
        """Keep records as `keep` does, and return what it says."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()

        def tell(kept: bool) -> None:
            if not future.done():
                future.set_result(kept)

        self.keep(records, lambda kept: loop.call_soon_threadsafe(tell, kept))
        return await future

    def _begin(self, put: _Put) -> bool:
        """Note that a group is given to the store; False when it shall not be."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        with self._lock:
            now = time.monotonic()
            full = self._waiting > 0 and self._waiting + put.size > self._max_waiting
            if full or (self._down and now < self._retry_at):
                return False
            # While the store is down, this group is the one that tries.
            self._retry_at = now + _RETRY_SECONDS
            self._asked_at = now
            self._waiting += put.size
        self._puts.begin(put, self._loop)
        return True

    def _answered(self, put: _Put, error: Exception | None) -> None:
        if self._puts.end(put):  # its time was not over
            self._tell(put, error)

    def _tell(self, put: _Put, error: Exception | None) -> None:
        with self._lock:
            self._waiting -= put.size
        self._note(error)
        if error is not None:
            self._metrics.not_kept.inc(put.size)
        put.then(error is None)

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
        """Ask the store whether it writes; `up` says what it said."""
        self._loop = asyncio.get_running_loop()
        with self._lock:
            # While the store is down, this check is what tries.
            self._asked_at = time.monotonic()
            self._retry_at = self._asked_at + _RETRY_SECONDS
        with contextlib.suppress(StoreError):
            await self._within(self._store.ping())
            self._note(None)

    async def check_when_quiet(self) -> None:
        """Ask the store whether it writes, unless requests have found that out a moment ago."""
        now = time.monotonic()
        if now >= (self._retry_at if self._down else self._asked_at + _QUIET_SECONDS):
            await self.check()

    async def aclose(self) -> None:
        """Close the store, which first writes what it was given."""
        await self._store.close()

    async def _within(self, answer: Awaitable[Answer]) -> Answer:
        try:
            async with asyncio.timeout(self._timeout):
                return await answer
        except (StoreError, TimeoutError) as error:
            self._note(error)
            raise StoreError("the store did not answer") from error

    def _note(self, error: Exception | None) -> None:
        """Note whether the store wrote, or answered at all. That it gave what is kept says nothing: it may be full."""
        with self._lock:
            changed, self._down = self._down != (error is not None), error is not None
            if error is not None:
                self._retry_at = time.monotonic() + _RETRY_SECONDS
            self._metrics.store_up.set(error is None)
        if changed and error is not None:
            _log.error("store down: %s", str(error) or type(error).__name__)
        elif changed:
            _log.warning("store up again")
