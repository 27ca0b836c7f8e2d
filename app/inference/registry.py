"""Model versions in memory: which answers, when it is loaded, when it is replaced.

Knows: versions, the inference thread, the model store's changes. Does not know: HTTP, PNG, stores.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from app.concurrency.lanes import Worker
from app.inference.detector import (
    Detector,
    DetectorError,
    choose_device,
    give_memory_back,
    use_one_thread,
)
from app.inference.version import BulkScores, Finish, Serving, Waiting
from app.models.repository import Repository, RepositoryError
from app.problems import DeadlineExceeded, InternalError, ModelNotFound, ModelUnavailable, Overloaded
from app.settings import Settings
from app.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

_FAILURES_UNREADY = 3
CHUNKS_AT_ONCE = 2
"""Of all batch requests: one that is being scored, and one that the thread takes as soon as it is free."""
PASSES_AT_ONCE = 4
"""Forward passes of a chunk without pictures; between two of them the thread turns to whoever else waits."""
_RETIRE_SECONDS = 0.1
_RESIDENCE_SECONDS = 10.0
"""Minimum time that a version loaded by `name@version` stays loaded. It limits how many loads clients can cause: a
cache that evicts at once is thrashed by a client that requests more versions in turn than the cache holds."""
_REFUSED_SECONDS = 30.0
"""How long a version stays refused before it is read again: the reason may have passed, a disk or a GPU be back."""


@dataclass(frozen=True)
class _Refusal:
    version: int | None
    why: str
    until: float


class Engine:
    """Every model of the model store, each with the version that answers.

    Build it, then `start` it. One inference thread serves all versions in turn.

    Args:
        repository: where versions are read.
        settings: device, batches, queue, how often to look for new versions.
        metrics: batch sizes, versions, failures.
        finish: what becomes of the detections of each micro-batch.

    Raises:
        DeviceError: the device that was asked for is not there.
    """

    def __init__(self, repository: Repository, settings: Settings, metrics: Metrics, finish: Finish) -> None:
        self.repository = repository
        self.device = choose_device(settings.device)
        self.default_model = settings.default_model
        self._settings = settings
        self._metrics = metrics
        self._finish = finish
        self._worker = Worker("inference", use_one_thread)
        self._current: dict[str, Serving] = {}
        self._extra: OrderedDict[tuple[str, int], Serving] = OrderedDict()  # least recently used first
        self._evictable_at: dict[tuple[str, int], float] = {}
        self._loads: dict[tuple[str, int], asyncio.Task[Serving | None]] = {}
        self._loading = asyncio.Lock()
        self._waiting_for_loads = 0
        self._refused: dict[str, _Refusal] = {}
        self._refused_extra: dict[tuple[str, int], float] = {}
        self._out_of_reach = False
        self._retiring: set[asyncio.Task[None]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._bulk_turns = asyncio.Semaphore(CHUNKS_AT_ONCE)

    async def start(self) -> None:
        """Load what is current, and watch the model store from now on. A refused version is logged, not raised."""
        await self.refresh()
        give_memory_back()
        self._watcher = asyncio.create_task(self._watch())

    async def aclose(self) -> None:
        """Answer what was accepted, then let go of everything."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        for load in self._loads.values():
            load.cancel()
        await asyncio.gather(*self._loads.values(), return_exceptions=True)
        await asyncio.gather(*(serving.batcher.aclose() for serving in self._all()), *self._retiring)
        self._worker.close()

    @property
    def waiting(self) -> int:
        """Images that wait for the model now."""
        return sum(serving.batcher.waiting for serving in self._all())

    def current(self, name: str) -> Serving | None:
        """Return the version of a model that answers now, or None."""
        return self._current.get(name)

    def refusal(self, name: str) -> str | None:
        """Return why the version that the disk calls current is not the one that answers, or None."""
        refused = self._refused.get(name)
        return refused.why if refused else None

    def names(self) -> list[str]:
        """Return the names of all models that are served or refused, sorted."""
        return sorted({*self._current, *self._refused})

    def loaded(self, reference: str | None) -> Serving | None:
        """Return the version that a request means if it is the current one of its model; `select` says the rest."""
        name, _, version = (reference or self.default_model).partition("@")
        serving = self._current.get(name)
        return serving if serving is None or not version or serving.manifest.version == int(version) else None

    async def select(self, reference: str | None) -> Serving:
        """Return the version that a request means, loading it when it is not the current one.

        Args:
            reference: `name`, `name@version`, or None for the default model.

        Raises:
            ModelNotFound: there is no such model or version.
            ModelUnavailable: it is there, but was refused.
            DeadlineExceeded: it is still being loaded; later requests find it.
            Overloaded: too many versions are being loaded, or too many requests wait for that.
        """
        serving = self.loaded(reference)
        if serving is not None:
            return serving
        name, _, version = (reference or self.default_model).partition("@")
        if version:
            return await self._load_extra(name, int(version))
        if reference is None or name in self._refused:
            raise ModelUnavailable(f"the model {name} is not loaded")
        raise ModelNotFound(f"the model store has no model {name}")

    def enqueue(self, serving: Serving, image: bytes, order: Any, future: asyncio.Future[Any]) -> None:
        """Accept one image for the next micro-batch.

        Args:
            serving: from `select`.
            image: raw pixels, uint8 [28, 28], as bytes.
            order: for `finish`.
            future: will hold what `finish` makes of it, or DeadlineExceeded, InternalError.

        Raises:
            Overloaded, ModelUnavailable: it was not accepted.
        """
        try:
            serving.batcher.enqueue(Waiting(image, time.perf_counter(), order), future)
        except Overloaded:
            self._metrics.shed.inc()
            raise

    def check_room(self, serving: Serving, coming: int = 0) -> None:
        """Find out whether one more image would be accepted; `MicroBatcher.check_room` says the rest."""
        try:
            serving.batcher.check_room(coming)
        except Overloaded:
            self._metrics.shed.inc()
            raise

    async def score_many(self, serving: Serving, pixels: bytearray, *, draw: bool) -> BulkScores:
        """Score one chunk of a batch request.

        The micro-batches of each version and the chunks of all batch requests take turns; a chunk without pictures ends
        its turn after any of its forward passes, and goes on in its next one. So a micro-batch waits for one pass at
        most. Chunks of one request are on their way together, and each counts its own waiting.

        Args:
            serving: from `select`.
            pixels: uint8 [N, 28, 28], N at least 1.
            draw: whether the pictures are wanted.

        Raises:
            InternalError: the model failed.
        """
        since = time.perf_counter()
        async with self._bulk_turns:
            try:
                return await serving.run_many(pixels, since, draw=draw)
            except Exception:  # it was logged where it happened
                raise InternalError from None

    def problems(self) -> list[str]:
        """Return why the default model cannot answer now; empty means that it can."""
        serving = self._current.get(self.default_model)
        if serving is None:
            return [self.refusal(self.default_model) or f"the model {self.default_model} is not in the model store"]
        found = []
        if serving.batcher.busy_seconds > self._settings.deadline_ms / 1000:
            found.append("the inference thread has not answered for longer than a request may wait")
        if serving.failures >= _FAILURES_UNREADY:
            found.append("the last forward passes failed")
        return found

    async def refresh(self) -> None:
        """Compare the model store with what is loaded and load what is new, one version after the other."""
        names = await asyncio.to_thread(self.repository.names)
        if self._current and not names:
            # A disk that was taken away looks like this. Whoever wants nothing to be served stops the service.
            if not self._out_of_reach:
                _log.error("the model store is out of reach or empty: what serves goes on serving")
            self._out_of_reach = True
            return
        self._out_of_reach = False
        for name in sorted(names, key=lambda name: name != self.default_model):
            await self._refresh_one(name)
        for name in [name for name in self._current if name not in names]:
            if await asyncio.to_thread(self.repository.lacks, name):
                self._retire(self._current.pop(name))
                for key in [key for key in self._extra if key[0] == name]:
                    self._retire_extra(key)
        for name in [name for name in self._refused if name not in names]:
            del self._refused[name]
            self._metrics.model_refused.labels(name).set(0)

    async def _refresh_one(self, name: str) -> None:
        await self._load_current(name)
        self._metrics.model_refused.labels(name).set(name in self._refused)

    async def _load_current(self, name: str) -> None:
        wanted: int | None = None
        try:
            wanted = await asyncio.to_thread(self.repository.current, name)
            serving = self._current.get(name)
            if wanted is None or (serving is not None and serving.manifest.version == wanted):
                self._refused.pop(name, None)
                return
            refused = self._refused.get(name)
            if refused is not None and refused.version == wanted and time.monotonic() < refused.until:
                return
            fresh = await self._load(name, wanted)
        except (RepositoryError, DetectorError) as error:
            self._refuse(name, wanted, str(error))
            return
        except Exception as error:  # whatever is off with one model, the others are looked at
            self._refuse(name, wanted, f"{name}@{wanted}: it cannot be loaded ({type(error).__name__})")
            return
        retired, self._current[name] = self._current.get(name), fresh
        self._refused.pop(name, None)
        self._metrics.model_version.labels(name).set(wanted)
        _log.info("version serves", extra={"model": name, "version": wanted, "device": str(self.device)})
        if retired is not None:
            self._retire(retired)

    def _refuse(self, name: str, version: int | None, why: str) -> None:
        before = self._refused.get(name)
        if before is None or (before.version, before.why) != (version, why):
            _log.error("version refused: %s", why, extra={"model": name, "version": version}, exc_info=True)
            self._metrics.load_failures.labels(name).inc()
        self._refused[name] = _Refusal(version, why, time.monotonic() + _REFUSED_SECONDS)

    async def _load(self, name: str, version: int) -> Serving:
        loop = asyncio.get_running_loop()
        artifact = await asyncio.to_thread(self.repository.open, name, version)
        sizes = _warm_up_sizes(max(self._settings.microbatch_max_size, self._settings.batch_chunk_images))
        load = functools.partial(
            Detector.load,
            artifact,
            self.device,
            sizes,
            step=self._settings.batch_chunk_images,
            others=self._worker.others,
        )
        loader = ThreadPoolExecutor(1, initializer=use_one_thread)
        try:
            detector = await loop.run_in_executor(loader, load)
        finally:
            loader.shutdown(wait=False)  # whoever is stopped meanwhile does not wait
        return Serving(artifact, detector, self._worker, self._settings, self._metrics, finish=self._finish)

    async def _load_extra(self, name: str, version: int) -> Serving:
        key = name, version
        serving = self._extra.get(key)
        if serving is None:
            serving = await self._loaded(key)
        if serving is None:
            raise ModelUnavailable(f"{name}@{version} was refused")
        if key in self._extra:
            self._extra.move_to_end(key)
        return serving

    async def _loaded(self, key: tuple[str, int]) -> Serving | None:
        """Wait, within a request's deadline, for a version that is loaded at most once, however many ask for it."""
        if time.monotonic() < self._refused_extra.get(key, 0.0):
            return None
        if key not in self._loads and key[1] not in await asyncio.to_thread(self.repository.versions, key[0]):
            raise ModelNotFound(f"the model store has no version {key[1]} of {key[0]}")
        if key in self._extra:
            return self._extra[key]
        if self._waiting_for_loads >= self._settings.queue_max_images:
            self._metrics.shed.inc()
            raise Overloaded(f"{self._waiting_for_loads} requests wait for versions that are being loaded")
        if key not in self._loads:
            self._check_extra_room()
            self._loads[key] = load = asyncio.create_task(self._load_beside(key))
            load.add_done_callback(lambda _: self._loads.pop(key))
        self._waiting_for_loads += 1
        try:
            async with asyncio.timeout(self._settings.deadline_ms / 1000):
                return await asyncio.shield(self._loads[key])
        except TimeoutError:
            raise DeadlineExceeded("the version is still being loaded") from None
        finally:
            self._waiting_for_loads -= 1

    def _check_extra_room(self) -> None:
        """Raise `Overloaded` if no room can be made for one more version besides the current ones."""
        now, limit = time.monotonic(), self._settings.max_extra_versions
        resident = sum(now < self._evictable_at[key] for key in self._extra)
        if resident + len(self._loads) >= limit:
            self._metrics.shed.inc()
            raise Overloaded(
                f"{limit} versions besides the current ones are loaded or being loaded, and each stays loaded for at"
                f" least {_RESIDENCE_SECONDS:g} s"
            )

    async def _load_beside(self, key: tuple[str, int]) -> Serving | None:
        async with self._loading:
            try:
                serving = await self._load(*key)
            except (RepositoryError, DetectorError) as error:
                _log.error("version refused: %s", error, extra={"model": key[0], "version": key[1]})
                now = time.monotonic()
                self._refused_extra = {key: until for key, until in self._refused_extra.items() if now < until}
                self._refused_extra[key] = now + _REFUSED_SECONDS
                return None
            except Exception:
                _log.exception("version not loaded", extra={"model": key[0], "version": key[1]})
                return None
        now = time.monotonic()
        evictable = [other for other in self._extra if self._evictable_at[other] <= now]
        while len(self._extra) >= self._settings.max_extra_versions and evictable:
            self._retire_extra(evictable.pop(0))
        self._extra[key] = serving
        self._evictable_at[key] = now + _RESIDENCE_SECONDS
        return serving

    def _retire_extra(self, key: tuple[str, int]) -> None:
        del self._evictable_at[key]
        self._retire(self._extra.pop(key))

    def _retire(self, serving: Serving) -> None:
        async def retire() -> None:
            # Whoever selected it a moment ago is still on the way to its queue.
            await asyncio.sleep(_RETIRE_SECONDS)
            await serving.batcher.aclose()

        # A batch request may use the version for longer than its queue is open.
        weakref.finalize(serving, _give_memory_back_soon, asyncio.get_running_loop()).atexit = False
        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.watch_seconds)
            try:
                await self.refresh()
                for serving in self._all():
                    if serving.failures:
                        await serving.probe()
            except Exception:  # a watcher that dies silently would serve an old version for ever
                _log.exception("the model store could not be looked at")

    def _all(self) -> list[Serving]:
        return [*self._current.values(), *self._extra.values()]


def _give_memory_back_soon(loop: asyncio.AbstractEventLoop) -> None:
    """Return the memory of a version to the operating system, once it has been freed. Any thread may call it."""
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(loop.call_later, _RETIRE_SECONDS, loop.run_in_executor, None, give_memory_back)


def _warm_up_sizes(largest: int) -> list[int]:
    sizes, size = [], 1
    while size < largest:
        sizes.append(size)
        size *= 2
    return [*sizes, largest]
