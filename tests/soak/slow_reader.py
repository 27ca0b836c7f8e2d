"""A client that reads its reply so slowly that the service must wait."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import h11

_PIECE = 4096
_PAUSE_SECONDS = 0.02
_SEGMENT = 536
"""Bytes per TCP segment. The kernel sizes the send buffer of the service by it: with the segments of the loopback
interface, a reply of 1 MB fits into the buffer."""


async def post(port: int, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    """Send a request and return status and body of its reply.

    The body is what was read of the reply, if the service has closed the connection before its end.

    Raises:
        ConnectionError: the service has closed the connection before its reply began.
    """
    parser, loop = h11.Connection(h11.CLIENT), asyncio.get_running_loop()
    lines = {"host": "127.0.0.1", "content-length": str(len(body)), **headers}
    request = h11.Request(method="POST", target=path, headers=list(lines.items()))
    content = b"".join(parser.send(event) or b"" for event in (request, h11.Data(body), h11.EndOfMessage()))
    status, reply = 0, bytearray()
    with socket.socket() as connection:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PIECE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
        await loop.sock_connect(connection, ("127.0.0.1", port))
        with contextlib.suppress(ConnectionError):  # a rejection can be read although the body was not
            await loop.sock_sendall(connection, content)
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                await asyncio.sleep(_PAUSE_SECONDS)
                parser.receive_data(await loop.sock_recv(connection, _PIECE))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                reply += event.data
            elif isinstance(event, h11.EndOfMessage):
                return status, bytes(reply)
            elif status == 0:
                raise ConnectionError("no reply has begun")
            else:
                return status, bytes(reply)
