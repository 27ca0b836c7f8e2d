"""One loaded version with its queue: from images to detections, a micro-batch at a time.

Knows: micro-batches, whose turn the inference thread is. Does not know: other versions, HTTP, PNG, stores.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.concurrency.batcher import Done, MicroBatcher
from app.concurrency.lanes import Worker
from app.inference.detector import Detector
from app.models.calibration import Calibration
from app.models.manifest import Manifest
from app.models.repository import Artifact
from app.settings import Settings
from app.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

_NO_PLANES, _NO_PEAKS = np.zeros((0, 3, 28, 28), np.uint8), np.zeros(0, np.float32)

Answer = TypeVar("Answer")
Order = TypeVar("Order")


class Waiting(NamedTuple, Generic[Order]):
    """An image in the queue.

    Attributes:
        image: raw pixels, uint8 [28, 28] as bytes.
        since: when it came, in `perf_counter` seconds.
        order: what whoever finishes the micro-batch must know of the request.
    """

    image: bytes
    since: float
    order: Order


class Detection(NamedTuple):
    """What a model version made of one image.

    Attributes:
        mse: the anomaly score.
        reason: the guard that decided, or None.
        pixels: input, reconstruction and error map, uint8 [3, 28, 28], as bytes.
        error_peak: the squared error that 255 stands for in the error map.
        queue_seconds, forward_seconds: where the time went.
    """

    mse: float
    reason: str | None
    pixels: bytes
    error_peak: float
    queue_seconds: float
    forward_seconds: float


@dataclass(frozen=True)
class BulkScores:
    """What a model version made of N images of a batch request; the pictures are empty unless they were asked for.

    Attributes:
        mse: float32 [N].
        reasons: the guard that decided, for each image.
        planes: uint8 [N, 3, 28, 28], input, reconstruction and error map.
        peak: float32 [N], the squared error that 255 stands for in the error map.
        queue_seconds, forward_seconds: where the time went.
    """

    mse: NDArray[np.float32]
    reasons: list[str | None]
    planes: NDArray[np.uint8]
    peak: NDArray[np.float32]
    queue_seconds: float = 0.0
    forward_seconds: float = 0.0


def _joined(parts: Sequence[BulkScores]) -> BulkScores:
    """Put together what was scored in several turns, without pictures."""
    return BulkScores(
        np.concatenate([part.mse for part in parts]),
        [reason for part in parts for reason in part.reasons],
        _NO_PLANES,
        _NO_PEAKS,
        sum(part.queue_seconds for part in parts),
        sum(part.forward_seconds for part in parts),
    )


Finish = Callable[["Serving", Sequence[Waiting[Any]], Sequence[Detection], Done[Any]], object]
"""Turns the detections of one micro-batch of a version into what each future of `Engine.enqueue` will hold.

It is called in the inference thread, which it keeps from the next micro-batch meanwhile.
"""


class Serving:
    """One loaded version with its queue."""

    def __init__(
        self,
        artifact: Artifact,
        detector: Detector,
        worker: Worker,
        settings: Settings,
        metrics: Metrics,
        *,
        finish: Finish,
    ) -> None:
        self.manifest: Manifest = artifact.manifest
        self.calibration: Calibration = artifact.calibration
        self.failures = 0
        self._golden = np.ascontiguousarray(artifact.golden.images[:1])
        self._detector = detector
        self._worker = worker
        self._metrics = metrics
        self._step = settings.batch_chunk_images
        self._finish = finish
        self.batcher: MicroBatcher[Waiting[Any], Any] = MicroBatcher(
            self._run,
            worker,
            max_size=settings.microbatch_max_size,
            max_waiting=settings.queue_max_images,
            deadline=settings.deadline_ms / 1000,
            max_delay=settings.microbatch_max_delay_ms / 1000,
        )

    async def probe(self) -> None:
        """Score one golden image outside the queue; a success clears the count of failures."""
        golden = Waiting(self._golden.tobytes(), time.perf_counter(), None)
        with contextlib.suppress(Exception):
            detect = functools.partial(self._detect, [golden])
            await self._worker.do(functools.partial(self._counted, detect, 1), lane=self)

    async def run_many(self, pixels: bytearray, since: float, *, draw: bool) -> BulkScores:
        """Score one chunk of a batch request, in the turn of all batch requests; `Engine.score_many` says the rest."""
        rest, parts = memoryview(pixels), list[BulkScores]()
        while rest:
            detect = functools.partial(self._detect_many, rest, since, draw=draw)
            work = functools.partial(self._counted, detect, len(rest) // 784)
            parts.append(await self._worker.do(work, lane="bulk"))
            passes, last = divmod(len(parts[-1].mse), self._step)
            self._metrics.batch_images.observe_all([self._step] * passes + [last] * (last > 0))
            rest, since = rest[784 * len(parts[-1].mse) :], time.perf_counter()
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _run(self, items: list[Waiting[Any]], done: Done[Any]) -> None:
        self._finish(self, items, self._counted(functools.partial(self._detect, items), len(items)), done)

    # What follows happens in the inference thread.

    def _counted(self, detect: Callable[[], Answer], count: int) -> Answer:
        try:
            found = detect()
        except Exception:
            self.failures += 1
            self._metrics.model_failures.inc()
            _log.exception("forward pass failed", extra={"model": self.manifest.name, "images": count})
            raise
        self.failures = 0
        return found

    def _detect_many(self, pixels: memoryview, since: float, *, draw: bool) -> BulkScores:
        started = time.perf_counter()
        images = np.frombuffer(pixels, np.uint8).reshape(-1, 1, 28, 28)
        planes, peak = _NO_PLANES, _NO_PEAKS
        if draw:
            found = self._detector.draw(images)
            mse, codes, planes, peak = found.mse, found.reason, found.planes, found.peak
        else:
            mse, codes = self._detector.score(images)
        said: list[str | None] = [None] * len(codes)
        for place in np.flatnonzero(codes).tolist():
            said[place] = self.manifest.reasons[codes[place] - 1]
        return BulkScores(mse, said, planes, peak, started - since, time.perf_counter() - started)

    def _detect(self, items: list[Waiting[Any]]) -> list[Detection]:
        started = time.perf_counter()
        count = len(items)
        images = np.frombuffer(bytearray().join([item.image for item in items]), np.uint8).reshape(count, 1, 28, 28)
        found = self._detector.draw(images)
        forward = time.perf_counter() - started
        reasons = (None, *self.manifest.reasons)
        return [
            Detection(mse, reasons[code], found.planes[n].tobytes(), peak, started - items[n].since, forward)
            for n, (mse, code, peak) in enumerate(
                zip(found.mse.tolist(), found.reason.tolist(), found.peak.tolist(), strict=True)
            )
        ]
