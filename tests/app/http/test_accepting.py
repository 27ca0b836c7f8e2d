"""Probes get replies in time, for any number of clients that connect."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from app.http import accepting
from tests.conftest import Server, free_port
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
    wait_until(lambda: reply.headers["x-request-id"] in server.log())
    metrics = server.get("/metrics").text
    assert 'anomaly_problems_total{type="overloaded"} 2.0' in metrics
    assert 'anomaly_degraded_total{cause="connections"} 2.0' in metrics
    assert 'anomaly_http_requests_total{route="rejected",status="503"} 2.0' in metrics
    assert (
        server.log().count('"route":"rejected","status":503,"problem":"/problems/overloaded","cause":"connections"')
        == 2
    )
    for client in clients:
        client.close()
    wait_until(lambda: server.post("/score", content=zero, headers=png).status_code == 200)


def flooder(zero: bytes) -> type[Any]:
    """Return a protocol that scores without a pause, and counts the replies and the refusals."""
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

    return Flooder


@pytest.mark.process
def test_probes_are_answered_beside_a_flood(make_server: Callable[..., Server], zero: bytes) -> None:
    """While 600 clients connect and score without a pause, each probe on a new connection gets a quick reply."""
    server = make_server(ANOMALY_MAX_CONNECTIONS="200", ANOMALY_LOG_REQUESTS="false").start()
    flood_of = flooder(zero)

    async def probes() -> list[float]:
        loop = asyncio.get_running_loop()
        flood = [loop.create_task(loop.create_connection(flood_of, "127.0.0.1", server.port)) for _ in range(600)]
        taken = []
        async with httpx.AsyncClient() as client:
            while len(taken) < 10 or flood_of.replies < 1000:
                began = time.monotonic()
                reply = await client.get(f"{server.url}/readyz", headers={"connection": "close"}, timeout=30)
                assert reply.status_code == 200
                taken.append(time.monotonic() - began)
        await asyncio.gather(*flood)
        for task in flood:
            task.result()[0].close()
        return taken

    taken = sorted(asyncio.run(probes()))
    assert flood_of.refused > 0
    # The client shares two cores with the service and with other tests, so the slowest probe may wait for the client.
    assert taken[len(taken) // 2] < 1, taken


@pytest.mark.process
def test_each_probe_on_its_port_is_answered_within_a_second(make_server: Callable[..., Server], zero: bytes) -> None:
    """While 600 clients connect and score without a pause, the slowest of 50 probes is answered within a second."""
    flood_of = flooder(zero)
    ended = threading.Event()

    async def flood(port: int) -> None:
        loop = asyncio.get_running_loop()
        made = await asyncio.gather(*(loop.create_connection(flood_of, "127.0.0.1", port) for _ in range(600)))
        await until(ended.is_set, 120)
        for transport, _ in made:
            transport.close()

    def probe(port: int) -> float:
        began = time.monotonic()
        with connect(port, "GET /readyz") as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        return time.monotonic() - began

    port = free_port()
    server = make_server(
        ANOMALY_MAX_CONNECTIONS="200", ANOMALY_LOG_REQUESTS="false", ANOMALY_PROBE_PORT=str(port)
    ).start()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        flooding = pool.submit(asyncio.run, flood(server.port))
        try:
            taken = [probe(port)]
            while len(taken) < 50 or flood_of.replies < 1000:
                taken.append(probe(port))
        finally:
            ended.set()
        flooding.result(30)
    assert flood_of.refused > 0
    assert sorted(taken)[9 * len(taken) // 10] < 1, sorted(taken)  # a busy machine delays single ones


@contextlib.contextmanager
def probed(make_server: Callable[..., Server]) -> Iterator[tuple[Server, httpx.Client]]:
    """Yield a server with a port for probes, and a client of that port without kept connections."""
    port = free_port()
    server = make_server(
        ANOMALY_PROBE_PORT=str(port),
    )
    server.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"connection": "close"}, timeout=60) as client:
        yield server, client


def connect(port: int | None, request: str) -> socket.socket:
    """Return a connection on which a request was sent."""
    created = socket.create_connection(("127.0.0.1", port or 0), timeout=60)
    created.sendall(f"{request} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return created


@pytest.mark.process
def test_the_probe_port_answers_only_probes(make_server: Callable[..., Server], zero: bytes) -> None:
    """Other paths get a 404 that says where they are, and both ports answer probes."""
    png = {"content-type": "image/png"}
    with probed(make_server) as (server, client):
        for path in ("/livez", "/readyz", "/metrics"):
            assert client.get(path).status_code == server.get(path).status_code == 200
        for reply in (client.post("/score", content=zero, headers=png), client.get("/models")):
            assert (reply.status_code, reply.json()["type"]) == (404, "/problems/not-found")
            assert "ANOMALY_PORT" in reply.json()["hint"]
        assert server.post("/score", content=zero, headers=png).status_code == 200
        assert server.stop() == 0


@pytest.mark.process
def test_a_probe_does_not_wait_behind_clients_on_its_port(make_server: Callable[..., Server]) -> None:
    """A probe that comes last is answered after a part of the waiting clients, and on their port after all of them."""
    waiting = 900
    answered_before = {}
    with probed(make_server) as (server, client):
        assert server.process is not None
        for name, port in (("clients", server.port), ("probes", client.base_url.port)):
            server.process.send_signal(signal.SIGSTOP)
            clients = [connect(server.port, "DELETE /readyz") for _ in range(waiting)]
            probe = connect(port, "DELETE /livez")  # the log contains only probes that fail
            server.process.send_signal(signal.SIGCONT)
            for each in (*clients, probe):
                assert each.recv(4096)
                each.close()
            wait_until(lambda: server.log().count("DELETE") == waiting + 1)
            before, _, _ = server.log().partition("/livez")
            answered_before[name] = before.count("/readyz")
            server.log_path.write_text("")
    assert answered_before["probes"] < waiting * 0.75, answered_before
    assert answered_before["clients"] > waiting * 0.9, answered_before
