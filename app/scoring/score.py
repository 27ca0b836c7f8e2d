"""`POST /score` from a request's bytes to its place in a micro-batch.

Knows: the order of the steps. Does not know: the framework; `routes` documents this path and
`edge` calls it directly, so that no layer that it does not need stands before it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError

from app.http.bodies import BodyReader, Receive, image_of, plain_image_of
from app.http.schemas import Fitted, Ignored, ScoreQuery
from app.images import fit, png
from app.inference.registry import Engine
from app.inference.version import Serving
from app.models.calibration import Calibration, CalibrationError
from app.models.manifest import Manifest
from app.problems import DeadlineExceeded, InvalidParameter, MalformedRequest, Overloaded, UnsupportedAlpha
from app.scoring.verdict import Order, Reply
from app.settings import Settings
from app.telemetry.metrics import Metrics

Query = TypeVar("Query", bound=BaseModel)

LONGEST_QUERY = 1024
"""Bytes of a query string; a caller must not choose how much of it is remembered."""
_NO_QUERY = ScoreQuery()


class _Arrival(NamedTuple):
    """An image whose request has been read: a PNG, or the pixels that `fit` made of one."""

    image: bytes
    order: Order
    future: asyncio.Future[Reply]


class Scorer:
    """Takes the image of a request to its micro-batch, and comes back with the reply.

    Args:
        engine: whose `finish` is that of `Replies`.
        metrics: counts what was refused.
        settings: limits.
    """

    def __init__(self, engine: Engine, metrics: Metrics, settings: Settings) -> None:
        self._engine = engine
        self._metrics = metrics
        self._limit = settings.max_body_bytes
        self._fit_limit = settings.fit_max_body_bytes
        self._fit_pixels = settings.fit_max_pixels
        self._fit_waiting = settings.fit_max_waiting
        self._deadline = settings.deadline_ms / 1000
        self._fits = 0
        self._arrivals: dict[Serving, list[_Arrival]] = {}
        # Large images are decoded one at a time, beside the event loop: memory stays flat, scores go on.
        self._fitter = ThreadPoolExecutor(1, thread_name_prefix="fit")
        self._bodies = BodyReader(settings.body_timeout_ms / 1000)

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
        query = _query_of(scope)
        fitted: Fitted | None = None
        seconds = 0.0
        if query.fit == "mnist":
            image, fitted, seconds = await self._fit(headers, receive)
        else:
            image = await image_of(_content_type(headers), await self._read(headers, receive, self._limit))
        serving = await self._engine.select(query.model)
        return await self._arrive(serving, image, query, scope.get("owner"), fitted=fitted, seconds=seconds)

    def begin(
        self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes], body: bytes
    ) -> asyncio.Future[Reply] | None:
        """Begin to answer a request whose body is there. Arguments and errors as for a call, which answers the others.

        Returns:
            What will be the reply; None when more must be waited for than the score, and nothing was done.
        """
        query = _query_of(scope)
        if query.fit == "mnist" or len(body) > self._limit:
            return None
        image, serving = plain_image_of(_content_type(headers), body), self._engine.loaded(query.model)
        if image is None or serving is None:
            return None
        return self._arrive(serving, image, query, scope.get("owner"))

    def _arrive(
        self,
        serving: Serving,
        image: bytes,
        query: ScoreQuery,
        owner: str | None,
        *,
        fitted: Fitted | None = None,
        seconds: float = 0.0,
    ) -> asyncio.Future[Reply]:
        arrivals = self._arrivals.get(serving, [])
        # Refused before the image is decoded: a flood must cost as little as it can.
        self._engine.check_room(serving, len(arrivals))
        threshold, alpha = threshold_of(serving.manifest, serving.calibration, query.alpha)
        order = Order(threshold, alpha, owner, fitted, query.include == "reconstruction", seconds)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()
        if not arrivals:
            self._arrivals[serving] = arrivals
            loop.call_soon(self._take_in, serving)
        arrivals.append(_Arrival(image, order, future))
        return future

    def _take_in(self, serving: Serving) -> None:
        """Queue what arrived in this turn of the event loop together: larger micro-batches cost less an image."""
        for arrival in self._arrivals.pop(serving):
            if arrival.future.done():  # the caller left
                continue
            began, image = time.perf_counter(), arrival.image
            try:
                if arrival.order.fitted is None:
                    image = png.decode(image)
                arrival.order.decode_seconds += time.perf_counter() - began
                self._engine.enqueue(serving, image, arrival.order, arrival.future)
            except Exception as error:  # it is the caller's, who knows problems from failures
                arrival.future.set_exception(error)

    async def aclose(self) -> None:
        """Let go of the thread that fits images."""
        self._fitter.shutdown(wait=False, cancel_futures=True)

    def _read(self, headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> Awaitable[bytes]:
        return self._bodies.read(receive, declared=headers.get(b"content-length"), limit=limit)

    async def _fit(self, headers: Mapping[bytes, bytes], receive: Receive) -> tuple[bytes, Fitted, float]:
        """Read a large image and fit it. Returns its pixels, what was done, and the seconds that it took."""
        if self._fits >= self._fit_waiting:
            self._metrics.shed.inc()
            raise Overloaded(f"{self._fit_waiting} images are being fitted already")
        self._fits += 1
        try:
            body = await self._read(headers, receive, self._fit_limit)
            started = time.perf_counter()
            png = await image_of(_content_type(headers), body)
            async with asyncio.timeout(self._deadline):
                found = await asyncio.get_running_loop().run_in_executor(self._fitter, fit.fit, png, self._fit_pixels)
        except TimeoutError:
            raise DeadlineExceeded("the image was not fitted in time") from None
        finally:
            self._fits -= 1
        ignored = Ignored(components=found.ignored.components, ink=found.ignored.ink)
        fitted = Fitted(inverted=found.inverted, crop=found.crop, ignored=ignored)
        return found.pixels, fitted, time.perf_counter() - started


def _query_of(scope: MutableMapping[str, Any]) -> ScoreQuery:
    text = scope["query_string"]
    return parse_query(ScoreQuery, text) if text else _NO_QUERY


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
