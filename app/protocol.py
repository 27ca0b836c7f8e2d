"""HTTP as uvicorn speaks it, with two differences: replies leave in one piece, and what is no HTTP gets a problem.

Knows: uvicorn's protocol class, transports. Does not know: requests; there is none here that could have an id.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.problems import MalformedRequest, render

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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        super().connection_made(_Joined(transport, self.loop))  # type: ignore[arg-type]

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
