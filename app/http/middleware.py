"""The outermost layer: everything that each request gets, whatever answers it.

Knows: ASGI, request ids, the access log, the last resort for errors. Does not know: what a score is.

`POST /score` goes from here straight to its function. Everything else goes through the framework.
"""

from __future__ import annotations

import asyncio
import binascii
import functools
import itertools
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple, Protocol

from app.http.auth import ApiKeys, is_public
from app.http.bodies import ClientLeft, Receive
from app.http.queries import LONGEST_QUERY
from app.problems import InternalError, MalformedRequest, Problem, Unauthorized, render
from app.scoring.verdict import Reply
from app.telemetry.logs import AccessLog
from app.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

SCORE = "/score"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_PROBES = frozenset({"/livez", "/readyz", "/metrics"})
_JSON = (b"content-type", b"application/json")
_PRIVATE = (b"cache-control", b"no-store")


class Answer(NamedTuple):
    """A reply to be sent in one piece.

    Attributes:
        status, body: of the reply.
        headers: names in lower case.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


Respond = Callable[[Answer], object]


class Score(Protocol):
    """Answers `POST /score` without the framework."""

    async def __call__(
        self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes], receive: Receive
    ) -> Reply:
        """Answer one request, or raise a problem."""

    def begin(
        self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes], body: bytes
    ) -> asyncio.Future[Reply] | None:
        """Begin to answer a request whose body is there, or raise a problem; None leaves it to a call."""


class _Request:
    """What is known of a request besides what it asks."""

    __slots__ = ("facts", "headers", "id", "method", "started")

    def __init__(self, scope: MutableMapping[str, Any], fresh_id: Callable[[], bytes]) -> None:
        self.started = time.perf_counter()
        self.method = scope["method"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.id = (given if _REQUEST_ID.fullmatch(given) else fresh_id()).decode()
        self.facts: dict[str, Any] = {}


class Edge:
    """Gives each request an id, a line in the log, a place in the metrics, and an answer even when all else fails.

    Args:
        app: the framework's application.
        score: answers `POST /score`.
        metrics: counts requests.
        log: gets one line a request.
        keys: who may ask; None lets everybody.
    """

    def __init__(
        self, app: App, *, score: Score, metrics: Metrics, log: AccessLog, keys: ApiKeys | None = None
    ) -> None:
        self._app = app
        self._score = score
        self._metrics = metrics
        self._log = log
        self._keys = keys
        self._process = binascii.hexlify(os.urandom(6))
        self._number = itertools.count()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] != "http":
            await self._lifespan(scope, receive, send)
            return
        request = _Request(scope, self._fresh_id)
        scope["request_id"] = request.id
        if not self._known(scope, request):
            route, status = "unauthorized", await _send(send, _refusal(Unauthorized(), request))
        elif scope["path"] == SCORE and scope["method"] == "POST":
            route, status = SCORE, await self._fast(scope, request, receive, send)
        else:
            if request.method == "HEAD":  # the same without the body (RFC 9110, 9.3.2)
                scope = {**scope, "method": "GET"}
            status = await self._framework(scope, request, receive, send)
            route = _route(scope)
        self._answered(request, route, status)

    async def _lifespan(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        async def discreet(message: Message) -> None:
            # The framework puts a whole stack into it, and the server would log it with all its paths.
            await send({**message, "message": ""} if "message" in message else message)

        try:
            await self._app(scope, receive, discreet)
        except Exception:
            _log.exception("the service could not start, or not stop as it should")
            raise
        finally:
            self._log.flush()

    def begin(self, scope: MutableMapping[str, Any], body: bytes, respond: Respond) -> bool:
        """Answer a `POST /score` that came whole as a call would, without a task and messages of its own.

        Args:
            scope: of the ASGI connection.
            body: all of it.
            respond: is called once with the answer, in a later turn of the event loop.

        Returns:
            Whether it will be answered; if not, nothing has been done, and a call answers.
        """
        request = _Request(scope, self._fresh_id)
        if not self._known(scope, request):
            return False
        try:
            future = self._score.begin(scope, request.headers, body)
        except Exception as error:  # a problem, or a failure
            # Not before what came with it has been looked at: that must find a request that is still being answered.
            asyncio.get_running_loop().call_soon(self._respond, request, respond, _refusal(error, request))
            return True
        if future is not None:
            future.add_done_callback(functools.partial(self._scored, request, respond))
        return future is not None

    def _scored(self, request: _Request, respond: Respond, future: asyncio.Future[Reply]) -> None:
        error = future.exception()
        answer = _answer(future.result(), request) if error is None else _refusal(error, request)
        self._respond(request, respond, answer)

    def _respond(self, request: _Request, respond: Respond, answer: Answer) -> None:
        respond(answer)
        self._answered(request, SCORE, answer.status)

    def _answered(self, request: _Request, route: str, status: int) -> None:
        seconds = time.perf_counter() - request.started
        self._metrics.request(route, status, seconds)
        if route in _PROBES and status == 200:
            return  # several a second, and nobody learns anything from them
        self._log.write(
            {
                "time": time.time(),
                "request_id": request.id,
                "method": request.method,
                "route": route,
                "status": status,
                "seconds": round(seconds, 6),
                **request.facts,
            }
        )

    def _fresh_id(self) -> bytes:
        """Return a request id: of this process by chance, and in it by number. It is a name, not a secret."""
        return b"%s-%x" % (self._process, next(self._number))

    def _known(self, scope: MutableMapping[str, Any], request: _Request) -> bool:
        if self._keys is None or is_public(scope["path"]):
            return True
        owner = self._keys.owner(request.headers.get(b"x-api-key", b""))
        if owner is not None:
            scope["owner"] = request.facts["key_name"] = owner
        return owner is not None

    async def _fast(self, scope: MutableMapping[str, Any], request: _Request, receive: Receive, send: Send) -> int:
        try:
            answer = _answer(await self._score(scope, request.headers, receive), request)
        except ClientLeft:
            return 499
        except Exception as error:  # a problem, or a failure
            answer = _refusal(error, request)
        return await _send(send, answer)

    async def _framework(self, scope: MutableMapping[str, Any], request: _Request, receive: Receive, send: Send) -> int:
        if len(scope["query_string"]) > LONGEST_QUERY:
            problem = MalformedRequest(f"the query has more than {LONGEST_QUERY} bytes")
            return await _send(send, _refusal(problem, request))
        status = 0
        scope["facts"] = request.facts

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request.id.encode())]
            elif request.method == "HEAD":
                message["body"] = b""
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except ClientLeft:
            return status or 499
        except Exception as error:
            refusal = _refusal(error, request)
            if status == 0:
                return await _send(send, refusal)
        return status or 499


def _answer(reply: Reply, request: _Request) -> Answer:
    request.facts.update(reply.facts)
    headers = [
        _JSON,
        _PRIVATE,
        (b"content-length", b"%d" % len(reply.body)),
        (b"x-request-id", request.id.encode()),
        (b"server-timing", reply.timing.encode()),
    ]
    return Answer(200, headers, reply.body)


def _refusal(error: BaseException, request: _Request) -> Answer:
    """Turn a problem or a failure into an answer, and close the connection after a body that may not have been read."""
    extra = {"request_id": request.id}
    if not isinstance(error, Problem):
        _log.error("request failed", exc_info=error, extra=extra)
        error = InternalError()
    elif isinstance(error, InternalError) and error.__cause__ is not None:
        _log.error("request failed: %s", type(error.__cause__).__name__, extra=extra)
    request.facts["problem"] = error.type
    body = render(error, request.id)
    headers = [(name.encode(), value.encode()) for name, value in error.headers().items()]
    headers += [(b"content-length", b"%d" % len(body)), (b"x-request-id", request.id.encode())]
    if error.status in (401, 408, 413):
        headers.append((b"connection", b"close"))
    return Answer(error.status, headers, body)


async def _send(send: Send, answer: Answer) -> int:
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    await send({"type": "http.response.body", "body": answer.body})
    return answer.status


def _route(scope: MutableMapping[str, Any]) -> str:
    """Return the template of the route that answered, never the path itself: labels must stay few."""
    route = scope.get("route")
    return getattr(route, "path", None) or "unknown"
