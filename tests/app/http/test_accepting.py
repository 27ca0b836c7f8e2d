"""Probes get replies in time, for any number of clients that connect."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from app.http import accepting
from tests.conftest import Server
from tests.waiting import until, wait_until

uvloop = pytest.importorskip("uvloop")


class Silent(asyncio.Protocol):
    """A connection that counts itself."""

    made = 0

    def connection_made(self, _: asyncio.BaseTransport) -> None:
        """Count."""
        Silent.made += 1


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Return a bound socket."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        Silent.made = 0
        yield bound


def test_waiting_connections_are_accepted_together(listener: socket.socket) -> None:
    """Of 100 waiting connections, one event-loop iteration accepts 64."""

    async def count() -> int:
        server = await asyncio.get_running_loop().create_server(Silent, sock=listener, backlog=256)
        assert isinstance(server, accepting.Acceptor)
        clients = [socket.create_connection(listener.getsockname()) for _ in range(100)]
        server._accept()  # as the loop does in one iteration
        accepted = len(server._tasks)
        await until(lambda: Silent.made == 100)
        server.close()
        await server.wait_closed()
        for client in clients:
            client.close()
        return accepted

    with asyncio.Runner(loop_factory=accepting.make_loop) as runner:
        assert runner.run(count()) == 64


def test_an_address_in_use_is_an_error(listener: socket.socket) -> None:
    """uvloop's own server would listen nowhere and report nothing."""
    with socket.socket() as other:
        for each in (listener, other):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(other.getsockname())
            taken.listen()

            async def listen() -> None:
                await asyncio.get_running_loop().create_server(Silent, sock=other)

            with asyncio.Runner(loop_factory=accepting.make_loop) as runner, pytest.raises(OSError) as caught:
                runner.run(listen())
            assert caught.value.errno == errno.EADDRINUSE


async def test_without_descriptors_the_process_pauses(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The fault is logged once per pause, and connections are accepted afterwards."""
    monkeypatch.setattr(accepting, "_PAUSE_SECONDS", 0.05)
    failures = [OSError(errno.EMFILE, "too many open files")] * 2

    class Exhausted(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return super().accept()

    failing = Exhausted(fileno=listener.detach())
    server = accepting.Acceptor(asyncio.get_running_loop(), Silent, failing, backlog=10)
    with socket.create_connection(failing.getsockname()):
        await until(lambda: Silent.made)
    assert caplog.text.count("cannot accept connections: too many open files") == 2
    server.close()


@pytest.mark.process
def test_surplus_connections_get_503_and_probes_an_answer(make_server: Callable[..., Server], zero: bytes) -> None:
    """With the maximum of open connections, a score on a further one gets 503, and a probe gets 200."""
    server = make_server(ANOMALY_MAX_CONNECTIONS="20").start()
    png = {"content-type": "image/png"}
    clients = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(20)]
    for client in clients:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
    for path in ("/score", "/score/batch"):
        reply = server.post(path, content=zero, headers=png)
        assert (reply.status_code, reply.json()["type"]) == (503, "/problems/overloaded")
        assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")
        assert "20 connections" in reply.json()["detail"]
    for path in ("/livez", "/readyz", "/metrics"):
        assert server.get(path).status_code == 200
    assert 'anomaly_problems_total{type="overloaded"} 2.0' in server.get("/metrics").text
    for client in clients:
        client.close()
    wait_until(lambda: server.post("/score", content=zero, headers=png).status_code == 200)


@pytest.mark.process
def test_probes_are_answered_beside_a_flood(make_server: Callable[..., Server], zero: bytes) -> None:
    """While 600 clients connect and score without a pause, each probe on a new connection gets a quick reply."""
    server = make_server(ANOMALY_MAX_CONNECTIONS="200", ANOMALY_LOG_REQUESTS="false").start()
    request = (
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(zero) + zero
    )

    class Flooder(asyncio.Protocol):
        replies = refused = 0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.WriteTransport)
            self.transport = transport
            transport.write(request)

        def data_received(self, data: bytes) -> None:
            Flooder.replies += data.startswith(b"HTTP/1.1 200 ")
            Flooder.refused += data.startswith(b"HTTP/1.1 503 ")
            self.transport.write(request)

    async def probes() -> list[float]:
        loop = asyncio.get_running_loop()
        flood = [loop.create_task(loop.create_connection(Flooder, "127.0.0.1", server.port)) for _ in range(600)]
        taken = []
        async with httpx.AsyncClient() as client:
            while len(taken) < 10 or Flooder.replies < 1000:
                began = time.monotonic()
                reply = await client.get(f"{server.url}/readyz", headers={"connection": "close"}, timeout=30)
                assert reply.status_code == 200
                taken.append(time.monotonic() - began)
        await asyncio.gather(*flood)
        for task in flood:
            task.result()[0].close()
        return taken

    taken = sorted(asyncio.run(probes()))
    assert Flooder.refused > 0
    # The client shares two cores with the service and with other tests, so the slowest probe may wait for the client.
    assert taken[len(taken) // 2] < 1, taken
