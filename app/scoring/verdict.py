"""From what the model made of a micro-batch to replies, with their reconstructions kept.

Knows: verdicts, ids, JSON, records. Does not know: HTTP, queues, how an image is scored.

Everything that a reply needs after the model is done here for a whole micro-batch in one go: a loop over small steps
costs a third of the same steps spread over as many requests.
"""

from __future__ import annotations

import base64
import functools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic_core import to_json

from app.concurrency.batcher import Done
from app.http.auth import owned
from app.http.schemas import Fitted
from app.images import pictures
from app.inference.version import Detection, Serving, Waiting
from app.problems import InternalError
from app.stores.reconstructions import Reconstructions
from app.stores.record import PIXELS, Record
from app.telemetry.metrics import STAGES, Metrics


@dataclass(slots=True)
class Order:
    """What a request wants of its reply.

    Attributes:
        threshold: anomalous means strictly above it.
        alpha: the wanted false-alarm rate behind it.
        owner: the name of the API key that asked, or None.
        fitted: what was done to the image before it was scored, if anything.
        embed: whether the reconstruction is wanted in the reply.
        decode_seconds: from the bytes to the pixels.
    """

    threshold: float
    alpha: float
    owner: str | None
    fitted: Fitted | None
    embed: bool
    decode_seconds: float = 0.0


class Reply(NamedTuple):
    """A finished reply.

    Attributes:
        body: JSON, as `schemas.ScoreResponse` describes it.
        stages: seconds of each of `metrics.STAGES`.
        facts: what the access log says of it besides route and status.
    """

    body: bytes
    stages: tuple[float, float, float, float]
    facts: dict[str, Any]

    @property
    def timing(self) -> str:
        """The value of the header Server-Timing."""
        return server_timing(self.stages)


class _Batch(NamedTuple):
    """A micro-batch whose store has not answered yet: of `size` images, what those became that have a score."""

    size: int
    places: list[int]
    orders: list[Order]
    found: list[Detection]
    documents: list[dict[str, Any]]
    bodies: list[bytes]
    began: float


def logged(stages: Sequence[float]) -> dict[str, int]:
    """Return the seconds of each of `STAGES` as members of a log line, in microseconds."""
    decode, queue, forward, store = stages
    return {
        "decode_us": int(1e6 * decode),
        "queue_us": int(1e6 * queue),
        "forward_us": int(1e6 * forward),
        "store_us": int(1e6 * store),
    }


def server_timing(stages: Sequence[float]) -> str:
    """Return the value of the header Server-Timing (W3C), in milliseconds, for the seconds of each of `STAGES`."""
    decode, queue, forward, store = stages
    return _TIMING % (1e3 * decode, 1e3 * queue, 1e3 * forward, 1e3 * store)


_TIMING = ", ".join(f"{stage};dur=%.3f" for stage in STAGES)


def new_ids(count: int) -> list[str]:
    """Return fresh ids: 12 hexadecimal digits of the time, then 128 random bits that nobody can guess.

    The time before them lets a store's index grow at its end.
    """
    now, chance = f"{time.time_ns() // 1_000_000:012x}", os.urandom(16 * count).hex()
    return [now + chance[place : place + 32] for place in range(0, 32 * count, 32)]


class Replies:
    """Makes replies and keeps their reconstructions.

    Args:
        reconstructions: where reconstructions are kept.
        metrics: counts verdicts and where the time went.
        prefix: path prefix of the links.
    """

    def __init__(self, reconstructions: Reconstructions, metrics: Metrics, prefix: str) -> None:
        self._reconstructions = reconstructions
        self._metrics = metrics
        self._prefix = prefix

    def finish(
        self,
        serving: Serving,
        waiting: Sequence[Waiting[Order]],
        detections: Sequence[Detection],
        done: Done[Reply],
    ) -> None:
        """Make the replies of one micro-batch; a score that is not a number becomes an `InternalError`.

        Args:
            serving: the version that scored.
            waiting: the images and their orders.
            detections: what the model made of each.
            done: gets what makes the replies, when the store has answered; the event loop calls it, and counts there.
        """
        began = time.perf_counter()
        places = [place for place, found in enumerate(detections) if math.isfinite(found.mse)]
        orders = [waiting[place].order for place in places]
        found = [detections[place] for place in places]
        documents = self._documents(serving, orders, found)
        bodies = [to_json(document) for document in documents]
        batch = _Batch(len(waiting), places, orders, found, documents, bodies, began)
        if not places:
            done(functools.partial(self._replies, batch, began, True))
            return
        records = [
            (owned(order.owner, document["id"]), Record(body, detection.pixels, detection.error_peak))
            for order, document, body, detection in zip(orders, documents, bodies, found, strict=True)
        ]
        self._reconstructions.keep(
            records, lambda kept: done(functools.partial(self._replies, batch, time.perf_counter(), kept))
        )

    def _replies(self, batch: _Batch, stored_at: float, kept: bool) -> list[Reply | Exception]:
        bodies = batch.bodies
        if not kept:
            for document in batch.documents:
                document["id"] = document["reconstruction"] = None
            bodies = [to_json(document) for document in batch.documents]
        stored = stored_at - batch.began
        results: list[Reply | Exception] = [
            InternalError("the model gave no number as its score") for _ in range(batch.size)
        ]
        for place, order, document, body, detection in zip(
            batch.places, batch.orders, batch.documents, bodies, batch.found, strict=True
        ):
            stages = (order.decode_seconds, detection.queue_seconds, detection.forward_seconds, stored)
            facts = {
                "model": document["model"],
                "version": document["version"],
                "is_anomaly": document["is_anomaly"],
                "mse": document["mse"],
                **logged(stages),
            }
            results[place] = Reply(_embedded(document, detection) if order.embed else body, stages, facts)
        self._count(batch, stored)
        return results

    def _documents(self, serving: Serving, orders: Sequence[Order], found: Sequence[Detection]) -> list[dict[str, Any]]:
        manifest, path = serving.manifest, f"{self._prefix}/reconstruction/"
        p_values = serving.calibration.p_values(detection.mse for detection in found)
        documents: list[dict[str, Any]] = []
        for order, detection, p_value, key in zip(orders, found, p_values, new_ids(len(found)), strict=True):
            document = {
                "id": key,
                "model": manifest.name,
                "version": manifest.version,
                "mse": detection.mse,
                "threshold": order.threshold,
                "alpha": order.alpha,
                "p_value": p_value,
                "is_anomaly": detection.mse > order.threshold,
                "reason": detection.reason,
                "reconstruction": path + key,
            }
            if order.fitted is not None:
                document["fitted"] = order.fitted.model_dump()
            documents.append(document)
        return documents

    def _count(self, batch: _Batch, stored: float) -> None:
        self._metrics.batch_images.observe(batch.size)
        if not batch.found:
            return
        anomalous = sum(document["is_anomaly"] for document in batch.documents)
        mses = [detection.mse for detection in batch.found]
        self._metrics.scores(batch.documents[0]["model"], mses, anomalous)
        decode = sum(order.decode_seconds for order in batch.orders)
        queue = max(detection.queue_seconds for detection in batch.found)
        self._metrics.micro_batch((decode, queue, batch.found[0].forward_seconds, stored))


def _embedded(document: dict[str, Any], detection: Detection) -> bytes:
    picture = pictures.encode(pictures.grey_picture(detection.pixels[PIXELS : 2 * PIXELS]))
    return to_json({**document, "reconstruction_png": base64.b64encode(picture).decode()})
