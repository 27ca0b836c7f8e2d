"""Feeds the streams of all model versions, and stores them once per second.

All processes that share a reconstruction store continue one stream per version: each appends its latest images to the
stored state, in one atomic step. Images are appended once or, if the store fails, not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from app.inference.registry import Registry
from app.inference.version import ModelVersion
from app.models.manifest import Manifest
from app.scoring.validity.report import Validity, describe
from app.scoring.validity.stream import Reference, Stream, StreamState
from app.stores import StoreError
from app.stores.reconstructions import Reconstructions
from app.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 1.0
_REFRESH_SECONDS = 10.0
"""Time between two reads of a stream that only other processes continue."""
_MAX_WAITING = 200_000
"""Maximum number of images of a version that wait for the store; further images are dropped."""
_ATTEMPTS = 5
"""Maximum number of attempts per second, if other processes store the same stream at the same time."""


@dataclass
class _Watched:
    """A model version with its images that wait to be counted."""

    manifest: Manifest
    reference: Reference
    waiting: list[Sequence[float] | NDArray[np.floating]] = field(default_factory=list)
    count: int = 0
    refresh_at: float = 0.0

    @property
    def key(self) -> str:
        """Names the stream in the store."""
        name, version, digest = _id_of(self.manifest)
        return f"validity/{name}@{version}/{digest[:16]}"


def _id_of(manifest: Manifest) -> tuple[str, int, str]:
    """Return the identity of a stream. A model that was deleted and trained again has another calibration."""
    return manifest.name, manifest.version, manifest.files["calibration.npy"]


class ValidityMonitor:
    """Tests for each model version whether its images still score like its calibration images.

    Args:
        reconstructions: the store, which also stores the streams.
        metrics: get the state of the current versions.
        limit: the evidence at which a version counts as changed.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        reconstructions: Reconstructions,
        metrics: Metrics,
        limit: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._reconstructions = reconstructions
        self._metrics = metrics
        self._limit = limit
        self._clock = clock
        self._generator = np.random.default_rng()
        self._watched: dict[tuple[str, int, str], _Watched] = {}
        self._current: dict[str, tuple[str, int, str]] = {}
        """Stream of the current version of each model."""
        # Guards the waiting images: the inference thread and the event loop both add some.
        self._lock = threading.Lock()
        self._flushing = asyncio.Lock()
        self._flushes: set[asyncio.Task[None]] = set()
        self._failing = False

    def add(self, version: ModelVersion, scores: Sequence[float] | NDArray[np.floating]) -> None:
        """Add scores in order, to be counted within a second. Any thread may call it; it does not block.

        Args:
            version: the version that scored the images.
            scores: finite scores that no guard decided, [N].
        """
        if not len(scores):
            return
        watched = self._watched_of(version)
        with self._lock:
            fits = watched.count + len(scores) <= _MAX_WAITING
            if fits:
                watched.waiting.append(scores)
                watched.count += len(scores)
        if not fits:
            self._metrics.validity_images_dropped.inc(len(scores))

    async def report(self, version: ModelVersion) -> Validity:
        """Describe the stream of a version, including the images of other processes that have been stored.

        Raises:
            StoreError: the store did not answer in time.
        """
        watched = self._watched_of(version)
        flush = asyncio.create_task(self._flush(watched))
        self._flushes.add(flush)  # the event loop keeps only weak references to tasks
        flush.add_done_callback(self._flushes.discard)
        await asyncio.shield(flush)  # if the client leaves, the images must not be lost
        content = await self._reconstructions.read_state(watched.key)
        state = StreamState.read(content, self._clock())
        return describe(watched.manifest, watched.reference, state, self._limit)

    @asynccontextmanager
    async def watch(self, registry: Registry) -> AsyncIterator[None]:
        """Store the streams once per second inside the block, and at its end."""
        task = asyncio.create_task(self._watch(registry))
        try:
            yield
        finally:
            async with self._flushing:  # the images of a flush that is cancelled would be lost
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self.flush()

    async def flush(self) -> None:
        """Append the waiting images of all versions to their streams."""
        for watched in list(self._watched.values()):
            try:
                await self._flush(watched)
            except Exception:  # the next version and the next second must follow
                _log.exception("scores could not be compared with the calibration")

    def _watched_of(self, version: ModelVersion) -> _Watched:
        id = _id_of(version.manifest)
        found = self._watched.get(id)
        if found is None:
            watched = _Watched(version.manifest, Reference.of(version.manifest, version.calibration))
            found = self._watched.setdefault(id, watched)
        return found

    async def _watch(self, registry: Registry) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            for name in registry.names():
                version = registry.current(name)
                if version is not None and self._current.get(name) != (id := _id_of(version.manifest)):
                    self._current[name] = id
                    self._watched_of(version).refresh_at = 0.0
            await self.flush()

    async def _flush(self, watched: _Watched) -> None:
        async with self._flushing:  # also without waiting images: those that are being stored must count in a report
            now = time.monotonic()
            if not self._reconstructions.up or (not watched.count and now < watched.refresh_at):
                return
            watched.refresh_at = now + _REFRESH_SECONDS
            with self._lock:
                parts, watched.waiting, watched.count = watched.waiting, [], 0
            scores = np.concatenate([np.zeros(0), *parts]).astype(np.float32)
            try:
                left = await self._append(watched, scores)
            except Exception:
                self._metrics.validity_images_dropped.inc(len(scores))
                raise
            if len(left):
                with self._lock:
                    watched.waiting.insert(0, left)
                    watched.count += len(left)

    async def _append(self, watched: _Watched, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append scores to the stored stream. Return the scores to append later: all or none."""
        may_be_stored = False
        try:
            for _ in range(_ATTEMPTS):
                old = await self._reconstructions.read_state(watched.key)
                state, new = await asyncio.to_thread(self._continued, watched, old, scores)
                if new is not None:
                    may_be_stored = True
                    if not await self._reconstructions.swap_state(watched.key, old, new):
                        may_be_stored = False
                        continue
                    self._failing = False
                self._export(watched, state)
                return scores[:0]
        except StoreError as error:
            if not self._failing:
                cause = error.__cause__ or error
                _log.warning("streams of scores cannot be stored: %s", str(cause) or type(cause).__name__)
            self._failing = True
            if may_be_stored:  # a second attempt could count the images twice
                self._metrics.validity_images_dropped.inc(len(scores))
                return scores[:0]
        return scores

    def _continued(
        self, watched: _Watched, content: bytes | None, scores: NDArray[np.float32]
    ) -> tuple[StreamState, bytes | None]:
        """Return the stream with the scores, and the bytes to store if it has changed."""
        now = self._clock()
        state = StreamState.read(content, now)
        damaged = content is not None and not state.token
        if damaged:
            self._metrics.reconstruction_store_damaged.inc()
            _log.error("a damaged stream of scores was found: a new one begins")
        if not (len(scores) or damaged):
            return state, None
        stream = Stream(watched.reference, state, self._limit, self._generator)
        stream.add(scores, now)
        changed_before, state = state.changed, stream.state(now)
        if changed_before is None and state.changed is not None:
            manifest = watched.manifest
            facts = {"model": manifest.name, "version": manifest.version, "images": state.changed_after}
            _log.warning("the scores no longer resemble the calibration scores", extra=facts)
        return state, state.pack()

    def _export(self, watched: _Watched, state: StreamState) -> None:
        manifest = watched.manifest
        if self._current.get(manifest.name) == _id_of(manifest):
            self._metrics.validity(manifest.name, state.images, state.log_peak, changed=state.changed is not None)
