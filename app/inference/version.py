"""One loaded model version with its queue: runs forward passes over micro-batches and over chunks of batch requests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.concurrency.batcher import HasFuture, MicroBatcher, Resolve
from app.concurrency.lanes import LaneWorker
from app.inference.detector import Detector
from app.inference.passes import is_finite, join_pictures, within_memory
from app.models.repository import Artifact
from app.problems import InternalError, Overloaded
from app.settings import Settings
from app.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

_NO_PLANES, _NO_PEAKS = np.zeros((0, 3, 28, 28), np.uint8), np.zeros(0, np.float32)

Result = TypeVar("Result")


class ImageRequest(HasFuture, Protocol):
    """A request in the queue of a version.

    Attributes:
        image: raw pixels, uint8 [28, 28], as bytes.
        queued_at: when it was queued, in `perf_counter` seconds.
    """

    image: bytes
    queued_at: float


class Detection(NamedTuple):
    """The result of one image of a micro-batch.

    Attributes:
        mse: the anomaly score.
        reason: the guard that decided, or None.
        pixels: input, reconstruction and error map, uint8 [3, 28, 28], as bytes.
        error_peak: the squared error that 255 means in the error map.
        queue_seconds, forward_seconds: time in the queue and in the forward pass.
    """

    mse: float
    reason: str | None
    pixels: bytes
    error_peak: float
    queue_seconds: float
    forward_seconds: float


@dataclass(frozen=True)
class ChunkScores:
    """The results of N images of a batch request; without `draw`, the pictures are empty.

    Attributes:
        mse: float32 [N].
        reasons: the guard that decided, for each image.
        planes: uint8 [N, 3, 28, 28], input, reconstruction and error map.
        peak: float32 [N], the squared error that 255 means in the error map.
        queue_seconds, forward_seconds: time in the queue and in the forward passes.
    """

    mse: NDArray[np.float32]
    reasons: list[str | None]
    planes: NDArray[np.uint8]
    peak: NDArray[np.float32]
    queue_seconds: float = 0.0
    forward_seconds: float = 0.0


EMPTY_CHUNK = ChunkScores(np.zeros(0, np.float32), [], _NO_PLANES, _NO_PEAKS)

Prepare = Callable[[Any], object]
"""Sets `image` of a request to its pixels and `queued_at` to the time, on the event loop; may raise a problem."""
OnBatchDone = Callable[["ModelVersion", Sequence[Any], Sequence[Detection], Resolve], object]
"""Turns the detections of a micro-batch into the results of its requests, and calls `Resolve` with them.

It is called in the inference thread and delays the next micro-batch.
"""


class ModelVersion:
    """One loaded version with its queue.

    Args:
        artifact: the version as read from the model store.
        detector: its module on the device.
        worker: the inference thread, shared by all versions.
        settings: micro-batch size and delay, queue length, deadline.
        metrics: counts micro-batches and failures.
        prepare: sets the pixels of each request before it is queued.
        on_batch_done: gets the detections of each micro-batch.
        chunk_slots: limits the chunks of all batch requests that are submitted to the worker.

    Attributes:
        manifest, calibration: of the version.
        detector: the autoencoder.
        failures: number of consecutive forward passes that failed.
        suspect: whether a score was not finite since the last probe. One image can be the reason, so only a probe shows
            whether the version has failed.
        queue: takes images of single scores; their futures get the results of `on_batch_done` or a problem.
    """

    def __init__(
        self,
        artifact: Artifact,
        detector: Detector,
        worker: LaneWorker,
        settings: Settings,
        metrics: Metrics,
        *,
        prepare: Prepare,
        on_batch_done: OnBatchDone,
        chunk_slots: asyncio.Semaphore,
    ) -> None:
        self.manifest = artifact.manifest
        self.calibration = artifact.calibration
        self.failures, self.suspect = 0, False
        self._golden = np.ascontiguousarray(artifact.golden.images[:1])
        self.detector = detector
        self._worker = worker
        self._metrics = metrics
        self._step = settings.batch_chunk_images
        self._on_batch_done = on_batch_done
        self._chunk_slots = chunk_slots
        self.queue: MicroBatcher[ImageRequest] = MicroBatcher(
            self._run_batch,
            worker,
            prepare=prepare,
            max_size=settings.microbatch_max_size,
            max_waiting=settings.queue_max_images,
            deadline=settings.deadline_ms / 1000,
            max_delay=settings.microbatch_max_delay_ms / 1000,
        )

    async def score_many(self, pixels: bytearray, *, draw: bool) -> ChunkScores:
        """Score one chunk of a batch request.

        The micro-batches of each version and the chunks of all batch requests take turns; a chunk without pictures ends
        its turn after any of its forward passes when other work waits. So a micro-batch waits for one pass at most.

        Args:
            pixels: uint8 [N, 28, 28], N at least 1.
            draw: whether to return the pictures.

        Raises:
            InternalError: the model failed.
            Overloaded: the inference thread could not be started.
        """
        since = time.perf_counter()
        async with self._chunk_slots:
            try:
                return await self._score_chunk(pixels, since, draw=draw)
            except Overloaded:
                raise
            except Exception:  # the inference thread has logged the error
                raise InternalError from None

    async def probe(self) -> None:
        """Score one golden image outside the queue; a success clears the count of failures."""
        with contextlib.suppress(Exception):
            await self._worker.run(self._probe, lane=self)

    async def score_alone(self, pixels: memoryview) -> float:
        """Return the score of one image of a batch request, uint8 [28, 28], in a separate forward pass.

        Raises:
            InternalError: the model failed.
            Overloaded: the inference thread could not be started.
        """
        try:
            return await self._worker.run(functools.partial(self.score_one, pixels), lane="batch")
        except Overloaded:
            raise
        except Exception:
            raise InternalError from None

    async def _score_chunk(self, pixels: bytearray, since: float, *, draw: bool) -> ChunkScores:
        rest, parts = memoryview(pixels), list[ChunkScores]()
        while rest:
            detect = functools.partial(self._detect_many, rest, since, draw=draw)
            work = functools.partial(self._count_failure, detect, len(rest) // 784)
            parts.append(await self._worker.run(work, lane="batch"))
            done = len(parts[-1].mse)
            passes, last = divmod(done, self._step)
            self._metrics.forward_passes([self._step] * passes + [last] * (last > 0))
            rest, since = rest[784 * done :], time.perf_counter()
        return parts[0] if len(parts) == 1 else _join(parts)

    # The following methods run in the inference thread.

    def score_one(self, pixels: bytes | memoryview) -> float:
        """Return the score of one image, uint8 [28, 28], in a separate forward pass."""
        image = np.frombuffer(bytearray(pixels), np.uint8).reshape(1, 1, 28, 28)
        return self._count_failure(functools.partial(self.detector.score_alone, image), 1)

    def _run_batch(self, requests: list[ImageRequest], resolve: Resolve) -> None:
        detections = self._count_failure(functools.partial(self._detect, requests), len(requests))
        try:
            self._on_batch_done(self, requests, detections, resolve)
        except Exception:
            extra = {"model": self.manifest.name, "images": len(requests)}
            _log.exception("results of a micro-batch failed", extra=extra)
            raise

    def _count_failure(self, detect: Callable[[], Result], count: int) -> Result:
        extra = {"model": self.manifest.name, "images": count}
        try:
            found = detect()
        except Exception:
            self.failures += 1
            self._metrics.forward_pass_failures.inc()
            _log.exception("forward pass failed", extra=extra)
            raise
        if is_finite(found):
            self.failures = 0
        else:
            self.suspect = True
            self._metrics.forward_pass_failures.inc()
            _log.error("forward pass returned a score that is not finite", extra=extra)
        return found

    def _probe(self) -> None:
        self.suspect = False
        found = self._count_failure(functools.partial(self.detector.draw, self._golden), 1)
        self.failures += self.suspect or int(found.reason.max()) > len(self.manifest.reasons)

    def _detect_many(self, pixels: memoryview, since: float, *, draw: bool) -> ChunkScores:
        started = time.perf_counter()
        images = np.frombuffer(pixels, np.uint8).reshape(-1, 1, 28, 28)
        planes, peak = _NO_PLANES, _NO_PEAKS
        if draw:
            found = join_pictures(within_memory(self.detector.draw, images))
            mse, codes, planes, peak = found.mse, found.reason, found.planes, found.peak
        else:
            parts = within_memory(self.detector.score, images)
            mse, codes = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        reasons: list[str | None] = [None] * len(codes)
        for place in np.flatnonzero(codes).tolist():
            reasons[place] = self.manifest.reasons[codes[place] - 1]
        return ChunkScores(mse, reasons, planes, peak, started - since, time.perf_counter() - started)

    def _detect(self, requests: list[ImageRequest]) -> list[Detection]:
        started = time.perf_counter()
        pixels = bytearray().join([request.image for request in requests])
        images = np.frombuffer(pixels, np.uint8).reshape(len(requests), 1, 28, 28)
        found = join_pictures(within_memory(self.detector.draw, images))
        forward = time.perf_counter() - started
        reasons = (None, *self.manifest.reasons)
        rows = zip(requests, found.mse.tolist(), found.reason.tolist(), found.peak.tolist(), found.planes, strict=True)
        return [
            Detection(mse, reasons[code], planes.tobytes(), peak, started - request.queued_at, forward)
            for request, mse, code, peak, planes in rows
        ]


def _join(parts: Sequence[ChunkScores]) -> ChunkScores:
    """Concatenate the results of several turns, without pictures."""
    return ChunkScores(
        np.concatenate([part.mse for part in parts]),
        [reason for part in parts for reason in part.reasons],
        _NO_PLANES,
        _NO_PEAKS,
        sum(part.queue_seconds for part in parts),
        sum(part.forward_seconds for part in parts),
    )
