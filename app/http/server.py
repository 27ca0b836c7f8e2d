"""What the server itself does of HTTP, and where it does more than uvicorn.

Replies go in one piece, what is no HTTP gets a problem, who takes nothing is let go of, and a `POST /score` that came
whole is answered without what an ASGI server does for requests of any kind.

Knows: uvicorn's protocol class, transports. Does not know: what a score is.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.http.middleware import SCORE, Answer, Edge
from app.problems import MalformedRequest, Problem, render

_SCORE = SCORE.encode()

STUCK_SECONDS = 60.0
"""How long a client may take nothing of its reply, or leave unfinished what it has begun to send."""
_LONGEST_HEAD = 64 * 1024
"""Bytes of a request that are none of its body: its head, and what else stands before, between or behind the pieces of
its body. Twice as many may be read before they are counted."""
_LONGEST_URL = 2048
"""Bytes; a longer one may be more than uvicorn can read, which says so while it reads."""
_MOST_PIPELINED = 256
"""Requests of one connection that may wait for the reply to the one before them."""
_MOST_JOINED = 64 * 1024
"""Bytes that wait for the end of a turn of the event loop at most; a long reply is sent as it comes."""


class _Joined:
    """A transport that sends what is written in one turn of the event loop at once.

    uvicorn writes the head of a reply and its body one after the other, and each write is a system call that wakes the
    reader: for a small reply, as much work as scoring its image. What is not about writing is the transport's own.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pieces: list[bytes] = []
        self._size = 0
        self._stuck: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send soon."""
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(data)
        self._size += len(data)
        if self._size > _MOST_JOINED:
            self._flush()

    def close(self) -> None:
        """Send what was written, then close."""
        self._flush()
        self._transport.close()
        if self._transport.get_write_buffer_size() > 0:
            self.watch()

    def watch(self) -> None:
        """Abort unless the client catches up in time: closing waits until all is taken, and so for ever."""
        if self._stuck is None:
            self._stuck = self._loop.call_later(STUCK_SECONDS, self._transport.abort)

    def unwatch(self) -> None:
        """Note that the client has caught up, or has left."""
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _flush(self) -> None:
        data = b"".join(self._pieces)
        self._pieces, self._size = [], 0
        if data and not self._transport.is_closing():  # the client may have left meanwhile
            self._transport.write(data)


class _Exchange:
    """One request that came whole, and its reply in one piece. Takes the place of what uvicorn calls a cycle."""

    more_body = False  # of the request, like the others a name that uvicorn gives
    __slots__ = ("_protocol", "disconnected", "keep_alive", "response_complete")

    def __init__(self, protocol: Protocol, *, keep_alive: bool) -> None:
        self._protocol: Protocol | None = protocol
        self.keep_alive = keep_alive
        self.disconnected = self.response_complete = False

    @property
    def message_event(self) -> _Exchange:
        return self

    def set(self) -> None:
        """Nobody waits for a message."""

    def respond(self, answer: Answer) -> None:
        """Send the reply; a client that has left gets none."""
        status, headers, body = answer
        # The protocol knows its last exchange for as long as it lives: together they would wait for the collector.
        protocol, self._protocol = self._protocol, None
        self.response_complete = True
        if protocol is None or self.disconnected or protocol.transport.is_closing():
            return
        pieces = [STATUS_LINE[status], *[b"%b: %b\r\n" % header for header in headers]]
        closes = (b"connection", b"close") in headers
        if not (self.keep_alive or closes):
            pieces.append(b"connection: close\r\n")
        protocol.transport.write(b"".join([*pieces, b"\r\n", body]))
        if closes or not self.keep_alive:
            protocol.transport.close()
        protocol.on_response_complete()


class Protocol(HttpToolsProtocol):
    """HTTP/1.1 as uvicorn speaks it; bytes that are none are answered with a problem.

    A `POST /score` that is whole when it is first looked at, as most are, is given to the edge as it is. A task and a
    channel of messages would cost it a quarter of the event loop's work. Every other request is uvicorn's.
    """

    _joined: _Joined
    _looks: asyncio.TimerHandle
    _idle_since = 0.0
    """When the connection was made, or its last request was answered."""
    _begun = False
    """Whether a request has begun to come, and is not there to its end."""
    _apart = 0
    """Bytes since the last piece or end of a body."""
    _refusal: Problem | None = None
    """What is answered once all before it is, and the last thing: nothing is read any more."""
    _held: list[bytes] | None = None
    """The body so far of a request that may prove to be whole."""

    def data_received(self, data: bytes) -> None:
        """Take what has come. A request of which more is to come is uvicorn's."""
        if self._refusal is not None:
            return
        try:
            if len(data) <= _LONGEST_HEAD:
                self._parse(data)
            else:
                for start in range(0, len(data), _LONGEST_HEAD):
                    self._parse(memoryview(data)[start : start + _LONGEST_HEAD])
        except httptools.HttpParserError as error:
            self.logger.warning("Invalid HTTP request received.")
            problem = error.__context__  # raised by one of the methods that the parser calls, if one did
            if not isinstance(problem, MalformedRequest):
                problem = MalformedRequest("invalid http request received")
            self._refuse(problem)
        except MalformedRequest as refusal:
            self._refuse(refusal)
        if self._held is not None:
            self._give_up()

    def _parse(self, data: bytes | memoryview) -> None:
        self._apart += len(data)
        while True:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                self._begin_plainly()
                data = memoryview(data)[upgrade.args[0] :]
        if self._apart > _LONGEST_HEAD:
            raise MalformedRequest(f"the head of the request has more than {_LONGEST_HEAD} bytes")

    def _begin_plainly(self) -> None:
        """Begin a request that asks for another protocol as if it had not (RFC 9110, 7.8).

        The parser takes all behind its head for that protocol. So a new one reads the head without the question, and
        goes on with the body.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":  # nothing in its head says where what comes behind it ends
            raise httptools.HttpParserError
        head = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        head += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"\r\n".join([*head, b"", b""]))

    def on_message_begin(self) -> None:
        """Note that a request begins."""
        super().on_message_begin()
        self._begun = True

    def on_headers_complete(self) -> None:
        """Begin a request, or hold it until all is seen of what has come."""
        # RFC 9112 (3.2) refuses a request without the header too, but simple clients leave it out, and it is not used.
        if [name for name, _ in self.headers].count(b"host") > 1:
            raise MalformedRequest("a request has one header `Host`")
        if len(self.pipeline) >= _MOST_PIPELINED:
            raise MalformedRequest(f"more than {_MOST_PIPELINED} requests wait on this connection for their replies")
        if self._may_be_whole():
            self._held = []
        elif self.parser.should_upgrade():
            return  # `_begin_plainly` begins it
        else:
            if self.parser.get_http_version() == "1.0":
                self.expect_100_continue = False  # not of this version (RFC 9110, 10.1.1)
            super().on_headers_complete()
        self.headers = []  # what comes behind a chunked body is none of the request's (RFC 9110, 6.5.1)

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._apart = 0
        if self._held is not None:
            self._held.append(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Begin a request that was held, now that it is known to be whole."""
        self._apart, self._begun = 0, False
        if self._held is None:
            if not self.parser.should_upgrade():
                super().on_message_complete()
                self.cycle.more_body = False  # uvicorn says so only while the reply is still to come
        elif self._begin(self._held):
            self._held = None
        else:
            self._give_up()
            super().on_message_complete()

    def _may_be_whole(self) -> bool:
        return (
            (self.url == _SCORE or (self.url.startswith(_SCORE + b"?") and b"#" not in self.url))
            and len(self.url) <= _LONGEST_URL
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and not self.expect_100_continue
            and not self.parser.should_upgrade()
            # Its reply waits for nothing else: neither for the reply before it, nor for a client that is behind.
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
        )

    def _begin(self, held: list[bytes]) -> bool:
        self.scope["method"], self.scope["path"] = "POST", SCORE
        self.scope["query_string"] = self.url[len(_SCORE) + 1 :]
        before, exchange = self.cycle, _Exchange(self, keep_alive=self.parser.should_keep_alive())
        self.cycle = exchange  # type: ignore[assignment]
        edge: Edge = cast(Any, self.app)
        begun = edge.begin(cast(Any, self.scope), b"".join(held), exchange.respond)
        if not begun:
            self.cycle = before
        return begun

    def _give_up(self) -> None:
        """Give what was held to uvicorn."""
        held, self._held = self._held or [], None
        super().on_headers_complete()
        for piece in held:
            super().on_body(piece)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        self._joined = _Joined(transport, self.loop)
        super().connection_made(self._joined)  # type: ignore[arg-type]
        self._idle_since = self.loop.time()
        self._looks = self.loop.call_later(self.timeout_keep_alive, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        super().connection_lost(exc)
        self._looks.cancel()
        self._joined.unwatch()

    def _look(self) -> None:
        """Close the connection if its client has been silent, or in the middle of something, for too long.

        One timer that looks again is cheaper than one for each request, as uvicorn has.
        """
        if self.transport.is_closing():
            return
        wait = often = float(self.timeout_keep_alive)
        if self.cycle is None or self.cycle.response_complete:  # else it is the service that is being waited for
            if self._begun:
                wait = STUCK_SECONDS
            wait += self._idle_since - self.loop.time()
        if wait > 0:
            self._looks = self.loop.call_later(min(wait, often), self._look)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """Note that the client is behind."""
        super().pause_writing()
        self._joined.watch()

    def resume_writing(self) -> None:
        """Note that the client has caught up; with a connection that is being closed it must do so to the end."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._joined.unwatch()

    def on_response_complete(self) -> None:
        """Go on with the next request, or with the refusal of what came instead of one; else wait."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self._idle_since = self.loop.time()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal is not None:
            self._send_refusal(self._refusal)
        if not self.pipeline:  # else each reply would let more requests in than one
            self.flow.resume_reading()

    def _refuse(self, problem: Problem) -> None:
        """Answer what came instead of a request, or of the rest of one, in its turn, and close the connection."""
        self._refusal, self._held = problem, None
        cycle = self.cycle
        if cycle is None:
            self._send_refusal(problem)
        elif cycle.more_body and self.pipeline:
            self.pipeline.popleft()  # never begun; the replies before it are still to come
        elif cycle.more_body and cycle.response_started:
            self.transport.close()  # it has had its reply, or the beginning of it
        elif cycle.more_body or cycle.response_complete:
            self._send_refusal(problem)

    def _send_refusal(self, problem: Problem) -> None:
        body = render(problem)
        head = [STATUS_LINE[problem.status] + b"connection: close", b"content-length: %d" % len(body)]
        head += [f"{name}: {value}".encode() for name, value in problem.headers().items()]
        self.transport.write(b"\r\n".join([*head, b"", body]))
        self.transport.close()
