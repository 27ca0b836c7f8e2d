"""The outermost layer: gives every request an id, the check of its API key, an access log line, metrics and a response.

`POST /score` goes from here straight to its handler; all other requests go through the framework.
"""

from __future__ import annotations

import asyncio
import binascii
import functools
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Protocol

from app.http.auth import ApiKeys, is_public
from app.http.bodies import ClientLeft, Receive, finished
from app.http.cors import Cors
from app.http.errors import NOSNIFF, Answer, answer_problem, lines_of, problem_facts, problem_of
from app.http.hosts import Hosts
from app.http.queries import LONGEST_QUERY
from app.http.request_facts import RequestFacts
from app.problems import HostNotAllowed, MalformedRequest, Problem, Unauthorized
from app.scoring.score import Reply
from app.telemetry.logs import AccessLog
from app.telemetry.metrics import Metrics
from app.telemetry.traces import Traces

_log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Headers = Mapping[bytes, bytes]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Respond = Callable[[int, bytes, bytes, bool], object]
"""Sends status, header lines, body; the last argument is whether the connection closes."""

SCORE = "/score"
CLIENT_LEFT = 499
"""Status in log and metrics of a request whose client left before the end of its response; nginx's convention."""
_PROBES = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
_SCORE_HEADERS = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
_SCORE_LINES = lines_of(
    [*_SCORE_HEADERS, NOSNIFF, (b"content-length", b"%d"), (b"server-timing", b"%b"), (b"x-request-id", b"%b")]
)
"""Filled with one formatting operation per response: six would take a microsecond longer."""


class ScoreHandler(Protocol):
    """Handles `POST /score` without the framework: `app.http.score.ScoreHandler`."""

    max_body_bytes: int

    async def __call__(self, scope: Scope, headers: Headers, receive: Receive) -> Reply:
        """Handle one request, or raise a problem."""

    def begin(self, scope: Scope, headers: Headers, body: bytes) -> asyncio.Future[Reply] | None:
        """Start to handle a request whose body is complete, or raise a problem; None leaves it to a call."""


class RequestMiddleware:
    """The outermost ASGI application.

    Args:
        app: the framework's application.
        score: handles `POST /score`.
        metrics: counts requests and problems.
        log: gets one line per request.
        keys: the API keys. None: no key is required.
        cors: the origins whose pages may read the responses. None: no page of another origin.
        traces: records a span per request. None: no traces.
        hosts: the hosts that requests may name. None: all.
    """

    def __init__(
        self,
        app: App,
        *,
        score: ScoreHandler,
        metrics: Metrics,
        log: AccessLog,
        keys: ApiKeys | None = None,
        cors: Cors | None = None,
        traces: Traces | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        self.max_body_bytes = score.max_body_bytes
        self._app, self._score, self._metrics, self._log = app, score, metrics, log
        self._keys, self._cors, self._hosts, self._traces = keys, cors, hosts, traces
        self._process, self._number = binascii.hexlify(os.urandom(6)), itertools.count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            try:
                await _lifespan(self._app, scope, receive, send)
            finally:
                self._log.flush()
            return
        request = RequestFacts(scope, dict(scope["headers"]), self._new_id, time.perf_counter(), self._traces)
        scope["request_id"] = request.id
        if request.method == "OPTIONS" and (answer := self._preflight(request)) is not None:
            route, status = "preflight", await _send(send, answer)
        elif (refusal := self._refusal(scope, request)) is not None:
            route = "unauthorized" if isinstance(refusal, Unauthorized) else "forbidden"
            status = await _send(send, self._reject(refusal, request))
        elif scope["path"] == SCORE and scope["method"] == "POST":
            route, status = SCORE, await self._score_streamed(scope, request, receive, send)
        else:
            if request.method == "HEAD":  # GET without the body (RFC 9110, 9.3.2)
                scope = {**scope, "method": "GET"}
            status = await self._framework(scope, request, receive, send)
            route = _route(scope)
        self._finish(request, route, status)

    def begin(
        self, scope: Scope, headers: Headers, body: bytes, respond: Respond, started: float
    ) -> asyncio.Future[Reply] | None:
        """Handle a `POST /score` whose body is complete, without an ASGI task and messages.

        Args:
            scope: of the ASGI connection.
            headers, body: of the request, names in lower case.
            respond: called once with the response, in a later event-loop iteration, unless the future is cancelled.
            started: when the request arrived, in `perf_counter` seconds.

        Returns:
            The future reply, to be cancelled if the client leaves. None, with nothing done: an ASGI call must follow.
        """
        request = RequestFacts(scope, headers, self._new_id, started, self._traces)
        if self._refusal(scope, request) is not None:
            return None
        try:
            future = self._score.begin(scope, headers, body)
        except Exception as error:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
        if future is not None:
            future.add_done_callback(functools.partial(self._respond, request, respond))
        return future

    def begin_shutdown(self) -> None:
        """End what would delay a shutdown. The server calls it once per connection."""

    def record_rejection(self, problem: Problem, *, begun: bool) -> str | None:
        """Count and log a problem that the server returns itself; a request that has `begun` is logged when it ends."""
        id, facts = self._new_id().decode(), problem_facts(problem)
        self._metrics.problem(problem.type, facts.get("cause"))
        if not begun:
            self._metrics.request("rejected", problem.status, None)
            self._log.write({"request_id": id, "route": "rejected", "status": problem.status, **facts})
        return None if begun else id

    def _respond(self, request: RequestFacts, respond: Respond, future: asyncio.Future[Reply]) -> None:
        if future.cancelled():
            self._finish(request, SCORE, CLIENT_LEFT)
            return
        error = future.exception()
        if error is None:
            reply, status = future.result(), 200
            request.facts.update(reply.facts)
            lines = _SCORE_LINES % (len(reply.body), reply.timing.encode(), request.id.encode())
            respond(200, lines if self._cors is None else lines + lines_of(self._extra(request)), reply.body, False)
        else:
            status, headers, body = self._reject(error, request)
            respond(status, lines_of(headers), body, (b"connection", b"close") in headers)
        self._finish(request, SCORE, status)

    async def _score_streamed(self, scope: Scope, request: RequestFacts, receive: Receive, send: Send) -> int:
        try:
            answer = _scored(await self._score(scope, request.headers, receive), request, self._common(request))
        except ClientLeft:
            return CLIENT_LEFT
        except Exception as error:
            answer = self._reject(error, request)
        return await _send(send, answer)

    async def _framework(self, scope: Scope, request: RequestFacts, receive: Receive, send: Send) -> int:
        if len(scope["query_string"]) > LONGEST_QUERY:
            problem = MalformedRequest(f"the query has more than {LONGEST_QUERY} bytes")
            return await _send(send, self._reject(problem, request))
        status = 0
        scope["facts"] = request.facts

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self._common(request)]
            elif request.method == "HEAD":
                message["body"] = b""
            await send(message)

        try:
            await finished(self._app(scope, receive, observe), scope, receive)
        except ClientLeft:
            request.facts["client_left"] = True
        except Exception as error:
            answer = self._reject(error, request)
            if status == 0:
                return await _send(send, answer)
        return CLIENT_LEFT if "client_left" in request.facts else status or CLIENT_LEFT

    def _finish(self, request: RequestFacts, route: str, status: int) -> None:
        seconds = time.perf_counter() - request.started
        facts = request.facts
        is_probe = route in _PROBES and status == 200
        self._metrics.request(route, status, seconds, None if is_probe else facts.get("trace_id"))
        if "problem" in facts or "cause" in facts:
            self._metrics.problem(facts.get("problem"), facts.get("cause"))
        if is_probe:
            return  # several per second, without information
        if self._traces is not None and request.trace is not None:
            self._traces.request(
                request.trace, method=request.method, route=route, status=status, started=request.started, facts=facts
            )
        self._log.write(
            {
                "request_id": request.id,
                "method": request.method,
                "route": route,
                "status": status,
                "seconds": int(1e6 * seconds) / 1e6,
                **facts,
            }
        )

    def _new_id(self) -> bytes:
        """Return a request id: random per process, numbered within the process. It is a name, not a secret."""
        return b"%s-%x" % (self._process, next(self._number))

    def _refusal(self, scope: Scope, request: RequestFacts) -> Problem | None:
        """Return why the request is not answered; None if its host and its API key are accepted."""
        if self._hosts is not None and not self._hosts.allows(request.method, request.headers):
            return HostNotAllowed()
        if self._keys is None or is_public(scope["path"]):
            return None
        owner = self._keys.owner(request.headers.get(b"x-api-key", b""))
        if owner is None:
            return Unauthorized()
        scope["owner"] = request.facts["key_name"] = owner
        return None

    def _reject(self, error: BaseException, request: RequestFacts) -> Answer:
        problem = problem_of(error, request.id)
        request.facts.update(problem_facts(problem))
        answer = answer_problem(problem, request.id, scope=request.scope)
        answer.headers.extend(self._extra(request))
        return answer

    def _preflight(self, request: RequestFacts) -> Answer | None:
        """Return the response to a preflight request (CORS), which browsers send without a key."""
        headers = None if self._cors is None else self._cors.preflight(request.headers)
        return None if headers is None else Answer(204, [*headers, *self._common(request)], b"")

    def _common(self, request: RequestFacts) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", request.id.encode()), NOSNIFF, *self._extra(request)]

    def _extra(self, request: RequestFacts) -> Iterable[tuple[bytes, bytes]]:
        return () if self._cors is None else self._cors.headers(request.headers.get(b"origin"))


async def _lifespan(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    async def send_without_stack(message: Message) -> None:
        # The framework's message contains a stack with paths, which the server would log.
        await send({**message, "message": ""} if "message" in message else message)

    try:
        await app(scope, receive, send_without_stack)
    except Exception:
        _log.exception("the service failed to start or to stop")
        raise


def _scored(reply: Reply, request: RequestFacts, common: Iterable[tuple[bytes, bytes]]) -> Answer:
    request.facts.update(reply.facts)
    headers = [
        *_SCORE_HEADERS,
        (b"content-length", b"%d" % len(reply.body)),
        (b"server-timing", reply.timing.encode()),
        *common,
    ]
    return Answer(200, headers, reply.body)


async def _send(send: Send, answer: Answer) -> int:
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    await send({"type": "http.response.body", "body": answer.body})
    return answer.status


def _route(scope: Scope) -> str:
    """Return the template of the route, never the path itself: the number of label values must stay small."""
    route = scope.get("route")
    return getattr(route, "path", None) or "unknown"
