"""The outermost layer: everything that each request gets, whatever answers it.

Knows: ASGI, request ids, the access log, the last resort for errors. Does not know: what a score is.

`POST /score` goes from here straight to its function. Everything else goes through the framework.
"""

from __future__ import annotations

import binascii
import itertools
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Protocol

from app.bodies import ClientLeft, Receive
from app.keys import ApiKeys, is_public
from app.logs import AccessLog
from app.metrics import Metrics
from app.problems import InternalError, MalformedRequest, Problem, Unauthorized, render
from app.replies import Reply
from app.scoring import LONGEST_QUERY

_log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_PROBES = frozenset({"/livez", "/readyz", "/metrics"})
_JSON = (b"content-type", b"application/json")
_PRIVATE = (b"cache-control", b"no-store")


class Answer(Protocol):
    """A function that answers one route without the framework."""

    async def __call__(
        self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes], receive: Receive
    ) -> Reply:
        """Answer one request, or raise a problem."""


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
        self, app: App, *, score: Answer, metrics: Metrics, log: AccessLog, keys: ApiKeys | None = None
    ) -> None:
        self._app = app
        self._score = score
        self._metrics = metrics
        self._log = log
        self._keys = keys
        self._process = binascii.hexlify(os.urandom(6))
        self._number = itertools.count()

    def _fresh_id(self) -> bytes:
        """Return a request id: of this process by chance, and in it by number. It is a name, not a secret."""
        return b"%s-%x" % (self._process, next(self._number))

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            self._log.flush()  # the lifespan is over
            return
        started = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else self._fresh_id()
        scope["request_id"] = request_id.decode()
        facts: dict[str, Any] = {}
        if self._keys is not None and not self._known(scope, headers, facts):
            route, status = "unauthorized", await _refuse(Unauthorized(), scope["request_id"], send, facts)
        elif scope["path"] == "/score" and scope["method"] == "POST":
            route, status = "/score", await self._fast(scope, headers, receive, send, facts)
        else:
            status = await self._framework(scope, receive, send, facts)
            route = _route(scope)
        seconds = time.perf_counter() - started
        self._metrics.request(route, status, seconds)
        if route in _PROBES and status == 200:
            return  # several a second, and nobody learns anything from them
        self._log.write(
            {
                "time": time.time(),
                "request_id": scope["request_id"],
                "method": scope["method"],
                "route": route,
                "status": status,
                "seconds": round(seconds, 6),
                **facts,
            }
        )

    def _known(self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes], facts: dict[str, Any]) -> bool:
        assert self._keys is not None
        if is_public(scope["path"]):
            return True
        owner = self._keys.owner(headers.get(b"x-api-key", b""))
        if owner is not None:
            scope["owner"] = facts["key_name"] = owner
        return owner is not None

    async def _fast(
        self,
        scope: MutableMapping[str, Any],
        headers: Mapping[bytes, bytes],
        receive: Receive,
        send: Send,
        facts: dict[str, Any],
    ) -> int:
        try:
            reply = await self._score(scope, headers, receive)
        except ClientLeft:
            return 499
        except Problem as problem:
            return await _refuse(problem, scope["request_id"], send, facts)
        except Exception:
            _log.exception("request failed", extra={"request_id": scope["request_id"]})
            return await _refuse(InternalError(), scope["request_id"], send, facts)
        facts.update(reply.facts)
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    _JSON,
                    _PRIVATE,
                    (b"content-length", b"%d" % len(reply.body)),
                    (b"x-request-id", scope["request_id"].encode()),
                    (b"server-timing", reply.timing.encode()),
                ],
            }
        )
        await send({"type": "http.response.body", "body": reply.body})
        return 200

    async def _framework(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send, facts: dict[str, Any]
    ) -> int:
        if len(scope["query_string"]) > LONGEST_QUERY:
            problem = MalformedRequest(f"the query has more than {LONGEST_QUERY} bytes")
            return await _refuse(problem, scope["request_id"], send, facts)
        status = 0
        scope["facts"] = facts

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", scope["request_id"].encode())]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except ClientLeft:
            return status or 499
        except Exception:
            _log.exception("request failed", extra={"request_id": scope["request_id"]})
            if status == 0:
                return await _refuse(InternalError(), scope["request_id"], send, facts)
        return status or 499


async def _refuse(problem: Problem, request_id: str, send: Send, facts: dict[str, Any]) -> int:
    """Send a problem, and close the connection after a body that was not read: none of it is the next request."""
    if isinstance(problem, InternalError) and problem.__cause__ is not None:
        _log.error("request failed: %s", type(problem.__cause__).__name__, extra={"request_id": request_id})
    facts["problem"] = problem.type
    body = render(problem, request_id)
    headers = [(name.encode(), value.encode()) for name, value in problem.headers().items()]
    headers += [(b"content-length", b"%d" % len(body)), (b"x-request-id", request_id.encode())]
    if problem.status in (401, 408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    return problem.status


def _route(scope: MutableMapping[str, Any]) -> str:
    """Return the template of the route that answered, never the path itself: labels must stay few."""
    route = scope.get("route")
    return getattr(route, "path", None) or "unknown"
