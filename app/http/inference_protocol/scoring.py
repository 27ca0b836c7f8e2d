"""Handles `POST /v2/models/{name}/infer` and `POST /v1/models/{name}:predict`.

A request with few images joins the micro-batches of `POST /score`. A larger one takes turns with them like a batch
request, and occupies one of the places of batch requests.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, MutableMapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from app.http.batch import BatchHandler
from app.http.batch_exchange import BatchExchange
from app.http.batch_replies import Send
from app.http.bodies import ClientLeft, Receive, decoded_pieces, pieces
from app.http.inference_protocol import reading, tensors
from app.http.inference_protocol.outputs import MAX_PICTURES, Rows
from app.http.inference_protocol.reading import Images, Reply
from app.http.npy import PIXELS
from app.http.score import ScoreHandler
from app.images import png
from app.images.prepare import choose
from app.inference.registry import Registry
from app.models.manifest import Preparation
from app.problems import BodyTooLarge, Problem
from app.scoring.batch import PASSES_AT_ONCE, BatchJob, BatchScorer, Chunk, ScoredChunk
from app.scoring.score import Reply as ScoreReply
from app.scoring.score import Scorer
from app.scoring.verdict import DecisionRule
from app.settings import Settings
from app.telemetry.metrics import Metrics, stage_times

_NOTHING = np.zeros((0, 3, 28, 28), np.uint8), np.zeros(0, np.float32)


class _Places(ExitStack):
    """The places that a request occupies: that of a batch request, and that of a request with `fit`.

    A body above the limit of a single score needs a place, however it is sent: the places bound the memory of all such
    requests together.
    """

    def __init__(self, batch: BatchHandler, scope: MutableMapping[str, Any]) -> None:
        super().__init__()
        self._batch = batch
        self._scope = scope
        self._taken = False

    def take(self) -> None:
        """Occupy the place of a batch request, unless the request has one.

        Raises:
            Overloaded: all places are occupied.
        """
        if not self._taken:
            self.enter_context(self._batch.place(self._scope))
            self._taken = True


class InferHandler:
    """Handles the requests of the protocol that score images.

    Args:
        registry: selects the model version.
        scorer: scores few images, in micro-batches.
        batch_scorer: scores many images.
        score: fits images, within its limits.
        batch: has the places of batch requests.
        metrics: counts the times of requests.
        settings: limits.

    Attributes:
        max_body_bytes: maximum size of a body.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        scorer: Scorer,
        batch_scorer: BatchScorer,
        score: ScoreHandler,
        batch: BatchHandler,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self._registry = registry
        self._scorer = scorer
        self._batch_scorer = batch_scorer
        self._score = score
        self._batch = batch
        self._metrics = metrics
        self._settings = settings
        self.max_body_bytes = settings.batch_max_body_bytes

    async def infer(self, reference: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle a request of v2. Arguments as for `predict`."""
        await self._handle(reference, scope, receive, send, reading.read_infer)

    async def predict(self, reference: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle a request of v1. A client that disconnects, or does not read its reply, ends it silently.

        Args:
            reference: `name` or `name@version`.
            scope, receive, send: of the ASGI request.

        Raises:
            Problem: the request is rejected; nothing has been sent.
        """
        await self._handle(reference, scope, receive, send, reading.read_predict)

    async def _handle(
        self, reference: str, scope: MutableMapping[str, Any], receive: Receive, send: Send, read: Any
    ) -> None:
        headers, settings = dict(scope["headers"]), self._settings
        timeout, slowest = settings.body_timeout_ms / 1000, settings.batch_min_bytes_per_second
        with _Places(self._batch, scope) as places:
            body = self._body(headers, receive, places)
            try:
                version = await self._registry.select(reference)
                images, reply = await read(headers, body, self._settings, version.manifest.preparation.fit)
                preparation = choose(images.parameters.fit, version.manifest)
                rule = DecisionRule.for_alpha(version.manifest, version.calibration, images.parameters.alpha)
                job = BatchJob(version, rule, scope.get("owner"), store=False, pictures=reply.has_pictures)
                facts = scope.get("facts", {})
                if preparation.fit != "strict":
                    places.enter_context(self._score.fitter.place(scope))
                if reply.has_pictures and images.count > MAX_PICTURES:
                    detail = f"{images.count} images with pictures, the maximum is {MAX_PICTURES}"
                    raise BodyTooLarge(detail, hint="Request `reconstruction` and `error_map` for fewer images.")
                exchange = BatchExchange(job, "", timeout, slowest)
                if images.count <= min(settings.microbatch_max_size, settings.queue_max_images):
                    timing = await self._score_few(job, images, reply, scope, preparation)
                else:
                    places.take()
                    timing = await self._score_many(job, images, reply, scope, preparation)
                    facts.update(exchange.facts())
                await _send(exchange, send, reply, images.count, timing)
            except ClientLeft:
                scope.get("facts", {})["client_left"] = True

    def _body(self, headers: dict[bytes, bytes], receive: Receive, places: _Places) -> tensors.Body:
        settings = self._settings
        arriving = pieces(
            receive,
            declared=headers.get(b"content-length"),
            limit=settings.batch_max_body_bytes,
            timeout=settings.body_timeout_ms / 1000,
            slowest=settings.batch_min_bytes_per_second,
        )

        def on_bytes(size: int) -> None:
            if size > settings.max_body_bytes:
                places.take()

        encoding = headers.get(b"content-encoding")
        return tensors.Body(decoded_pieces(encoding, arriving, limit=settings.batch_max_body_bytes), on_bytes)

    def _chunks(
        self, scope: MutableMapping[str, Any], images: Images, size: int, preparation: Preparation
    ) -> AsyncIterator[Chunk]:
        decode = _decode if preparation.fit == "strict" else functools.partial(self._fit, scope, preparation)
        return images.chunks(size, decode, reading.largest(images.parameters, self._settings))

    async def _fit(self, scope: MutableMapping[str, Any], preparation: Preparation, image: bytes) -> bytes:
        return (await self._score.fitter.fit(scope, image, preparation)).pixels

    async def _score_few(
        self,
        job: BatchJob,
        images: Images,
        reply: Reply,
        scope: MutableMapping[str, Any],
        preparation: Preparation,
    ) -> str:
        """Score images in micro-batches, each like a single score. Return the value of Server-Timing."""
        facts, trace = scope.get("facts", {}), scope.get("trace")
        found = [chunk async for chunk in self._chunks(scope, images, images.count, preparation)]
        pixels, seconds = found[0].pixels, found[0].decode_seconds
        futures: list[asyncio.Future[ScoreReply]] = []
        try:
            for start in range(0, len(pixels), PIXELS):
                image = bytes(pixels[start : start + PIXELS])
                futures.append(
                    self._scorer.submit(
                        job.version, image, job.rule, decoded=True, store=False, decode_seconds=seconds, trace=trace
                    )
                )
                seconds = 0.0  # the images were decoded together, so the first one carries the time
            results = await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()
        planes, peak = _NOTHING
        if job.pictures:
            planes = np.stack([np.frombuffer(each.detection.pixels, np.uint8) for each in results])
            planes = planes.reshape(-1, 3, 28, 28)
            peak = np.array([each.detection.error_peak for each in results], np.float32)
        reply.add(Rows([each.verdict for each in results], planes, peak))
        facts.update(results[0].facts)
        if len(results) > 1:
            facts.pop("mse")
            facts.pop("is_anomaly")
            anomalous = sum(each.verdict.is_anomaly for each in results)
            facts.update({"count": len(results), "anomalous": anomalous, "failed": 0})
        return results[0].timing

    async def _score_many(
        self,
        job: BatchJob,
        images: Images,
        reply: Reply,
        scope: MutableMapping[str, Any],
        preparation: Preparation,
    ) -> str:
        """Score images like a batch request. Return the value of Server-Timing."""
        size = self._settings.batch_chunk_images * (1 if job.pictures else PASSES_AT_ONCE)
        try:
            async for scored in self._batch_scorer.score(job, self._chunks(scope, images, size, preparation)):
                if scored.problems:
                    raise _of_image(scored, job.tally.count)
                reply.add(Rows(job.rule.verdicts(scored.mse, scored.reasons), scored.planes, scored.peak))
                job.tally.add(scored)
        finally:
            self._metrics.batch(job.tally.seconds)
        return stage_times(job.tally.seconds)[0]


async def _decode(image: bytes) -> bytes:
    return png.decode(image)


def _of_image(scored: ScoredChunk, before: int) -> Problem:
    place = min(scored.problems)
    problem = scored.problems[place]
    problem.detail = f"image {before + place}: {problem.detail or problem.title}"
    return problem


async def _send(exchange: BatchExchange, send: Send, reply: Reply, count: int, timing: str) -> None:
    manifest = exchange.job.rule.manifest
    headers, body = reply.finish(manifest.name, manifest.version, count)
    content = b"".join(body)
    headers += [
        (b"content-length", b"%d" % len(content)),
        (b"cache-control", b"no-store"),
        (b"server-timing", timing.encode()),
    ]
    async with exchange.sending(len(content)):
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})
