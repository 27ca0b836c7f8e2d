"""Reads and loads model versions, one at a time, in a separate thread."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TypeVar

from app.concurrency.lanes import LaneWorker
from app.inference.detector import Detector
from app.inference.device import choose_device, use_one_thread
from app.inference.version import ModelVersion, OnBatchDone, Prepare
from app.models.repository import Repository
from app.settings import Settings
from app.telemetry.metrics import Metrics

Result = TypeVar("Result")

CHUNKS_AT_ONCE = 2
"""Chunks of all batch requests that are submitted to the inference thread: one is scored, one follows without delay."""


class VersionLoader:
    """Loads versions onto the device, for one inference thread that serves them all.

    Args:
        repository: reads the model store.
        settings: device, micro-batches, queue.
        metrics: of the versions.
        prepare, on_batch_done: as in `ModelVersion`.

    Raises:
        DeviceError: the requested device does not exist.
    """

    def __init__(
        self,
        repository: Repository,
        settings: Settings,
        metrics: Metrics,
        *,
        prepare: Prepare,
        on_batch_done: OnBatchDone,
    ) -> None:
        self.repository = repository
        self.device = choose_device(settings.device)
        self._settings = settings
        self._metrics = metrics
        self._prepare = prepare
        self._on_batch_done = on_batch_done
        self._inference = LaneWorker("inference", use_one_thread)
        self._thread = LaneWorker("load", use_one_thread)
        self._chunk_slots = asyncio.Semaphore(CHUNKS_AT_ONCE)

    async def load(self, name: str, number: int) -> ModelVersion:
        """Read a version, warm it up and compare its golden scores.

        Raises:
            RepositoryError: its files are missing, altered, or contradict each other.
            DetectorError: its module does not reproduce its golden scores here.
        """
        artifact = await self.run(functools.partial(self.repository.open, name, number))
        load = functools.partial(
            Detector.load,
            artifact,
            self.device,
            _warm_up_sizes(max(self._settings.microbatch_max_size, self._settings.batch_chunk_images)),
            step=self._settings.batch_chunk_images,
            others_waiting=self._inference.others_waiting,
        )
        detector = await self.run(load)
        return ModelVersion(
            artifact,
            detector,
            self._inference,
            self._settings,
            self._metrics,
            prepare=self._prepare,
            on_batch_done=self._on_batch_done,
            chunk_slots=self._chunk_slots,
        )

    async def run(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns, or raise what it raises. It runs in the thread that loads versions.

        Reads of a model store that hangs would block the event loop's thread pool, and the process could not end.
        """
        return await self._thread.run(work)

    async def aclose(self, timeout: float | None = None) -> bool:
        """End both threads. Return False if `timeout` seconds were not enough for both."""
        closes = (asyncio.to_thread(worker.close, timeout) for worker in (self._thread, self._inference))
        return all(await asyncio.gather(*closes))


def _warm_up_sizes(largest: int) -> list[int]:
    sizes, size = [], 1
    while size < largest:
        sizes.append(size)
        size *= 2
    return [*sizes, largest]
