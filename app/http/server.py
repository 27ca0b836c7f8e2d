"""The server's protocol: a fast path for `POST /score`, and uvicorn's path for all other requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from app.http.connection import Connection, check_head
from app.http.middleware import SCORE, RequestMiddleware
from app.problems import MalformedRequest, Problem

_SCORE = SCORE.encode()

_PENDING_SECONDS = 1.0
"""Maximum time that a body is held for the fast path. Then the general path takes the request and limits its time."""
_MAX_NON_BODY_BYTES = 64 * 1024
"""Maximum number of bytes of a request besides its body: head, chunk sizes, trailers. They are counted per read, so up
to twice as many may be parsed."""
_MAX_PIPELINED = 256
"""Maximum number of requests of one connection that wait for the response to an earlier one."""
_MAX_URL_BYTES = 2048
"""Longer URLs may exceed uvicorn's own limit, which it reports while it parses."""


class FastExchange:
    """A request on the fast path and its response. It takes the place of uvicorn's request-response cycle."""

    more_body = False  # uvicorn reads these attributes of a cycle
    __slots__ = ("_protocol", "disconnected", "future", "keep_alive", "response_complete")

    def __init__(self, protocol: ServerProtocol, *, keep_alive: bool) -> None:
        self._protocol: ServerProtocol | None = protocol
        self.keep_alive = keep_alive
        self.future: asyncio.Future[Any] | None = None
        self.disconnected = self.response_complete = False

    @property
    def message_event(self) -> FastExchange:
        """The event that uvicorn sets when the client has disconnected."""
        return self

    def set(self) -> None:
        """Cancel the request, because uvicorn reports that the client has disconnected."""
        if self.disconnected and self.future is not None:
            self.future.cancel()

    def respond(self, status: int, lines: bytes, body: bytes, closes: bool) -> None:
        """Send the response unless the client has disconnected."""
        # The protocol refers to its last exchange: break the reference cycle, so that refcounting frees both.
        protocol, self._protocol, self.future = self._protocol, None, None
        self.response_complete = True
        if protocol is None or self.disconnected or protocol.transport.is_closing():
            return
        keep_alive = self.keep_alive and not protocol.is_last_response
        if not closes:
            lines += protocol.keep_alive_line if keep_alive else b"connection: close\r\n"
        protocol.transport.write(b"".join((STATUS_LINE[status], lines, b"\r\n", body)))
        if closes or not keep_alive:
            protocol.transport.close()
        protocol.on_response_complete()


class ServerProtocol(Connection):
    """One connection.

    A `POST /score` with a Content-Length within the limit is held until its body is complete and then handed to the
    middleware in one call. The task and the message channel of an ASGI request would cost it a quarter of the event
    loop's work. All other requests take uvicorn's path, and all requests do if `app` is not the middleware itself, for
    example because other ASGI middleware wraps it.
    """

    _pending_body: list[bytes] | None = None
    """The part of the body that has arrived, of a request that is held for the fast path."""
    _pending_since = 0.0
    _pending_headers: Mapping[bytes, bytes] = MappingProxyType({})
    _pending_timer: asyncio.TimerHandle | None = None

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        app: Any = self.app
        self._middleware: RequestMiddleware | None = app if isinstance(app, RequestMiddleware) else None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the idle check, and note the port."""
        super().connection_made(transport)
        port: int | None = getattr(self.app, "probe_port", None)
        self._on_probe_port = port is not None and self.server is not None and self.server[1] == port

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        if self._rejection is not None:
            return
        try:
            if len(data) <= _MAX_NON_BODY_BYTES:
                self._parse(data)
            else:
                for start in range(0, len(data), _MAX_NON_BODY_BYTES):
                    self._parse(memoryview(data)[start : start + _MAX_NON_BODY_BYTES])
        except httptools.HttpParserError as error:
            self.reject(self.parse_problem(error.__context__))
        except Problem as problem:
            self.reject(problem)
        if self._pending_body is not None and self._pending_timer is None:
            self._pending_timer = self.loop.call_later(_PENDING_SECONDS, self._hand_over)

    def _parse(self, data: bytes | memoryview) -> None:
        self._non_body_bytes += len(data)
        while True:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                self.begin_without_upgrade()
                data = memoryview(data)[upgrade.args[0] :]
        if self._non_body_bytes > _MAX_NON_BODY_BYTES:
            raise MalformedRequest(f"the head of the request has more than {_MAX_NON_BODY_BYTES} bytes")

    def on_message_begin(self) -> None:
        """Note that a request has begun to arrive."""
        super().on_message_begin()
        self._request_incomplete, self._idle_since = True, self.loop.time()

    def on_headers_complete(self) -> None:
        """Begin a request, or hold it until its body is complete."""
        version = self.parser.get_http_version()
        headers = check_head(version, self.headers)
        self.check_connection()
        if not self.url.startswith(b"/"):
            self.url = _with_path(self.url)
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise MalformedRequest(f"more than {_MAX_PIPELINED} requests of this connection wait for their responses")
        if version == "1.1" and self._takes_fast_path(headers):
            self._pending_body, self._pending_since, self._pending_headers = [], time.perf_counter(), headers
        elif self.parser.should_upgrade():
            return  # `begin_without_upgrade` begins it
        else:
            if version == "1.0":
                self.expect_100_continue = False  # not part of HTTP/1.0 (RFC 9110, 10.1.1)
            super().on_headers_complete()
        self.headers = []  # trailers after a chunked body are not headers of the request (RFC 9110, 6.5.1)

    def on_body(self, body: bytes) -> None:
        """Pass a piece of a body on, or hold it."""
        self._non_body_bytes = 0
        if self.flow.write_paused:
            self._transport.restart_stall_timer()  # a client may send its body before it reads the reply
        if self._pending_body is not None:
            self._pending_body.append(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Begin a held request, now that its body is complete."""
        self._non_body_bytes, self._request_incomplete = 0, False
        if self._pending_body is None:
            if not self.parser.should_upgrade():
                super().on_message_complete()
                self.cycle.more_body = False  # uvicorn sets it only while the response is not complete
        elif not self._begin_fast(self._pending_body):
            self._hand_over()
            super().on_message_complete()

    def _takes_fast_path(self, headers: dict[bytes, bytes]) -> bool:
        return (
            self._middleware is not None
            and (self.url == _SCORE or (self.url.startswith(_SCORE + b"?") and b"#" not in self.url))
            and len(self.url) <= _MAX_URL_BYTES
            and self.parser.get_method() == b"POST"
            and not self.expect_100_continue
            and not self.parser.should_upgrade()
            # The response waits neither for an earlier response nor for a client that reads slowly.
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
            and b"transfer-encoding" not in headers
            and 0 < int(headers.get(b"content-length", b"0")) <= self._middleware.max_body_bytes
        )

    def _begin_fast(self, body: list[bytes]) -> bool:
        """Give a complete request to the middleware. Return False if the general path must take it."""
        assert self._middleware is not None
        self.scope["method"], self.scope["path"] = "POST", SCORE
        self.scope["query_string"] = self.url[len(_SCORE) + 1 :]
        exchange = FastExchange(self, keep_alive=self.parser.should_keep_alive())
        try:
            exchange.future = self._middleware.begin(
                cast(Any, self.scope), self._pending_headers, b"".join(body), exchange.respond, self._pending_since
            )
        except Exception:
            self.logger.exception("the fast path failed; the general path takes the request")
        if exchange.future is None:
            return False
        self._end_pending()
        self.cycle = self.running = exchange  # type: ignore[assignment]
        return True

    def _hand_over(self) -> None:
        """Give a held request to uvicorn's path."""
        body = self._end_pending()
        super().on_headers_complete()
        for piece in body:
            super().on_body(piece)

    def _end_pending(self) -> list[bytes]:
        body, self._pending_body = self._pending_body or [], None
        if self._pending_timer is not None:
            self._pending_timer.cancel()
            self._pending_timer = None
        return body

    def shutdown(self) -> None:
        """Finish the request in progress, then close the connection."""
        if self._middleware is not None:
            self._middleware.begin_shutdown()
        if self._pending_body is not None:
            self._hand_over()  # uvicorn would close a connection whose request is incomplete
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the request in progress."""
        if self._pending_body is not None:
            self._hand_over()  # the middleware counts and logs a disconnect
        super().connection_lost(exc)

    def reject(self, problem: Problem) -> None:
        """Answer an invalid request after the responses before it, and close the connection."""
        self._end_pending()
        super().reject(problem)

    def record_rejection(self, problem: Problem, *, begun: bool) -> str | None:
        """Count and log a problem that the server sends without calling the application."""
        return None if self._middleware is None else self._middleware.record_rejection(problem, begun=begun)


def _with_path(target: bytes) -> bytes:
    """Return a target with a path: that of the complete URL `http://host` is `/` (RFC 9110, 4.2.3)."""
    url = httptools.parse_url(target)
    if url.path is not None:
        return target
    return b"/" if url.query is None else b"/?" + url.query
