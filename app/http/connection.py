"""One HTTP/1.1 connection on uvicorn's protocol class: coalesced writes, limits on its client, rejections."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.http.errors import answer_problem, lines_of
from app.problems import BodyTooLarge, InternalError, MalformedRequest, NotFound, Overloaded, Problem

STALLED_SECONDS = 60.0
"""Maximum time that a client may read nothing of its response, or pause in the middle of a request."""
_KEEP_ALIVE_MARGIN_SECONDS = 1.0
"""Time for which a connection stays open beyond its announced limit. A request that its client sends within the limit
may take that long to arrive."""
_HOST = re.compile(rb"[!$%&'()*+.:;=\[\]_~0-9A-Za-z-]*")
"""A value of `Host` that is one host, not a list, a URL or a user name with a host."""
_PROBES = frozenset((b"/livez", b"/readyz", b"/metrics"))
_LONGEST_LENGTH = 15
"""Maximum number of digits of a Content-Length, as in the gateway."""
_MAX_COALESCED_BYTES = 64 * 1024
"""Maximum number of bytes that wait for the end of an event-loop iteration; more bytes are sent at once."""


class CoalescingTransport:
    """A transport that sends everything written in one event-loop iteration with one system call.

    uvicorn writes the head of a response and its body separately. Each write is a system call that wakes the reader,
    which for a small response costs as much as scoring its image. All other methods are those of the transport.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self.is_closing = transport.is_closing  # called per response, and `__getattr__` is slow
        self._loop = loop
        self._pieces: list[bytes] = []
        self._size = 0
        self._stall_timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send at the end of this event-loop iteration."""
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(data)
        self._size += len(data)
        if self._size > _MAX_COALESCED_BYTES:
            self._flush()

    def close(self) -> None:
        """Send what was written, then close."""
        self._flush()
        self._transport.close()
        if self._transport.get_write_buffer_size() > 0:
            self.start_stall_timer()

    def start_stall_timer(self) -> None:
        """Abort the connection if the client does not catch up in time. `close` alone waits without a limit."""
        if self._stall_timer is None:
            self._stall_timer = self._loop.call_later(STALLED_SECONDS, self._transport.abort)

    def stop_stall_timer(self) -> None:
        """Cancel the timer: the client has caught up or disconnected."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def restart_stall_timer(self) -> None:
        """Restart the time limit of the client."""
        self.stop_stall_timer()
        self.start_stall_timer()

    def _flush(self) -> None:
        data = b"".join(self._pieces)
        self._pieces, self._size = [], 0
        if data and not self.is_closing():
            self._transport.write(data)


def check_head(version: str, headers: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Reject heads that the parser accepts, and that another server could read differently.

    A request without `Host` is accepted, contrary to RFC 9112 (3.2): health checks omit it.

    Args:
        version: of HTTP.
        headers: names in lower case.

    Returns:
        The headers by name; the last of those with the same name.

    Raises:
        MalformedRequest: the version is not acceptable, or the header Host, Transfer-Encoding or Content-Length.
        BodyTooLarge: the declared length exceeds every limit, and would wrap around in other servers.
    """
    if version not in ("1.0", "1.1"):
        raise MalformedRequest(f"the version of HTTP is {version}, not 1.1 or 1.0")
    found = dict(headers)
    if len(found) < len(headers):
        names = [name for name, _ in headers]
        for name in (b"host", b"content-length", b"transfer-encoding"):
            if names.count(name) > 1:
                raise MalformedRequest(f"a request has one header `{name.decode().title()}`")
    host, length, coding = found.get(b"host"), found.get(b"content-length"), found.get(b"transfer-encoding")
    if host is not None and not _HOST.fullmatch(host):
        raise MalformedRequest("the header `Host` contains one host")
    if length is not None and len(length) > _LONGEST_LENGTH and len(length.lstrip(b"0")) > _LONGEST_LENGTH:
        raise BodyTooLarge(f"the header Content-Length has more than {_LONGEST_LENGTH} digits")
    if coding is not None and (coding.lower() != b"chunked" or version == "1.0"):
        raise MalformedRequest("the only supported Transfer-Encoding is chunked, in HTTP/1.1")
    return found


class Connection(HttpToolsProtocol):
    """One connection, with stricter limits than uvicorn's."""

    _transport: CoalescingTransport
    _idle_check: asyncio.TimerHandle
    _idle_since = 0.0
    """Time in event-loop seconds at which the connection was made, or its last response was completed."""
    _request_incomplete = False
    """Whether a request has begun to arrive and is not complete."""
    _non_body_bytes = 0
    """Number of bytes since the last piece or the end of a body."""
    _rejection: Problem | None = None
    """The last response of this connection, sent after the earlier ones. Nothing more is read."""

    _surplus = False
    """Whether the connection exceeds the maximum number of connections; then only probes are answered."""
    _on_probe_port = False
    """Whether only probes are answered because of the port."""
    running: RequestResponseCycle | None = None
    """The request that is being handled, or was the last one. uvicorn's `cycle` is the newest one."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        # uvicorn would answer without a problem document, and to probes too.
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._keep_alive = (b"keep-alive", b"timeout=%d" % self.timeout_keep_alive)
        self.keep_alive_line = b"%b: %b\r\n" % self._keep_alive

    def check_connection(self) -> None:
        """Reject a request that is not a probe, on a connection for probes or beyond the maximum.

        Raises:
            NotFound: the port is for probes.
            Overloaded: the number of connections is at its maximum.
        """
        if self._on_probe_port and self.url not in _PROBES:
            hint = "Send the request to the port ANOMALY_PORT."
            raise NotFound("this port answers only /livez, /readyz and /metrics", hint=hint)
        if self._surplus and self.url not in _PROBES:
            raise Overloaded(f"{self._max_connections} connections are open already", cause="connections")

    @property
    def is_last_response(self) -> bool:
        """Whether the connection closes after this response because the service drains.

        After the drain, the server closes all connections without a request. If a client were sending its next one at
        that moment, it would get no response. With `Connection: close` it opens another connection in time.
        """
        return getattr(self.app, "draining", False) and not self.pipeline

    def parse_problem(self, cause: BaseException | None) -> Problem:
        """Return the problem for a parser error and what one of the parser's callbacks raised, if one did."""
        if isinstance(cause, Problem):
            return cause
        if cause is None or isinstance(cause, (httptools.HttpParserError, httptools.HttpParserUpgrade)):
            self.logger.warning("Invalid HTTP request received.")
            return MalformedRequest("invalid http request received")
        self.logger.error("request failed", exc_info=cause)
        return InternalError()

    def begin_without_upgrade(self) -> None:
        """Begin a request as if it had no `Upgrade` header, which a server may ignore (RFC 9110, 7.8).

        The parser treats all bytes after such a head as the other protocol. So a new parser reads the head without the
        header, and continues with the body.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":  # its head does not define where its body ends
            raise httptools.HttpParserError
        head = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        head += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"\r\n".join([*head, b"", b""]))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the idle check."""
        self._transport = CoalescingTransport(transport, self.loop)
        super().connection_made(self._transport)  # type: ignore[arg-type]
        self._surplus = self._max_connections is not None and len(self.connections) > self._max_connections
        self._idle_since = self.loop.time()
        self._idle_check = self.loop.call_later(self.timeout_keep_alive, self.check_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the request in progress and all timers."""
        super().connection_lost(exc)
        running = self.running
        if running is not None and running is not self.cycle and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        self._idle_check.cancel()
        self._transport.stop_stall_timer()

    def check_idle(self) -> None:
        """Close the connection if its client has been idle, or has paused within a request, for too long.

        One periodic timer per connection is cheaper than uvicorn's timer per request.
        """
        if self.transport.is_closing():
            return
        period = float(self.timeout_keep_alive)
        wait = period + _KEEP_ALIVE_MARGIN_SECONDS
        if self.cycle is None or self.cycle.response_complete:  # during a response, the client waits for the service
            if self._request_incomplete:
                wait = STALLED_SECONDS
            wait += self._idle_since - self.loop.time()
        if wait > 0:
            self._idle_check = self.loop.call_later(min(wait, period), self.check_idle)
        else:
            self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Start an ASGI task whose response announces how long the connection stays open, if it stays open."""
        self.running = cycle

        async def announcing(scope: Any, receive: Any, send: Any) -> None:
            async def announce(message: Any) -> None:
                if message["type"] == "http.response.start":
                    cycle.keep_alive = cycle.keep_alive and not self.is_last_response
                    headers = list(message.get("headers", ()))
                    if cycle.keep_alive and (b"connection", b"close") not in headers:
                        message = {**message, "headers": [*headers, self._keep_alive]}
                await send(message)

            await app(scope, receive, announce)

        super()._start_asgi_task(cycle, announcing)

    def pause_writing(self) -> None:
        """Start the timer for a client that does not read its response."""
        super().pause_writing()
        self._transport.start_stall_timer()

    def resume_writing(self) -> None:
        """Stop the timer, unless the connection is closing: then the client must read to the end."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._transport.stop_stall_timer()

    def on_response_complete(self) -> None:
        """Begin the next pipelined request, or send the rejection that ends the connection."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self._idle_since = self.loop.time()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._rejection is not None:
            self._send_rejection(self._rejection)
        if not self.pipeline:  # one response admits one further request
            self.flow.resume_reading()

    def reject(self, problem: Problem) -> None:
        """Answer an invalid request after the responses before it, and close the connection."""
        self._rejection = problem
        cycle = self.cycle
        if cycle is None:
            self._send_rejection(problem)
        elif cycle.more_body and self.pipeline:
            self.pipeline.popleft()  # the newest request has not begun
        elif cycle.more_body and cycle.response_started:
            self.transport.close()  # its response has begun
        elif cycle.more_body or cycle.response_complete:
            self._send_rejection(problem, begun=cycle.more_body)

    def record_rejection(self, problem: Problem, *, begun: bool) -> str | None:  # noqa: ARG002
        """Record a problem that is sent without the application, and return the id of the request.

        Args:
            problem: the reply.
            begun: whether the application handles the request already, and records that it ends.
        """
        return None

    def _send_rejection(self, problem: Problem, *, begun: bool = False) -> None:
        status, headers, body = answer_problem(problem, self.record_rejection(problem, begun=begun), close=True)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[status], lines_of(headers), body))
        self.transport.close()
