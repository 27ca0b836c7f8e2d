"""`POST /score` from a request's bytes to a reply's bytes.

Knows: the order of the steps and how long each took. Does not know: the framework; `routes` documents this path and
`edge` calls it directly, so that no layer that it does not need stands before it.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError

from app import images
from app.bodies import Receive, image_of, read_body
from app.calibration import CalibrationError
from app.engine import Engine, Serving
from app.keys import owned
from app.metrics import STAGES, Metrics
from app.problems import InvalidParameter, UnsupportedAlpha
from app.reconstructions import Reconstructions
from app.record import Record
from app.schemas import ScoreQuery, ScoreResponse
from app.settings import Settings

Query = TypeVar("Query", bound=BaseModel)

_NO_QUERY = ScoreQuery()
_TIMING = ", ".join(f"{stage};dur=%.3f" for stage in STAGES)


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
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        declared = headers.get(b"content-length")
        body = await read_body(receive, declared=declared, limit=self._limit, timeout=self._body_timeout)
        started = time.perf_counter()
        image = images.decode(await image_of(content_type, body))
        decoded = time.perf_counter()
        serving = await self._engine.select(query.model)
        threshold, alpha = rule(serving, query.alpha)
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
        timing = _TIMING % tuple(1e3 * seconds for seconds in stages)
        facts = {"model": manifest.name, "version": manifest.version, "is_anomaly": is_anomaly, "mse": detection.mse}
        return Reply(reply, timing, facts)


@lru_cache(maxsize=1024)
def parse_query(kind: type[Query], text: bytes) -> Query:
    """Read a query string.

    Raises:
        InvalidParameter: a parameter is unknown, given twice, or has a value that means nothing.
    """
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


def rule(serving: Serving, alpha: float | None) -> tuple[float, float]:
    """Return the threshold and the false-alarm rate that decide.

    Raises:
        UnsupportedAlpha: the calibration is too small for this rate.
    """
    manifest = serving.manifest
    if alpha is None or alpha == manifest.alpha:
        return manifest.threshold, manifest.alpha
    try:
        return serving.calibration.threshold(alpha), alpha
    except CalibrationError as error:
        raise UnsupportedAlpha(str(error)) from None


def _json(response: ScoreResponse) -> bytes:
    excluded = {"reconstruction_png"} if response.reconstruction_png is None else None
    return response.model_dump_json(exclude=excluded).encode()
