"""The server's side of a connection: replies in one piece, clients that take nothing."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from app import protocol


async def large(scope: Any, receive: Any, send: Any) -> None:
    """Answer every request with a reply that no buffer holds."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(400):
        await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("reads", [False, True])
async def test_only_a_client_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    """A connection whose client reads nothing ends after the time for it; one that reads, however slowly, does not."""
    monkeypatch.setattr(protocol, "STUCK_SECONDS", 1.5)
    config, state = uvicorn.Config(large, lifespan="off", log_config=None), ServerState()
    config.load()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: protocol.Protocol(config, state, {}), "127.0.0.1", 0)
    size = 0
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, server.sockets[0].getsockname())
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(60):
            while not state.tasks:
                await asyncio.sleep(0.01)
            while reads and (content := await loop.sock_recv(client, 65536)):
                size += len(content)
                await asyncio.sleep(0.006)
            while state.connections or state.tasks:
                await asyncio.sleep(0.01)
    server.close()
    await server.wait_closed()
    assert (size > 400 * 65536) == reads


class Wire:
    """A transport that remembers what was written, and when it was closed."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        """Remember."""
        self.writes.append(data)
        assert not self.closed

    def close(self) -> None:
        """Remember."""
        self.closed = True

    def is_closing(self) -> bool:
        """Say whether it was closed."""
        return self.closed


async def test_what_is_written_in_one_turn_is_sent_at_once():
    """Head and body of a reply are one write, those of the next turn another."""
    wire = Wire()
    joined = protocol._Joined(wire, asyncio.get_running_loop())
    joined.write(b"head ")
    joined.write(b"body")
    assert wire.writes == []
    await asyncio.sleep(0)
    joined.write(b"more")
    await asyncio.sleep(0)
    assert wire.writes == [b"head body", b"more"]


async def test_closing_sends_first():
    """Nothing that was written is lost to `close`."""
    wire = Wire()
    joined = protocol._Joined(wire, asyncio.get_running_loop())
    joined.write(b"last words")
    joined.close()
    assert (wire.writes, wire.closed) == ([b"last words"], True)
    await asyncio.sleep(0)
    assert wire.writes == [b"last words"]


async def test_what_a_client_that_left_was_to_get_is_dropped():
    """A transport that was closed in between is not written to: uvloop raises there."""
    wire = Wire()
    joined = protocol._Joined(wire, asyncio.get_running_loop())
    joined.write(b"too late")
    wire.close()
    await asyncio.sleep(0)
    assert wire.writes == []


async def test_much_is_not_held_back():
    """A long reply does not wait in memory for the end of the turn."""
    wire = Wire()
    joined = protocol._Joined(wire, asyncio.get_running_loop())
    for _ in range(5):
        joined.write(bytes(30_000))
    assert sum(map(len, wire.writes)) >= 90_000
    await asyncio.sleep(0)
    assert sum(map(len, wire.writes)) == 150_000
