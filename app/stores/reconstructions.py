"""The reconstruction store as the service uses it: stores micro-batches without blocking scores, behind a breaker."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from app.concurrency.deadlines import Deadlines
from app.concurrency.lanes import LaneWorker
from app.stores.contract import Store, StoreError
from app.telemetry.metrics import Metrics

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

PIXELS = 28 * 28
_HEADER = struct.Struct("<HfI")
_FORMAT = 1
MAX_RECORD_BYTES = _HEADER.size + 3 * PIXELS + 1024
"""Upper bound of a record's size; a reply has a few hundred bytes."""
_RETRY_SECONDS = 1.0
_QUIET_SECONDS = 5.0


class Record(NamedTuple):
    """A scored image as it is stored: the reply and three pictures.

    Attributes:
        reply: the JSON document that `POST /score` returned.
        pixels: input, reconstruction and error map, uint8 [3, 28, 28], as bytes.
        error_peak: the squared error that 255 means in the error map.
        id: names the record; empty once it has been read.
        owner: name of the API key, or None; only keys of the same name find the record.
    """

    reply: bytes
    pixels: bytes
    error_peak: float
    id: str = ""
    owner: str | None = None

    @property
    def input(self) -> bytes:
        """The image that was scored, uint8 [28, 28]."""
        return self.pixels[:PIXELS]

    @property
    def reconstruction(self) -> bytes:
        """The autoencoder's reconstruction, uint8 [28, 28]."""
        return self.pixels[PIXELS : 2 * PIXELS]

    @property
    def error_map(self) -> bytes:
        """Squared errors as shares of `error_peak`, uint8 [28, 28]."""
        return self.pixels[2 * PIXELS :]

    def pack(self) -> bytes:
        """Return the record as bytes."""
        return _HEADER.pack(_FORMAT, self.error_peak, len(self.reply)) + self.reply + self.pixels


def unpack(content: bytes) -> Record:
    """Read what `Record.pack` wrote.

    Raises:
        ValueError: the bytes are not a record of this format.
    """
    if len(content) < _HEADER.size:
        raise ValueError("not a record")
    version, peak, length = _HEADER.unpack_from(content)
    reply_end = _HEADER.size + length
    if version != _FORMAT or len(content) != reply_end + 3 * PIXELS:
        raise ValueError("not a record of this format")
    return Record(content[_HEADER.size : reply_end], content[reply_end:], peak)


def new_ids(count: int) -> list[str]:
    """Return new ids: 12 hexadecimal digits of the time in milliseconds, then 128 random bits that cannot be guessed.

    With the time in front, the index of the store grows at its end.
    """
    now, random = f"{time.time_ns() // 1_000_000:012x}", os.urandom(16 * count).hex()
    return [now + random[place : place + 32] for place in range(0, 32 * count, 32)]


def owned(owner: str | None, id: str) -> str:
    """Return the id under which an owner's reconstruction is stored: only keys of the same name find it again."""
    return id if owner is None else f"{owner}/{id}"


@dataclass(eq=False, slots=True)
class _Put:
    """Records that the store has been given."""

    size: int
    on_stored: Callable[[bool], object]
    expired: bool = False


class Reconstructions:
    """The reconstruction store behind a circuit breaker. The event loop must call `check` before the first `put`.

    The store runs in its own thread. While it fails, records are dropped at once instead of waiting for its
    timeout; about once per second one write probes whether the store works again.

    Args:
        store: the backend.
        metrics: counts dropped records.
        timeout: seconds that a score waits for its record to be stored.
        max_waiting: maximum number of records that wait for the store; more are dropped.
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
        self._retry_at = 0.0
        self._used_at = 0.0
        self._down = False
        self._max_waiting = max_waiting
        self._waiting = 0
        # Guards the state of the breaker: the store's thread and the inference thread both change it.
        self._lock = threading.Lock()
        self._puts: Deadlines[_Put] = Deadlines(timeout, self._expire, clock)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def up(self) -> bool:
        """Whether the last write succeeded and no read has failed since."""
        return not self._down

    def put(self, records: Sequence[Record], on_stored: Callable[[bool], object]) -> None:
        """Store all records under their ids, or none. Any thread may call it; it does not block.

        Args:
            records: at least one.
            on_stored: called once, in any thread: with False if the store is down or slow, and the records are counted
                as dropped. A slow store may have stored them although the call timed out.
        """
        put = _Put(len(records), on_stored)
        cause = self._admit(put)
        if cause is not None:
            self._drop(put.size, cause)
            on_stored(False)
            return
        self._worker.submit(functools.partial(self._write, put, records))

    async def stored(self, records: Sequence[Record]) -> bool:
        """Store records as `put` does, and return whether they were stored."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()

        def report(stored: bool) -> None:
            if not future.done():
                future.set_result(stored)

        self.put(records, lambda stored: loop.call_soon_threadsafe(report, stored))
        return await future

    async def find(self, id: str, owner: str | None = None) -> Record | None:
        """Return the record of an owner under an id, or None.

        Raises:
            StoreError: the store did not answer in time.
        """
        content = await self._within_timeout(lambda: self._store.get(owned(owner, id)))
        try:
            return None if content is None else unpack(content)
        except ValueError:
            _log.warning("a record of another format was found and ignored")
            return None

    async def read_state(self, key: str) -> bytes | None:
        """Return the state under a key; None if there is none. Errors as for `find`."""
        return await self._within_timeout(lambda: self._store.read_state(key))

    async def swap_state(self, key: str, old: bytes | None, new: bytes) -> bool:
        """Replace the state under a key if it still is `old`, and return whether it was.

        Raises:
            StoreError: the store did not answer in time. It may have replaced the state although the call timed out.
        """
        return await self._within_timeout(lambda: self._store.swap_state(key, old, new))

    async def check(self) -> None:
        """Probe whether the store can be written; `up` has the result."""
        self._loop = asyncio.get_running_loop()
        with self._lock:
            self._used_at = self._clock()
            self._retry_at = self._used_at + _RETRY_SECONDS
        with contextlib.suppress(StoreError):
            await self._within_timeout(self._store.ping)
            self._note(None)

    async def check_when_quiet(self) -> None:
        """Probe the store unless requests have used it a moment ago."""
        now = self._clock()
        if now >= (self._retry_at if self._down else self._used_at + _QUIET_SECONDS):
            await self.check()

    async def aclose(self, timeout: float | None = None) -> bool:
        """Write what was accepted, then close the store. Return False if `timeout` seconds were not enough."""
        self._worker.submit(self._close)
        return await asyncio.to_thread(self._worker.close, timeout)

    def _drop(self, size: int, cause: str) -> None:
        self._metrics.reconstructions_dropped.inc(size)
        self._metrics.degraded(cause, size)

    def _admit(self, put: _Put) -> str | None:
        """Return why the records are dropped, or None."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        with self._lock:
            now = self._clock()
            if self._down and now < self._retry_at:
                return "store_down"
            if self._waiting > 0 and self._waiting + put.size > self._max_waiting:
                return "store_full"
            # While the store is down, this write is the probe.
            self._retry_at = now + _RETRY_SECONDS
            self._used_at = now
            self._waiting += put.size
        self._puts.begin(put, loop=self._loop)
        return None

    def _expire(self, put: _Put) -> None:
        put.expired = True
        self._report(put, TimeoutError())

    def _write(self, put: _Put, records: Sequence[Record]) -> None:
        if put.expired:  # its scores have been returned without ids
            return
        try:
            self._store.put([(owned(record.owner, record.id), record.pack()) for record in records])
        except Exception as error:
            if self._puts.end(put):
                self._report(put, error)
            return
        if self._puts.end(put):
            self._report(put, None)

    def _report(self, put: _Put, error: Exception | None) -> None:
        with self._lock:
            self._waiting -= put.size
        self._note(error)
        if error is not None:
            self._drop(put.size, "store_slow" if isinstance(error, TimeoutError) else "store_down")
        put.on_stored(error is None)

    def _close(self) -> None:
        with contextlib.suppress(StoreError):
            self._store.close()

    async def _within_timeout(self, work: Callable[[], Result]) -> Result:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._worker.run(work)
        except (StoreError, TimeoutError) as error:
            self._note(error)
            raise StoreError("the store did not answer") from error

    def _note(self, error: Exception | None) -> None:
        """Record the result of a write or a failed read. A successful read proves nothing: the store may be full."""
        with self._lock:
            changed, self._down = self._down != (error is not None), error is not None
            if error is not None:
                self._retry_at = self._clock() + _RETRY_SECONDS
            self._metrics.reconstruction_store_up.set(error is None)
        if changed and error is not None:
            _log.error("reconstruction store down: %s", str(error) or type(error).__name__)
        elif changed:
            _log.warning("reconstruction store up again")
