"""`POST /score` from a request's bytes to a reply's bytes.

Knows: the order of the steps and how long each took. Does not know: the framework; `routes` documents this path and
`edge` calls it directly, so that no layer that it does not need stands before it.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError

from app import fit, images
from app.bodies import Receive, image_of, read_body
from app.calibration import Calibration, CalibrationError
from app.engine import Engine
from app.keys import owned
from app.manifest import Manifest
from app.metrics import STAGES, Metrics
from app.problems import InvalidParameter, MalformedRequest, Overloaded, UnsupportedAlpha
from app.reconstructions import Reconstructions
from app.record import Record
from app.schemas import Fitted, ScoreQuery, ScoreResponse
from app.settings import Settings

Query = TypeVar("Query", bound=BaseModel)

LONGEST_QUERY = 1024
"""Bytes of a query string; a caller must not choose how much of it is remembered."""
_NO_QUERY = ScoreQuery()
_ABSENT: dict[tuple[bool, bool], set[str]] = {
    (True, True): {"fitted", "reconstruction_png"},
    (True, False): {"fitted"},
    (False, True): {"reconstruction_png"},
    (False, False): set(),
}
"""What a reply leaves out: members that nobody asked for."""
TIMING = ", ".join(f"{stage};dur=%.3f" for stage in STAGES)
"""The value of the header Server-Timing, to be filled with milliseconds."""


@dataclass(slots=True)
class Reply:
    """A finished reply.

    Attributes:
        body: JSON.
        timing: the value of the header Server-Timing (W3C), in milliseconds.
        facts: what the access log says of it besides route and status.
    """

    body: bytes
    timing: str
    facts: dict[str, Any] = field(default_factory=dict)


class Scorer:
    """Scores the image of a request and keeps its reconstruction."""

    def __init__(self, engine: Engine, reconstructions: Reconstructions, metrics: Metrics, settings: Settings) -> None:
        self._engine = engine
        self._reconstructions = reconstructions
        self._metrics = metrics
        self._limit = settings.max_body_bytes
        self._fit_limit = settings.fit_max_body_bytes
        self._fit_pixels = settings.fit_max_pixels
        self._fit_waiting = settings.fit_max_waiting
        self._fits = 0
        # Large images are decoded one at a time, beside the event loop: memory stays flat, scores go on.
        self._fitter = ThreadPoolExecutor(1, thread_name_prefix="fit")
        self._body_timeout = settings.body_timeout_ms / 1000
        self._prefix = settings.root_path

    async def __call__(
        self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes], receive: Receive
    ) -> Reply:
        """Answer one request.

        Args:
            scope: of the ASGI connection.
            headers: the request's, names in lower case.
            receive: the ASGI channel of the body.

        Raises:
            Problem: one of its kinds says why there is no score.
            ClientLeft: nobody waits for the reply any more.
        """
        query = parse_query(ScoreQuery, scope["query_string"]) if scope["query_string"] else _NO_QUERY
        if query.fit == "mnist":
            image, fitted, started = await self._fit(headers, receive)
        else:
            body = await self._read(headers, receive, self._limit)
            started, fitted = time.perf_counter(), None
            image = images.decode(await image_of(_content_type(headers), body))
        decoded = time.perf_counter()
        serving = await self._engine.select(query.model)
        threshold, alpha = threshold_of(serving.manifest, serving.calibration, query.alpha)
        detection = await self._engine.score(serving, image)
        scored = time.perf_counter()
        manifest = serving.manifest
        # The random part is what nobody can guess; the time before it lets the store's index grow at its end.
        key = f"{time.time_ns() // 1_000_000:012x}{os.urandom(16).hex()}"
        is_anomaly = detection.mse > threshold
        response = ScoreResponse(
            id=key,
            model=manifest.name,
            version=manifest.version,
            mse=detection.mse,
            threshold=threshold,
            alpha=alpha,
            p_value=serving.calibration.p_value(detection.mse),
            is_anomaly=is_anomaly,
            reason=detection.reason,
            reconstruction=f"{self._prefix}/reconstruction/{key}",
            fitted=fitted,
        )
        reply = _json(response)
        if not await self._reconstructions.keep(
            owned(scope, key), Record(reply, detection.pixels, detection.error_peak)
        ):
            response = response.model_copy(update={"id": None, "reconstruction": None})
            reply = _json(response)
        if query.include == "reconstruction":
            picture = base64.b64encode(images.encode(images.grey_picture(detection.pixels[784:1568]))).decode()
            reply = _json(response.model_copy(update={"reconstruction_png": picture}))
        stages = (decoded - started, detection.queue_seconds, detection.forward_seconds, time.perf_counter() - scored)
        self._metrics.score(manifest.name, is_anomaly=is_anomaly, mse=detection.mse, stages=stages)
        timing = TIMING % tuple(1e3 * seconds for seconds in stages)
        decode, queue, forward, store = stages
        facts = {
            "model": manifest.name,
            "version": manifest.version,
            "is_anomaly": is_anomaly,
            "mse": detection.mse,
            "decode_us": int(1e6 * decode),
            "queue_us": int(1e6 * queue),
            "forward_us": int(1e6 * forward),
            "store_us": int(1e6 * store),
        }
        return Reply(reply, timing, facts)

    async def aclose(self) -> None:
        """Let go of the thread that fits images."""
        self._fitter.shutdown(wait=False, cancel_futures=True)

    async def _read(self, headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
        declared = headers.get(b"content-length")
        return await read_body(receive, declared=declared, limit=limit, timeout=self._body_timeout)

    async def _fit(self, headers: Mapping[bytes, bytes], receive: Receive) -> tuple[bytes, Fitted, float]:
        """Read a large image and fit it. Returns its pixels, what was done, and when the body was there."""
        if self._fits >= self._fit_waiting:
            self._metrics.shed.inc()
            raise Overloaded(f"{self._fit_waiting} images are being fitted already")
        self._fits += 1
        try:
            body = await self._read(headers, receive, self._fit_limit)
            started = time.perf_counter()
            png = await image_of(_content_type(headers), body)
            found = await asyncio.get_running_loop().run_in_executor(self._fitter, fit.fit, png, self._fit_pixels)
        finally:
            self._fits -= 1
        return found.pixels, Fitted(inverted=found.inverted, crop=found.crop), started


def _content_type(headers: Mapping[bytes, bytes]) -> str:
    return headers.get(b"content-type", b"").decode("latin-1")


def parse_query(kind: type[Query], text: bytes) -> Query:
    """Read a query string.

    Raises:
        MalformedRequest: it has more than `LONGEST_QUERY` bytes.
        InvalidParameter: a parameter is unknown, given twice, or has a value that means nothing.
    """
    if len(text) > LONGEST_QUERY:
        raise MalformedRequest(f"the query has more than {LONGEST_QUERY} bytes")
    query: Query = _parsed(kind, text)
    return query


@lru_cache(maxsize=1024)
def _parsed(kind: type[Query], text: bytes) -> Query:
    pairs = parse_qsl(text.decode("latin-1"), keep_blank_values=True)
    members = dict(pairs)
    if len(members) < len(pairs):
        raise InvalidParameter("a parameter is given twice")
    try:
        return kind.model_validate(members)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidParameter(f"{name[:40]}: {first['msg']}") from None


def threshold_of(manifest: Manifest, calibration: Calibration, alpha: float | None) -> tuple[float, float]:
    """Return the threshold for a false-alarm rate, and that rate; None means the version's own.

    Raises:
        UnsupportedAlpha: the calibration has too few scores for `alpha`.
    """
    if alpha is None or alpha == manifest.alpha:
        return manifest.threshold, manifest.alpha
    try:
        return calibration.threshold(alpha), alpha
    except CalibrationError as error:
        raise UnsupportedAlpha(str(error)) from None


def _json(response: ScoreResponse) -> bytes:
    absent = _ABSENT[response.fitted is None, response.reconstruction_png is None]
    return response.model_dump_json(exclude=absent).encode()
