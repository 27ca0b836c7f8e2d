"""Faults of clients and of the machine, injected into the service as a process."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import http.client
import io
import json
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from app.process import EXIT_ABANDONED
from tests import pngs
from tests.conftest import ROOT, Server
from tests.waiting import wait_until

PNG = {"content-type": "image/png"}
PIXELS = np.random.default_rng(1).integers(0, 256, (8, 28, 28), dtype=np.uint8)
IMAGES = [pngs.plain(image) for image in PIXELS]


def request(content: bytes, path: str = "/score", kind: str = "image/png", accept: str = "*/*") -> tuple[bytes, bytes]:
    """Return the head and the body of a request."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nAccept: {accept}\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode(), content


def metric(server: Server, pattern: str) -> float:
    """Return the sum of the metrics whose name and labels match `pattern`."""
    text = server.get("/metrics", timeout=30).text
    return sum(float(value) for value in re.findall(rf"(?m)^{pattern} (\S+)$", text))


def scores_of(client: httpx.Client) -> list[float]:
    """Return the score of each of `IMAGES`."""
    replies = [client.post("/score", content=image, headers=PNG) for image in IMAGES]
    assert {reply.status_code for reply in replies} == {200}
    return [reply.json()["mse"] for reply in replies]


def abort(connection: socket.socket, *, reset: bool) -> None:
    """Close a connection, with RST or with FIN."""
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def abort_many(server: Server, count: int, expected: list[float], seed: int) -> None:
    """Abort `count` requests at random places. Each 25 of them, a client with a new connection scores an image.

    Half of the requests are aborted at once. The service has read the other half before they are aborted, because it
    accepts connections in their order.
    """
    chance = random.Random(seed)
    whole = request(IMAGES[0])
    for number in range(count // 25):
        held = []
        for _ in range(25):
            head, body = whole
            place = chance.choice(
                (chance.randrange(len(head)), len(head) + chance.randrange(len(body)), len(head + body))
            )
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            connection.sendall((head + body)[:place])
            if chance.random() < 0.5:
                held.append(connection)
            else:
                abort(connection, reset=chance.random() < 0.8)
        reply = server.post("/score", content=IMAGES[number % 8], headers=PNG, timeout=30)
        assert reply.status_code == 200, reply.text
        assert reply.json()["mse"] == pytest.approx(expected[number % 8], rel=1e-6)
        for connection in held:
            abort(connection, reset=chance.random() < 0.8)


@contextlib.contextmanager
def scoring(server: Server, expected: list[float], clients: int = 2) -> Iterator[list[float]]:
    """Yield a growing list of scores of clients that score on kept connections, and compare each with `expected`."""
    done, found = threading.Event(), list[float]()

    def score() -> None:
        with server.client(timeout=30) as client:
            while not done.is_set():
                scores = scores_of(client)
                assert scores == pytest.approx(expected, rel=1e-6)
                found.extend(scores)

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(score) for _ in range(clients)]
        try:
            yield found
        finally:
            done.set()
        for future in futures:
            future.result(60)


def test_ten_thousand_aborted_requests_leave_nothing(make_server: Callable[..., Server]) -> None:
    """Requests aborted in the head, in the body and after it change no score, and leave no memory, socket or image."""
    server = make_server(ANOMALY_DEFAULT_MODEL="zero-article", ANOMALY_LOG_REQUESTS="false").start()
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    with server.client(timeout=30) as client:
        expected = scores_of(client)

    def abort_in_threads(count: int, seed: int) -> None:
        run = functools.partial(abort_many, server, count // 4, expected)
        with concurrent.futures.ThreadPoolExecutor(4) as pool, scoring(server, expected) as found:
            list(pool.map(run, range(seed, seed + 4)))
        assert found

    descriptors = process.num_fds()
    abort_in_threads(1_000, seed=0)
    level = process.memory_info().rss
    abort_in_threads(10_000, seed=10)
    assert metric(server, r'anomaly_http_requests_total\{.*status="499"\}') > 1_000
    assert metric(server, r'anomaly_http_requests_total\{.*status="5..".*\}') == 0
    wait_until(lambda: metric(server, "anomaly_queue_images") == 0)
    wait_until(lambda: process.num_fds() <= descriptors, describe=process.num_fds)
    assert process.memory_info().rss - level < 25e6
    assert "Traceback" not in server.log()


def test_without_descriptors_known_clients_are_scored(make_server: Callable[..., Server]) -> None:
    """While held connections occupy all descriptors, a kept connection gets scores; afterwards new ones do as well."""
    server = make_server(ANOMALY_DEFAULT_MODEL="zero-article", ANOMALY_WATCH_SECONDS="0.2")
    server.start(prefix=["prlimit", "--nofile=100:100"])
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    with server.client(timeout=30) as client, contextlib.ExitStack() as held:
        expected = scores_of(client)
        for _ in range(150):
            connection = held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
            connection.sendall(b"POST /score HTTP/1.1\r\n")
        for fault in ("cannot accept connections: Too many open files", "the model store could not be read"):
            wait_until(lambda fault=fault: fault in server.log(), describe=server.log)
            assert process.num_fds() == 100
            assert scores_of(client) == pytest.approx(expected, rel=1e-6)
            assert client.get("/readyz").status_code == 200
        with pytest.raises(httpx.TimeoutException):
            server.get("/livez", timeout=1)
    server.wait_ready(seconds=20)
    with server.client(timeout=30) as client:
        assert scores_of(client) == pytest.approx(expected, rel=1e-6)
        wait_until(lambda: client.post("/score", content=IMAGES[0], headers=PNG).json()["id"] is not None)


@pytest.mark.long
def test_a_batch_that_is_sent_before_its_reply_is_read_is_complete(make_server: Callable[..., Server]) -> None:
    """A client that sends 160,000 images and reads nothing before all are scored gets each line, in their order."""
    count = 160_000
    server = make_server(ANOMALY_DEFAULT_MODEL="zero-article").start()
    with server.client(timeout=30) as client:
        expected = np.array(scores_of(client))
    order = np.random.default_rng(2).integers(0, len(PIXELS), count)
    file = io.BytesIO()
    np.save(file, PIXELS[order])
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", server.port))
        for part in request(file.getvalue(), "/score/batch", "application/x-npy", "application/x-ndjson"):
            connection.sendall(part)
        wait_until(lambda: metric(server, r"anomaly_scores_total\{.*\}") == count + len(PIXELS), 60)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        assert reply.status == 200
        items = [json.loads(line) for line in reply.read().splitlines()]
    assert [item["index"] for item in items] == list(range(count))
    np.testing.assert_allclose([item["mse"] for item in items], expected[order], rtol=1e-6)


def test_a_paused_service_answers_each_request_when_it_resumes(make_server: Callable[..., Server]) -> None:
    """After SIGSTOP and SIGCONT, requests in progress and those that came during the pause get their scores."""
    server = make_server(ANOMALY_DEFAULT_MODEL="zero-article", ANOMALY_DEADLINE_MS="60000").start()
    assert server.process is not None
    with server.client(timeout=30) as client:
        expected = scores_of(client)
    stat = Path(f"/proc/{server.process.pid}/stat")
    with scoring(server, expected) as found, contextlib.ExitStack() as opened:
        for _ in range(3):
            before = len(found)
            wait_until(lambda before=before: len(found) > before)
            server.process.send_signal(signal.SIGSTOP)
            wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
            connections = []
            for image in IMAGES * 8:
                created = socket.create_connection(("127.0.0.1", server.port), timeout=30)
                connections.append(opened.enter_context(created))
                created.sendall(b"".join(request(image)))
            server.process.send_signal(signal.SIGCONT)
            replies = [http.client.HTTPResponse(connection) for connection in connections]
            for reply in replies:
                reply.begin()
            assert {reply.status for reply in replies} == {200}
            scores = [json.loads(reply.read())["mse"] for reply in replies]
            assert scores == pytest.approx(expected * 8, rel=1e-6)
    assert server.get("/readyz").status_code == 200
    assert server.stop() == 0


HANGING = """
import sys
import threading
from pathlib import Path

import uvicorn

from app.__main__ import main
from app.http import supervisor
from app.models.repository import Repository

folder = Path(sys.argv[1])


def hanging(name, work):
    def hang(*given):
        if (folder / name).exists():
            print(name, "hangs", file=sys.stderr)
        while (folder / name).exists():  # as a read of a network file system whose server does not respond
            threading.Event().wait(0.1)
        return work(*given)

    return hang


if (folder / "a long start").exists():
    supervisor.START_SECONDS = 60
for name in ("names", "lacks", "versions", "current", "_read"):
    setattr(Repository, name, hanging("the model store", getattr(Repository, name)))
uvicorn.Config.load = hanging("the import", uvicorn.Config.load)
if __name__ == "__main__":
    sys.exit(main([]))
"""


def start_hanging(make_server: Callable[..., Server], folder: Path, *, wait: bool = True, **environment: str) -> Server:
    """Start a service that hangs while a file `the model store` or `the import` exists in the folder."""
    script = folder / "hanging.py"
    script.write_text(HANGING)
    # The check for models, which reads the store before the server starts, is skipped.
    server = make_server(PYTHONPATH=str(ROOT), ANOMALY_ALLOW_EMPTY="true", **environment)
    return server.start(wait=wait, prefix=[sys.executable, str(script), str(folder)])


def test_a_hanging_model_store_does_not_prevent_the_exit(
    make_server: Callable[..., Server], tmp_path: Path, zero: bytes
) -> None:
    """Requests that read a model store that hangs get 504, all others are served, and the process ends in time."""
    limits = {"ANOMALY_DEADLINE_MS": "3000", "ANOMALY_STORE_TIMEOUT_MS": "2900"}
    server = start_hanging(make_server, tmp_path, ANOMALY_WATCH_SECONDS="0.1", **limits)
    (tmp_path / "the model store").touch()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        replies = pool.map(lambda _: server.post("/score?model=zero@77", content=zero, headers=PNG), range(16))
        assert [reply.status_code for reply in replies] == [504] * 16
    with server.client(timeout=30) as client:
        reply = client.post("/score", content=zero, headers=PNG)
        assert reply.status_code == 200
        for path in (f"{reply.json()['reconstruction']}?view=panel", "/openapi.json", "/readyz"):
            assert client.get(path).status_code == 200, path
    began = time.monotonic()
    assert server.stop() == EXIT_ABANDONED
    assert time.monotonic() - began < 20
    assert "a read of the model store" in server.log()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_start_that_hangs_does_not_prevent_the_exit(
    make_server: Callable[..., Server], tmp_path: Path, workers: int
) -> None:
    """While each worker waits for a model store that hangs, SIGTERM ends the service in time."""
    (tmp_path / "the model store").touch()
    server = start_hanging(make_server, tmp_path, wait=False, ANOMALY_WORKERS=str(workers))
    wait_until(lambda: server.log().count("the model store hangs") == workers, 60, describe=server.log)
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 20
    assert server.log().count("stopped before the start was complete") == workers


def test_a_start_that_completes_after_sigterm_is_shut_down(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """If the model store responds again after SIGTERM, the shutdown abandons nothing."""
    (tmp_path / "a long start").touch()  # on a busy machine, loading the models may take longer than usual
    (tmp_path / "the model store").touch()
    server = start_hanging(make_server, tmp_path, wait=False)
    wait_until(lambda: "the model store hangs" in server.log(), 60, describe=server.log)
    assert server.process is not None
    server.process.terminate()
    (tmp_path / "the model store").unlink()
    assert server.process.wait(30) == 0, server.log()
    assert '"event": "stopped"' in server.log()


@pytest.mark.parametrize("workers", [1, 2])
def test_no_start_begins_after_sigterm(make_server: Callable[..., Server], tmp_path: Path, workers: int) -> None:
    """SIGTERM while each worker imports the application ends the service without loading the models."""
    (tmp_path / "the import").touch()
    server = start_hanging(make_server, tmp_path, wait=False, ANOMALY_WORKERS=str(workers))
    wait_until(lambda: server.log().count("the import hangs") == workers, 60, describe=server.log)
    assert server.process is not None
    for each in [server.process, *psutil.Process(server.process.pid).children()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    (tmp_path / "the import").unlink()
    assert server.process.wait(30) == 0, server.log()
    assert "version serves" not in server.log()
