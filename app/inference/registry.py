"""The model versions in memory: follows the model store, selects the version for a request, retires old versions."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from app.inference.detector import DetectorError
from app.inference.extras import ExtraVersions
from app.inference.loader import VersionLoader
from app.inference.reads import ModelStoreReads
from app.inference.version import ModelVersion
from app.models.repository import RepositoryError
from app.problems import ModelNotFound, ModelUnavailable
from app.process import release_free_memory
from app.settings import Settings
from app.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

REJECTED_SECONDS = 30.0
"""Seconds before a rejected version is read again. A full disk or a missing GPU may be temporary."""
_FAILURES_UNREADY = 3
_RETIRE_SECONDS = 0.1
_STORE_UNREADABLE = "the model store could not be read"


@dataclass(frozen=True)
class _Rejection:
    version: int | None
    reason: str
    until: float


class Registry:
    """Every model of the model store, each with its current version. Build it, then `start` it.

    Args:
        loader: loads versions.
        settings: default model, queue, how often to poll for new versions.
        metrics: versions and rejections.
        clock: monotonic seconds.

    Attributes:
        repository: the model store.
        reads: the thread that reads the model store for requests.
        extras: the versions besides the current ones.
    """

    def __init__(
        self, loader: VersionLoader, settings: Settings, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.repository = loader.repository
        self.device = loader.device
        self.default_model = settings.default_model
        self.extras = ExtraVersions(
            loader.load,
            self._retire,
            max_versions=settings.max_extra_versions,
            max_waiting=settings.queue_max_images,
            deadline=settings.deadline_ms / 1000,
            clock=clock,
        )
        self.reads = ModelStoreReads(deadline=settings.deadline_ms / 1000, max_waiting=settings.queue_max_images)
        self._loader = loader
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._current: dict[str, ModelVersion] = {}
        self._rejected: dict[str, _Rejection] = {}
        self._store_missing = False
        self._retiring: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load the current versions and start polling. A rejected version or a failing model store is logged."""
        try:
            await self.refresh()
        except OSError:  # of a network file system, for example: the watcher tries again
            _log.exception(_STORE_UNREADABLE)
        release_free_memory()
        self._loops = [asyncio.create_task(self._watch()), asyncio.create_task(self._probe_failed())]

    async def aclose(self, timeout: float | None = None) -> bool:
        """Finish the accepted images and end the threads. Return False if `timeout` seconds were not enough."""
        self.reads.close()
        await _cancel(self._loops)
        await self.extras.aclose()
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                await asyncio.gather(*(version.queue.aclose() for version in self._all()), *self._retiring)
        except TimeoutError:
            return False
        return await self._loader.aclose(None if timeout is None else timeout - (time.monotonic() - began))

    @property
    def waiting(self) -> int:
        """Number of images in the queues of all versions."""
        return sum(version.queue.waiting for version in self._all())

    def current(self, name: str) -> ModelVersion | None:
        """Return the current version of a model, or None."""
        return self._current.get(name)

    def rejection(self, name: str) -> str | None:
        """Return why the version that the model store calls current is not served, or None."""
        return rejected.reason if (rejected := self._rejected.get(name)) else None

    def names(self) -> list[str]:
        """Return the names of all models that are served or rejected, sorted."""
        return sorted({*self._current, *self._rejected})

    def loaded(self, reference: str | None) -> ModelVersion | None:
        """Return the version for a reference if it is the current one of its model. Arguments as for `select`."""
        name, _, number = (reference or self.default_model).partition("@")
        version = self._current.get(name)
        return version if version is None or not number or version.manifest.version == int(number) else None

    async def select(self, reference: str | None) -> ModelVersion:
        """Return the version for a reference; load it if it is not the current one.

        Args:
            reference: `name`, `name@version`, or None for the default model.

        Raises:
            ModelNotFound: there is no such model or version.
            ModelUnavailable: the version exists, but was rejected.
            DeadlineExceeded: it is still being loaded, so later requests will find it, or the model store did not
                respond in time.
            Overloaded: too many versions are loaded, or too many requests wait for a version to be loaded or for the
                model store.
        """
        if (version := self.loaded(reference)) is not None:
            return version
        name, _, number = (reference or self.default_model).partition("@")
        if number:
            if (version := self.extras.get(name, int(number))) is not None:
                return version
            if int(number) not in await self.reads.run(functools.partial(self.repository.versions, name)):
                raise ModelNotFound(f"the model store has no version {number} of {name}")
            return await self.extras.load(name, int(number))
        if reference is None or name in self._rejected:
            raise ModelUnavailable(f"the model {name} is not loaded", cause="version_rejected")
        raise ModelNotFound(f"the model store has no model {name}")

    def problems(self) -> list[str]:
        """Return why the default model cannot score now; empty if it can."""
        if (version := self._current.get(self.default_model)) is None:
            return [self.rejection(self.default_model) or f"the model {self.default_model} is not in the model store"]
        found = []
        if version.queue.busy_seconds > self._settings.deadline_ms / 1000:
            found.append("the inference thread has not finished a micro-batch within a request's deadline")
        if version.failures >= _FAILURES_UNREADY:
            found.append("the last forward passes failed")
        return found

    async def refresh(self) -> None:
        """Compare the model store with the loaded versions and load what is new, one version at a time."""
        names = await self._loader.run(self.repository.names)
        if self._current and not names:
            # An unmounted disk looks like this. To serve nothing, stop the service.
            if not self._store_missing:
                _log.error("the model store is missing or empty: the current versions keep serving")
            self._store_missing = True
            return
        self._store_missing = False
        for name in sorted(names, key=lambda name: name != self.default_model):
            await self._refresh_model(name)
            self._metrics.model_version_rejected.labels(name).set(name in self._rejected)
        for name in self._current.keys() - names:
            if await self._loader.run(functools.partial(self.repository.lacks, name)):
                self._retire(self._current.pop(name))
                self.extras.drop(name)
        for name in self._rejected.keys() - names:
            del self._rejected[name]
            self._metrics.model_version_rejected.labels(name).set(0)

    async def _refresh_model(self, name: str) -> None:
        wanted: int | None = None
        try:
            wanted = await self._loader.run(functools.partial(self.repository.current, name))
            served = self._current.get(name)
            if wanted is None or (served is not None and served.manifest.version == wanted):
                self._rejected.pop(name, None)
                return
            rejected = self._rejected.get(name)
            if rejected is not None and rejected.version == wanted and self._clock() < rejected.until:
                return
            fresh = await self.extras.take(name, wanted) or await self._loader.load(name, wanted)
        except (RepositoryError, DetectorError) as error:
            self._reject(name, wanted, str(error))
            return
        except Exception as error:  # one bad model must not stop the others
            self._reject(name, wanted, f"{name}@{wanted}: it cannot be loaded ({type(error).__name__})")
            return
        replaced, self._current[name] = self._current.get(name), fresh
        self._rejected.pop(name, None)
        self._metrics.model_version.labels(name).set(wanted)
        self._metrics.model_threshold.labels(name).set(fresh.manifest.threshold)
        _log.info("version serves", extra={"model": name, "version": wanted, "device": str(self.device)})
        if replaced is not None:
            self.extras.put(replaced)

    def _reject(self, name: str, version: int | None, reason: str) -> None:
        before = self._rejected.get(name)
        if before is None or (before.version, before.reason) != (version, reason):
            _log.error("version rejected: %s", reason, extra={"model": name, "version": version}, exc_info=True)
            self._metrics.model_load_failures.labels(name).inc()
        self._rejected[name] = _Rejection(version, reason, self._clock() + REJECTED_SECONDS)

    def _retire(self, version: ModelVersion) -> None:
        # A batch request may use the version for longer than its queue is open.
        weakref.finalize(version, _release_memory_soon, asyncio.get_running_loop()).atexit = False
        task = asyncio.create_task(_close_queue(version))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.watch_seconds)
            try:
                await self.refresh()
            except Exception:  # without its watcher, the service would never load a new version
                _log.exception(_STORE_UNREADABLE)

    async def _probe_failed(self) -> None:
        # Not in `_watch`: while the model store hangs, a version that works again must become ready.
        while True:
            await asyncio.sleep(self._settings.watch_seconds)
            await asyncio.gather(*(version.probe() for version in self._all() if version.failures or version.suspect))

    def _all(self) -> list[ModelVersion]:
        return [*self._current.values(), *self.extras.versions()]


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _close_queue(version: ModelVersion) -> None:
    # A request that selected the version a moment ago may not have queued its image yet.
    await asyncio.sleep(_RETIRE_SECONDS)
    await version.queue.aclose()


def _release_memory_soon(loop: asyncio.AbstractEventLoop) -> None:
    """Return the memory of a version to the operating system, once it has been freed. Any thread may call it."""
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(loop.call_later, _RETIRE_SECONDS, loop.run_in_executor, None, release_free_memory)
