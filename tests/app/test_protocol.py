"""The server's side of a connection: clients that take nothing."""

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
