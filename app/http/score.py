"""`POST /score`: reads the request, hands the image to the scorer, and waits for the reply or a disconnect."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from app.http.bodies import BodyReader, Receive, decoded, unless_disconnected
from app.http.fitting import Fitter
from app.http.multipart import Form, plain_image_of, read_form
from app.http.queries import parse_query, with_fields
from app.http.schemas import ScoreQuery
from app.images.prepare import Fit, choose
from app.inference.registry import Registry
from app.inference.version import ModelVersion
from app.problems import BodyTooLarge
from app.scoring.score import Reply, Scorer
from app.scoring.verdict import DecisionRule, Fitted
from app.settings import Settings

_NO_QUERY = ScoreQuery()
_FIT_TYPES = frozenset(("image/jpeg", "image/jpg", "image/pjpeg", "image/webp", "application/octet-stream", ""))
"""Media types that are accepted besides PNG and forms if the image is prepared. Its bytes decide on the format."""


class _Received(NamedTuple):
    """A request that has been read completely.

    Attributes:
        version: scores the image.
        image: encoded PNG; raw pixels, uint8 [28, 28], if `fitted` is set.
        query: the parameters of the query and of the form.
        fitted: how the image was prepared.
        seconds: time for preparing it.
    """

    version: ModelVersion
    image: bytes
    query: ScoreQuery
    fitted: Fitted | None
    seconds: float


class ScoreHandler:
    """Handles `POST /score`.

    Args:
        registry: selects the model version; its `on_batch_done` is that of `scorer`.
        scorer: scores the image.
        settings: limits.

    Attributes:
        max_body_bytes: maximum size of a body that `begin` takes.
        fitter: fits images.
    """

    def __init__(self, registry: Registry, scorer: Scorer, settings: Settings) -> None:
        self.max_body_bytes = settings.max_body_bytes
        self._registry = registry
        self._scorer = scorer
        self._fit_max_bytes = settings.fit_max_body_bytes
        self._rules: WeakKeyDictionary[ModelVersion, DecisionRule] = WeakKeyDictionary()  # of requests without alpha
        self.fitter = Fitter(settings)
        self._bodies = BodyReader(settings.body_timeout_ms / 1000)

    def begin(
        self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes], body: bytes
    ) -> asyncio.Future[Reply] | None:
        """Start to handle a request whose body is complete.

        Args:
            scope: of the ASGI connection.
            headers: of the request, names in lower case.
            body: complete.

        Returns:
            The future reply; None if the request has to wait for more than its score and has not been handled at all.

        Raises:
            Problem: the request is rejected.
        """
        query = _query_of(scope)
        if len(body) > self.max_body_bytes or b"content-encoding" in headers:
            return None
        version = self._registry.loaded(query.model)
        if version is None or (query.fit or version.manifest.preparation.fit) != "strict":
            return None
        kind = headers.get(b"content-type")
        image = body if kind == b"image/png" else plain_image_of(_content_type(headers), body)
        if image is None:
            return None
        return self._scorer.submit(
            version,
            image,
            self._rule(version, query.alpha),
            owner=scope.get("owner"),
            include_reconstruction=query.include == "reconstruction",
            trace=scope.get("trace"),
        )

    async def __call__(
        self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes], receive: Receive
    ) -> Reply:
        """Handle one request whose body is still being received.

        Raises:
            Problem: the request is rejected.
            ClientLeft: the client has disconnected. Its image is not scored unless its micro-batch has begun.
        """
        query = _query_of(scope)
        is_form = _content_type(headers).lower().startswith("multipart/form-data")
        if await self._default_fit(query) != "strict" or (is_form and self._is_large(headers)):
            with self.fitter.place(scope):  # a form may set `fit` in a field after a large image
                received = await self._receive(scope, query, headers, receive, has_place=True)
        else:
            received = await self._receive(scope, query, headers, receive, has_place=False)
        version, image, query, fitted, seconds = received
        return await unless_disconnected(
            self._scorer.submit(
                version,
                image,
                self._rule(version, query.alpha),
                owner=scope.get("owner"),
                include_reconstruction=query.include == "reconstruction",
                fitted=fitted,
                decoded=fitted is not None,
                decode_seconds=seconds,
                trace=scope.get("trace"),
            ),
            receive,
        )

    def close(self) -> None:
        """End the thread that fits images, once it has finished its image."""
        self.fitter.close()

    def _rule(self, version: ModelVersion, alpha: float | None) -> DecisionRule:
        rule = self._rules.get(version)
        if rule is None or alpha is not None:
            rule = DecisionRule.for_alpha(version.manifest, version.calibration, alpha)
            if alpha is None:
                self._rules[version] = rule
        return rule

    def _is_large(self, headers: Mapping[bytes, bytes]) -> bool:
        declared = headers.get(b"content-length", b"")
        return not declared.isdigit() or int(declared) > self.max_body_bytes

    async def _default_fit(self, query: ScoreQuery) -> Fit:
        """Return the preparation that the query asks for or the version was trained with, before a form is read."""
        if query.fit is not None:
            return query.fit
        version = self._registry.loaded(query.model)
        if version is None and query.model is not None:
            version = await self._registry.select(query.model)
        return "strict" if version is None else version.manifest.preparation.fit

    async def _receive(
        self,
        scope: MutableMapping[str, Any],
        query: ScoreQuery,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        *,
        has_place: bool,
    ) -> _Received:
        """Read a body, and prepare its image. Only a request that has a place of the fitter may have a large body."""
        limit = self._fit_max_bytes if has_place else self.max_body_bytes
        body = await self._bodies.read(receive, declared=headers.get(b"content-length"), limit=limit)
        began = time.perf_counter()
        kind = _content_type(headers).partition(";")[0].strip().lower()
        pictures = kind in _FIT_TYPES and await self._default_fit(query) != "strict"
        encoding = headers.get(b"content-encoding")
        read = functools.partial(_form_of, _content_type(headers), encoding, body, limit=limit, pictures=pictures)
        # A body of some megabytes can take half a second, so the event loop does not read it.
        size, form = await asyncio.to_thread(read) if has_place else read()
        query = with_fields(query, form.fields)
        version = await self._registry.select(query.model)
        preparation = choose(query.fit, version.manifest)
        if preparation.fit == "strict":
            if size > self.max_body_bytes:
                raise BodyTooLarge(f"the body has {size} bytes, the limit is {self.max_body_bytes}")
            return _Received(version, form.image, query, None, 0.0)
        with contextlib.nullcontext() if has_place else self.fitter.place(scope):
            found = await self.fitter.fit(scope, form.image, preparation)
        fitted = Fitted.of(found, preparation.fit, "model" if query.fit is None else "request")
        return _Received(version, found.pixels, query, fitted, time.perf_counter() - began)


def _form_of(content_type: str, encoding: bytes | None, body: bytes, *, limit: int, pictures: bool) -> tuple[int, Form]:
    """Return the number of bytes of the decoded body, and its content."""
    body = decoded(encoding, body, limit=limit)
    return len(body), Form(body, {}) if pictures and body else read_form(content_type, body)


def _query_of(scope: MutableMapping[str, Any]) -> ScoreQuery:
    text = scope["query_string"]
    return parse_query(ScoreQuery, text) if text else _NO_QUERY


def _content_type(headers: Mapping[bytes, bytes]) -> str:
    return headers.get(b"content-type", b"").decode("latin-1")
