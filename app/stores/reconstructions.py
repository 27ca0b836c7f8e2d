"""The reconstruction store as the service uses it: stores micro-batches without blocking scores, behind a breaker."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from app.concurrency.deadlines import Deadlines
from app.concurrency.lanes import LaneWorker
from app.stores.contract import Store, StoreError
from app.stores.records import DamagedRecord, Record, owned, unpack
from app.telemetry.metrics import Metrics

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0
_QUIET_SECONDS = 5.0
_WARN_SECONDS = 10.0
"""Minimum time between two log lines that say that the queue of the store is full."""


OnDone = Callable[[str | None], object]
"""Gets None if records were stored, else why they were dropped: one of the metric's causes, `store_...`."""


@dataclass(eq=False, slots=True)
class _Put:
    """Records that the store has been given. None: they have expired, and their scores were returned without ids."""

    records: Sequence[Record] | None
    size: int
    on_done: OnDone


class _Breaker:
    """Decides whether the store is given records, and knows whether it works. Any thread may call it.

    Args:
        metrics: whether the store works.
        max_waiting: maximum number of records that wait for the store.
        clock: monotonic seconds.

    Attributes:
        down: whether the last write failed, or a read after it.
        waiting: number of records that wait for the store.
        writes: number of writes that the store's thread has been given and that have not returned, expired ones
            included.
    """

    def __init__(self, metrics: Metrics, max_waiting: int, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._clock = clock
        self._retry_at = 0.0
        self._used_at = 0.0
        self._lock = threading.Lock()
        self.down = False
        self.waiting = 0
        self.writes = 0

    def admit(self, size: int) -> str | None:
        """Begin a write of `size` records, or return why they are dropped."""
        with self._lock:
            if self.down and (self.writes or self._clock() < self._retry_at):
                return "store_down"
            if self.waiting > 0 and self.waiting + size > self._max_waiting:
                return "store_full"
            self.waiting += size
            self._begin()  # while the store is down, this write is the probe
        return None

    def begin_check(self) -> None:
        """Begin a health check, which counts as a write without records."""
        with self._lock:
            self._begin()

    def _begin(self) -> None:
        self._used_at = self._clock()
        self._retry_at = self._used_at + _RETRY_SECONDS
        self.writes += 1

    def end_wait(self, size: int) -> None:
        """Note that `size` records wait no longer: they are stored, or have expired."""
        with self._lock:
            self.waiting -= size

    def end_write(self) -> None:
        """Note that a write has returned."""
        with self._lock:
            self.writes -= 1

    def is_quiet(self) -> bool:
        """Return whether no write has been begun for a while and all have returned."""
        return not self.writes and self._clock() >= (self._retry_at if self.down else self._used_at + _QUIET_SECONDS)

    def note(self, error: Exception | None) -> None:
        """Record the result of a write, or a failed read. A successful read proves nothing: the store may be full."""
        with self._lock:
            changed, self.down = self.down != (error is not None), error is not None
            if error is not None:
                self._retry_at = self._clock() + _RETRY_SECONDS
            self._metrics.reconstruction_store_up.set(error is None)
        if changed and error is not None:
            _log.error("reconstruction store down: %s", str(error) or type(error).__name__)
        elif changed:
            _log.warning("reconstruction store up again")


class Reconstructions:
    """The reconstruction store behind a circuit breaker. The event loop must call `check` before the first `put`.

    The store runs in its own thread. While it fails, records are dropped at once instead of waiting for its
    timeout; about once per second one write probes whether the store works again. While a write hangs, no further one
    begins.

    Args:
        store: the backend.
        metrics: counts dropped records.
        timeout: seconds that a score waits for its record to be stored.
        max_waiting: maximum number of records that wait for the store; more are dropped. It also limits the reads that
            wait while the store is down.
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
        self._worker = LaneWorker("store")
        self._warn_at = 0.0
        self._max_waiting = max_waiting
        self._breaker = _Breaker(metrics, max_waiting, clock)
        self._puts: Deadlines[_Put] = Deadlines(timeout, self._expire, clock)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def up(self) -> bool:
        """Whether the last write of records succeeded and no read of them has failed since."""
        return not self._breaker.down

    def put(self, records: Sequence[Record], on_done: OnDone) -> None:
        """Store all records under their ids, or none. Any thread may call it; it does not block.

        Args:
            records: at least one.
            on_done: called once, in any thread. Dropped records are counted. A slow store may have stored them although
                the call timed out.
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        put = _Put(records, len(records), on_done)
        cause = self._breaker.admit(put.size)
        if cause is not None:
            self._drop(put.size, cause)
            on_done(cause)
            return
        self._puts.begin(put, loop=self._loop)
        self._worker.submit(functools.partial(self._write, put))

    async def drop_cause(self, records: Sequence[Record]) -> str | None:
        """Store records as `put` does, and return why they were dropped; None if they were stored."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[str | None] = loop.create_future()

        def report(cause: str | None) -> None:
            if not future.done():
                future.set_result(cause)

        self.put(records, lambda cause: loop.call_soon_threadsafe(report, cause))
        return await future

    async def find(self, id: str, owner: str | None = None) -> Record | None:
        """Return the record of an owner under an id, or None.

        Raises:
            StoreError: the store did not answer in time.
        """
        key = owned(owner, id)
        content = await self._within_timeout(lambda: self._store.get(key))
        try:
            return None if content is None else unpack(content, key)
        except DamagedRecord:
            self._metrics.reconstruction_store_damaged.inc()
            _log.error("a damaged record was found and ignored")
            return None

    async def read_state(self, key: str) -> bytes | None:
        """Return the state under a key; None if there is none. Errors as for `find`."""
        return await self._within_timeout(lambda: self._store.read_state(key), of_records=False)

    async def swap_state(self, key: str, old: bytes | None, new: bytes) -> bool:
        """Replace the state under a key if it still is `old`, and return whether it was.

        Raises:
            StoreError: the store did not answer in time. It may have replaced the state although the call timed out.
        """
        return await self._within_timeout(lambda: self._store.swap_state(key, old, new), of_records=False)

    async def check(self) -> None:
        """Probe whether the store can be written; `up` has the result."""
        self._loop = asyncio.get_running_loop()
        self._breaker.begin_check()
        try:
            with contextlib.suppress(StoreError):
                await self._within_timeout(self._store.ping)
                self._breaker.note(None)
        finally:
            self._worker.submit(self._breaker.end_write)  # its turn comes when the write has returned, or was skipped

    async def check_when_quiet(self) -> None:
        """Probe the store unless requests have used it a moment ago, or a write has not returned."""
        if self._breaker.is_quiet():
            await self.check()

    async def aclose(self, timeout: float | None = None) -> bool:
        """Write what was accepted, then close the store. Return False if `timeout` seconds were not enough."""
        self._worker.submit(self._close)
        return await asyncio.to_thread(self._worker.close, timeout)

    def _drop(self, size: int, cause: str) -> None:
        self._metrics.reconstructions_dropped.inc(size)
        self._metrics.degraded(cause, size)
        if cause == "store_full" and self._clock() >= self._warn_at:
            self._warn_at = self._clock() + _WARN_SECONDS
            _log.warning(
                "reconstructions dropped: too many wait for the store", extra={"waiting": self._breaker.waiting}
            )

    def _expire(self, put: _Put) -> None:
        # The store's thread may hang, and then keeps the object: without the records and the micro-batch.
        put.records = None
        self._report(put, TimeoutError())
        put.on_done = lambda _: None

    def _write(self, put: _Put) -> None:
        try:
            records = put.records
            if records is None:
                return
            self._store.put([(owned(record.owner, record.id), record.pack()) for record in records])
        except Exception as error:
            if self._puts.end(put):
                self._report(put, error)
        else:
            if self._puts.end(put):
                self._report(put, None)
        finally:
            self._breaker.end_write()

    def _report(self, put: _Put, error: Exception | None) -> None:
        self._breaker.end_wait(put.size)
        self._breaker.note(error)
        cause = None
        if error is not None:
            cause = "store_slow" if isinstance(error, TimeoutError) else "store_down"
            self._drop(put.size, cause)
        put.on_done(cause)

    def _close(self) -> None:
        with contextlib.suppress(StoreError):
            self._store.close()

    async def _within_timeout(self, work: Callable[[], Result], *, of_records: bool = True) -> Result:
        if self._breaker.down and self._worker.waiting >= self._max_waiting:
            raise StoreError("too many accesses wait for the store")
        results: list[Result] = []
        try:
            async with asyncio.timeout(self._timeout):
                await self._worker.run(lambda: results.append(work()))
        except (StoreError, TimeoutError) as error:
            if results:  # the event loop paused, for example with the machine, and then saw the time limit first
                return results[0]
            if of_records:  # a store that rejects the states only, by its permissions for example, stores records
                self._breaker.note(error)
            raise StoreError("the store did not answer") from error
        return results[0]
