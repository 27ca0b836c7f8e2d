"""Scores single images: from an encoded image to its place in a micro-batch, and from detections to stored replies.

Every step after the forward pass handles a whole micro-batch: per image, that costs a third of the same steps per
request.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic_core import to_json

from app.concurrency.batcher import Resolve
from app.images import pictures, png
from app.inference.version import Detection, ModelVersion
from app.models.manifest import LOCAL
from app.problems import InternalError
from app.scoring.review.queue import ReviewQueue
from app.scoring.validity.monitor import ValidityMonitor
from app.scoring.verdict import DecisionRule, Fitted, Verdict
from app.stores.reconstructions import Reconstructions
from app.stores.records import PIXELS, Record, new_ids
from app.telemetry.metrics import Metrics, stage_times
from app.telemetry.spans import TraceContext
from app.telemetry.traces import Traces

_NO_GUARD = frozenset((None, LOCAL))
"""Reasons of scores that the autoencoder decided."""


@dataclass(slots=True, eq=False)
class ScoreRequest:
    """One image on its way from the socket to the response.

    Attributes:
        image: encoded PNG; raw pixels, uint8 [28, 28], if `decoded` is set or once it has been decoded.
        rule: threshold and false-positive rate.
        owner: name of the API key, or None.
        include_reconstruction: whether the reply embeds the reconstruction.
        fitted: how the image was changed before it was scored, if it was.
        decoded: whether `image` contains pixels from the start.
        store: whether the reconstruction is stored; else the reply has no JSON body.
        trace: its place in a trace, if it is sampled.
        future: receives the `Reply` or an error; cancel it when the client disconnects.
        decode_seconds: time from bytes to pixels.
        queued_at: when the image was queued, in `perf_counter` seconds.
    """

    image: bytes
    rule: DecisionRule
    owner: str | None
    include_reconstruction: bool
    fitted: Fitted | None
    future: asyncio.Future[Reply]
    decode_seconds: float = 0.0
    decoded: bool = False
    store: bool = True
    trace: TraceContext | None = None
    queued_at: float = 0.0


class Reply(NamedTuple):
    """A finished reply.

    Attributes:
        body: JSON, as `app.http.schemas.ScoreResponse` describes it.
        timing: the value of the header Server-Timing.
        facts: members of the access log line.
        verdict, detection: what the JSON is made from.
    """

    body: bytes
    timing: str
    facts: dict[str, Any]
    verdict: Verdict
    detection: Detection


class _Scored(NamedTuple):
    """An image of a micro-batch with a finite score."""

    place: int
    request: ScoreRequest
    detection: Detection
    verdict: Verdict
    document: dict[str, Any]
    body: bytes


class Scorer:
    """Scores single images in micro-batches and stores their reconstructions.

    Args:
        reconstructions: where reconstructions are stored.
        metrics: counts verdicts and times.
        prefix: path prefix of links.
        validity: compares the scores with the calibration.
        review: gets all scored images. None: no review queue.
        traces: records a span per micro-batch. None: no traces.
    """

    def __init__(
        self,
        reconstructions: Reconstructions,
        metrics: Metrics,
        prefix: str,
        validity: ValidityMonitor,
        *,
        traces: Traces | None = None,
        review: ReviewQueue | None = None,
    ) -> None:
        self._validity = validity
        self._review = review
        self._reconstructions = reconstructions
        self._metrics = metrics
        self._prefix = prefix
        self._traces = traces

    def submit(
        self,
        version: ModelVersion,
        image: bytes,
        rule: DecisionRule,
        *,
        owner: str | None = None,
        include_reconstruction: bool = False,
        fitted: Fitted | None = None,
        decode_seconds: float = 0.0,
        decoded: bool = False,
        store: bool = True,
        trace: TraceContext | None = None,
    ) -> asyncio.Future[Reply]:
        """Accept an image. Arguments as for `ScoreRequest`.

        Raises:
            Overloaded: the queue is full. This is checked before the image is decoded, so that load shedding is cheap.
        """
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        version.queue.enqueue(
            ScoreRequest(
                image, rule, owner, include_reconstruction, fitted, future, decode_seconds, decoded, store, trace
            )
        )
        return future

    def prepare(self, request: ScoreRequest) -> None:
        """Decode the image of an accepted request.

        Raises:
            InvalidImage: one of its kinds.
        """
        began = time.perf_counter()
        if not request.decoded:
            request.image = png.decode(request.image)
        request.queued_at = time.perf_counter()
        request.decode_seconds += request.queued_at - began

    def on_batch_done(
        self,
        version: ModelVersion,
        requests: Sequence[ScoreRequest],
        detections: Sequence[Detection],
        resolve: Resolve,
    ) -> None:
        """Build the verdicts of a micro-batch, store them, then resolve it. Runs in the inference thread.

        A score that is not finite becomes an `InternalError`.
        """
        began = time.perf_counter()
        detections = [
            detection._replace(mse=version.score_one(request.image))
            if request.rule.is_near(detection.mse)
            else detection
            for request, detection in zip(requests, detections, strict=True)
        ]
        places = [place for place, detection in enumerate(detections) if math.isfinite(detection.mse)]
        unguarded = [place for place in places if detections[place].reason in _NO_GUARD]
        self._validity.add(version, [detections[place].mse for place in unguarded])
        p_values = version.calibration.p_values([detections[place].mse for place in places])
        batch: list[_Scored] = []
        for place, p_value, id in zip(places, p_values, new_ids(len(places)), strict=True):
            request, detection = requests[place], detections[place]
            verdict = request.rule.verdict(detection.mse, p_value, detection.reason)
            document = request.rule.document(verdict, id, self._prefix, request.fitted)
            body = to_json(document) if request.store else b""
            batch.append(_Scored(place, request, detection, verdict, document, body))
        if self._review is not None:
            for each in batch:
                self._review.offer(version.manifest, each.request.image, each.verdict, each.document["id"])
        stored_ones = [scored for scored in batch if scored.request.store]
        if not stored_ones:
            resolve(functools.partial(self._replies, len(requests), batch, 0.0, None))
            return
        self._reconstructions.put(
            [
                Record(
                    scored.body,
                    scored.detection.pixels,
                    scored.detection.error_peak,
                    scored.document["id"],
                    scored.request.owner,
                )
                for scored in stored_ones
            ],
            lambda cause: resolve(
                functools.partial(self._replies, len(requests), batch, time.perf_counter() - began, cause)
            ),
        )

    def _replies(
        self, size: int, batch: Sequence[_Scored], store_seconds: float, dropped: str | None
    ) -> list[Reply | Exception]:
        """Return a reply or an error for each of `size` requests. Runs on the event loop.

        Args:
            size: number of images of the micro-batch.
            batch: those with a finite score.
            store_seconds: time that the store took.
            dropped: why the records were dropped; None if they were stored.
        """
        results: list[Any] = [None] * size
        for place in set(range(size)) - {scored.place for scored in batch} if len(batch) < size else ():
            results[place] = InternalError("the model returned a score that is not finite")
        for place, request, detection, verdict, document, body in batch:
            if dropped is not None and request.store:
                document["id"] = document["reconstruction"] = None
                body = to_json(document)  # noqa: PLW2901
            if request.include_reconstruction:
                body = _with_reconstruction(document, detection)  # noqa: PLW2901
            stages = (request.decode_seconds, detection.queue_seconds, detection.forward_seconds, store_seconds)
            timing, logged = stage_times(stages)
            facts = {
                "model": document["model"],
                "version": document["version"],
                "is_anomaly": document["is_anomaly"],
                "mse": document["mse"],
                **logged,
            }
            if dropped is not None and request.store:
                facts["without_id"], facts["without_id_cause"] = 1, dropped
            results[place] = Reply(body, timing, facts, verdict, detection)
        self._count(size, batch, store_seconds)
        if self._traces is not None and batch:
            self._trace(self._traces, size, batch, store_seconds)
        return results

    def _trace(self, traces: Traces, size: int, batch: Sequence[_Scored], store_seconds: float) -> None:
        stored = time.perf_counter()
        passed = stored - store_seconds
        stages = [("forward", passed - batch[0].detection.forward_seconds, passed), ("store", passed, stored)]
        document = batch[0].document
        traces.micro_batch(
            [scored.request.trace for scored in batch],
            stages if store_seconds else stages[:1],
            images=size,
            model=document["model"],
            version=document["version"],
        )

    def _count(self, size: int, batch: Sequence[_Scored], store_seconds: float) -> None:
        decode = sum(scored.request.decode_seconds for scored in batch)
        queue = max((scored.detection.queue_seconds for scored in batch), default=0.0)
        forward = batch[0].detection.forward_seconds if batch else 0.0
        self._metrics.micro_batch(
            size,
            (decode, queue, forward, store_seconds),
            batch[0].document["model"] if batch else None,
            [scored.detection.mse for scored in batch],
            sum(scored.document["is_anomaly"] for scored in batch),
        )


def _with_reconstruction(document: dict[str, Any], detection: Detection) -> bytes:
    picture = pictures.encode(pictures.grey_picture(detection.pixels[PIXELS : 2 * PIXELS]))
    return to_json({**document, "reconstruction_png": base64.b64encode(picture).decode()})
