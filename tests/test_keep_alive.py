"""Idle connections outlive the clients and proxies that keep them in a pool."""

from __future__ import annotations

import asyncio
import random
import re
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from app.settings import Settings
from tests.conftest import ROOT, Server

COUNT = 500
DELAY = 0.1
"""Seconds between the decision to reuse a connection and the arrival of the request, as on a slow network."""


class Pooled:
    """A connection of a client that reuses it within the limit that the server has announced."""

    def __init__(self, port: int, request: bytes) -> None:
        self._port = port
        self._request = request
        self._limit = 0.0
        self._used_at = 0.0
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self) -> str:
        """Send one request. Return how it went: `new`, `reused`, or `lost`."""
        loop, result = asyncio.get_running_loop(), "reused"
        if self._streams is None or loop.time() - self._used_at >= self._limit or self._streams[0].at_eof():
            self.close()
            self._streams, result = await asyncio.open_connection("127.0.0.1", self._port), "new"
        reader, writer = self._streams
        await asyncio.sleep(DELAY)
        try:
            writer.write(self._request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1]))  # type: ignore[index]
        except (ConnectionError, asyncio.IncompleteReadError):
            return "lost"
        self._limit = float(re.search(r"keep-alive: timeout=(\d+)", head)[1])  # type: ignore[index]
        self._used_at = loop.time()
        return result

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@pytest.fixture
def short(make_server: Callable[..., Server]) -> Server:
    """Return a server that keeps idle connections for one second."""
    return make_server(ANOMALY_KEEP_ALIVE_SECONDS="1").start()


async def test_a_pooled_client_loses_no_request(short: Server, zero: bytes) -> None:
    """Of 500 connections that are reused at about the announced limit, none loses a request."""
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(zero)}\r\n\r\n"
    places = asyncio.Semaphore(100)

    async def twice(pause: float) -> str:
        async with places:
            connection = Pooled(short.port, head.encode() + zero)
            assert await connection.send() == "new"
            await asyncio.sleep(pause)
            try:
                return await connection.send()
            finally:
                connection.close()

    found = Counter(await asyncio.gather(*[twice(random.uniform(0.9, 1.05)) for _ in range(COUNT)]))
    assert found["lost"] == 0
    assert found["reused"] > COUNT / 10
    assert sum(found.values()) == COUNT


def test_every_path_announces_the_limit(short: Server, zero: bytes) -> None:
    """Responses that keep the connection have the header `Keep-Alive`; those that close it do not."""
    png = {"content-type": "image/png"}
    with short.client() as client:
        for reply in (
            client.post("/score", content=zero, headers=png),
            client.post("/score", content=b"x", headers=png),
            client.post("/score", content=iter([zero]), headers=png),
            client.post("/score/batch", files={"files": zero}),
            client.get("/livez"),
            client.get("/nothing"),
            client.head("/models"),
        ):
            assert reply.headers["keep-alive"] == "timeout=1"
            assert "connection" not in reply.headers
        for reply in (
            client.post("/score", content=zero, headers={**png, "connection": "close"}),
            client.get("/livez", headers={"connection": "close"}),
            client.post("/score", content=bytes(70_000), headers=png),
        ):
            assert "keep-alive" not in reply.headers
            assert reply.headers["connection"] == "close"


def test_an_idle_connection_is_closed_after_the_limit(short: Server) -> None:
    """The server closes the connection itself, soon after the limit."""
    with socket.create_connection(("127.0.0.1", short.port), timeout=10) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)
        assert connection.recv(65536) == b""


def seconds(pattern: str, file: Path) -> int:
    """Return the number of seconds that a line of a configuration contains."""
    found = re.search(pattern, file.read_text())
    assert found is not None
    return int(found[1])


def test_the_service_outlives_the_proxies() -> None:
    """The default is longer than the gateway's time-out, and than the 60 s of nginx and of common load balancers."""
    gateway = ROOT / "deploy" / "gateway" / "haproxy.cfg"
    default = Settings().keep_alive_seconds
    assert default == 75
    assert default > seconds(r"timeout http-keep-alive (\d+)s", gateway)
    assert default > 2 * seconds(r"pool-purge-delay (\d+)s", gateway)
    assert default > 60
    assert "http-after-response del-header Keep-Alive" in gateway.read_text()
