"""What the server itself does of HTTP: replies in one piece, a problem for what is none, an end to who takes nothing.

Knows: uvicorn's protocol class, transports. Does not know: requests; there need not be one here.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.problems import MalformedRequest, render

STUCK_SECONDS = 60.0
"""How long a client may take nothing of a reply that is larger than what the connection buffers."""
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

    def _flush(self) -> None:
        if self._pieces:
            data = b"".join(self._pieces)
            self._pieces, self._size = [], 0
            self._transport.write(data)


class Protocol(HttpToolsProtocol):
    """HTTP/1.1 as uvicorn speaks it; bytes that are none are answered with a problem."""

    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        super().connection_made(_Joined(transport, self.loop))  # type: ignore[arg-type]

    def pause_writing(self) -> None:
        """Note that the client is behind: closing waits until all is taken, and so for ever, if nobody aborts."""
        super().pause_writing()
        self._stuck = self.loop.call_later(STUCK_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Note that the client has caught up."""
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a request that asks for another protocol is answered as if it had not (RFC 9110, 7.8)."""

    def send_400_response(self, msg: str) -> None:
        """Answer and close the connection."""
        problem = MalformedRequest(msg.rstrip(".").lower())
        body = render(problem)
        head = [b"HTTP/1.1 400 Bad Request", b"connection: close", b"content-length: %d" % len(body)]
        head += [f"{name}: {value}".encode() for name, value in problem.headers().items()]
        self.transport.write(b"\r\n".join([*head, b"", body]))
        self.transport.close()
