"""The service as a process: start, failed start, crash, stop."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from app.process import EXIT_ABANDONED, EXIT_WORKER_ABANDONED
from app.stores import BACKENDS
from benchmarks.open_loop import drive
from tests import model_stores, pngs
from tests.conftest import ROOT, Server
from tests.waiting import wait_until

PNG = {"content-type": "image/png"}


def load(server: Server, png: bytes, ids: list[str], done: threading.Event) -> None:
    """Score until `done` is set or the server has ended, and add each returned id to `ids`."""
    with server.client(timeout=10) as client:
        while not done.is_set():
            try:
                response = client.post("/score", content=png, headers=PNG)
            except httpx.TransportError:
                if server.process is not None and server.process.poll() is not None:
                    break
                continue
            # If the store is too slow on a busy machine, the id is null, and nothing is stored.
            if response.status_code == 200 and response.json()["id"] is not None:
                ids.append(response.json()["id"])


@contextlib.contextmanager
def under_load(server: Server, png: bytes, *, answered: int, clients: int = 6) -> Iterator[list[str]]:
    """Yield the growing list of returned ids when it has `answered` ids. The load continues until the block ends."""
    done = threading.Event()
    ids: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(load, server, png, ids, done) for _ in range(clients)]
        try:
            wait_until(lambda: len(ids) >= answered, 60, describe=server.log)
            yield ids
        finally:
            done.set()
        for future in futures:
            future.result(30)


def found(client: httpx.Client, key: str) -> bool:
    """Return whether an id is known, once the store can say so: just started and busy, it may be too slow at first."""
    statuses: list[int] = []

    def known() -> bool:
        response = client.get(f"/reconstruction/{key}")
        statuses.append(response.status_code)
        assert response.status_code in (200, 404) or response.json()["type"] == "/problems/store-unavailable"
        return response.status_code != 503

    wait_until(known)
    return statuses[-1] == 200


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ids_answered_before_a_kill_are_there_after_it(
    make_server: Callable[..., Server], zero: bytes, workers: str
) -> None:
    """`kill -9` in the middle of load loses no reconstruction whose id was returned, with one worker or two."""
    server = make_server(ANOMALY_WORKERS=workers).start()
    with under_load(server, zero, answered=300) as ids:
        server.kill()
    server.start()
    with server.client(timeout=30) as client:
        missing = [key for key in ids if not found(client, key)]
    assert missing == []


def test_workers_end_when_their_supervisor_is_killed(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """After `kill -9` of the supervisor, no worker remains that holds the port, and no metrics file."""
    server = make_server(ANOMALY_WORKERS="2", TMPDIR=str(tmp_path)).start()
    assert list(tmp_path.glob("anomaly-metrics-*"))
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) >= 2
    server.process.kill()
    _, alive = psutil.wait_procs(children, 60)
    assert alive == []
    assert list(tmp_path.glob("*anomaly-metrics-*")) == []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_graceful_stop_answers_what_was_accepted(
    make_server: Callable[..., Server], zero: bytes, workers: str
) -> None:
    """On SIGTERM under load no accepted request is dropped, and the exit code is that of a clean stop."""
    server = make_server(ANOMALY_WORKERS=workers).start()
    barrier = threading.Barrier(9)

    def one() -> int | None:
        with server.client(timeout=20) as client:
            client.get("/livez")
            barrier.wait()
            try:
                return client.post("/score", content=zero, headers=PNG).status_code
            except httpx.TransportError as error:
                return None if "disconnected" in str(error) or "refused" in str(error) or "reset" in str(error) else -1

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(one) for _ in range(8)]
        barrier.wait()
        code = server.stop()
        statuses = [future.result(30) for future in futures]
    assert code == 0, server.log()
    assert all(status in (200, None) for status in statuses), statuses
    assert "Traceback" not in server.log()


def test_draining_serves_while_unready(make_server: Callable[..., Server], zero: bytes) -> None:
    """After SIGTERM, a draining service returns 503 on /readyz and still scores; then it ends."""
    server = make_server(ANOMALY_DRAIN_SECONDS="10").start()
    server.process.terminate()
    with server.client() as client:
        wait_until(lambda: client.get("/readyz").status_code != 200, 8)
        assert client.post("/score", content=zero, headers=PNG).status_code == 200
    assert server.process.wait(60) == 0


def test_a_drain_closes_connections_with_their_responses(make_server: Callable[..., Server], zero: bytes) -> None:
    """Clients that reuse connections are told to open others, so the end of the drain finds none of them in use."""
    server = make_server(ANOMALY_DRAIN_SECONDS="3600").start()
    with server.client() as client:
        for _ in range(2):
            assert "connection" not in client.post("/score", content=zero, headers=PNG).headers
            assert "connection" not in client.get("/models").headers
        server.process.terminate()
        wait_until(lambda: client.get("/readyz").status_code == 503)
        assert client.post("/score", content=zero, headers=PNG).headers["connection"] == "close"
        assert client.get("/models").headers["connection"] == "close"
    get = b"GET /models HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as pipelining:
        pipelining.sendall(get * 3)
        replies = b"".join(iter(lambda: pipelining.recv(65536), b""))
    assert replies.count(b"HTTP/1.1 200 ") == 3
    assert server.stop() == 0


def test_a_second_signal_ends_the_drain(make_server: Callable[..., Server]) -> None:
    """With one process, a second SIGTERM ends the drain."""
    server = make_server(ANOMALY_DRAIN_SECONDS="3600").start()
    server.process.terminate()
    wait_until(lambda: server.get("/readyz").status_code == 503)
    assert server.stop() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_where_there_is_none_fails_the_start(make_server: Callable[..., Server]) -> None:
    """Asking for CUDA without a CUDA device is one clear line and a non-zero exit code."""
    for device in ("cuda", "cuda:1"):
        server = make_server(ANOMALY_DEVICE=device).start(wait=False)
        assert server.process.wait(60) == 2
        (line,) = server.log().splitlines()
        assert line.startswith(f"cannot start: device '{device}' was requested")


def test_a_misspelt_setting_fails_the_start(make_server: Callable[..., Server]) -> None:
    """An unknown variable with the prefix is one clear line and a non-zero exit code."""
    server = make_server(ANOMALY_DEVISE="cpu").start(wait=False)
    assert server.process.wait(60) == 2
    assert server.log() == "cannot start: unknown setting ANOMALY_DEVISE; docs/configuration.md lists the known ones\n"


@pytest.mark.parametrize("url", ["mysql://x", "redis:/:hunter2@localhost:1/0"])
def test_a_store_url_of_no_kind_fails_the_start(make_server: Callable[..., Server], url: str) -> None:
    """A store that does not exist is one clear line, which does not repeat the URL, and a non-zero exit code."""
    server = make_server(ANOMALY_STORE_URL=url).start(wait=False)
    assert server.process.wait(60) == 2
    known = " or ".join(f"{scheme}://" for scheme in BACKENDS)
    assert server.log() == f"cannot start: the store URL does not begin with {known}\n"


def test_a_sqlite_store_without_a_file_fails_the_start(make_server: Callable[..., Server]) -> None:
    """A URL that ends before the file's name is one clear line and a non-zero exit code."""
    server = make_server(ANOMALY_STORE_URL="sqlite:///").start(wait=False)
    assert server.process.wait(60) == 2
    assert server.log() == "cannot start: the store URL names no file; its form is sqlite:///path\n"


def test_it_can_be_stopped_before_it_serves(make_server: Callable[..., Server]) -> None:
    """SIGTERM ends a process that has loaded nothing yet, also where it is the first one of a container.

    For the first process of a container, the kernel ignores signals without a handler.
    """
    server = make_server().start(wait=False)
    status = Path(f"/proc/{server.process.pid}/status")
    wait_until(lambda: int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 128 + signal.SIGTERM
    assert server.log() == ""


def test_a_stop_is_heard_where_exceptions_are_not() -> None:
    """SIGTERM also works in a finaliser, which may run during imports, although Python drops exceptions there."""
    program = """
import os, signal
import app.__main__

class Ends:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

Ends()
print("lives on")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, b"", b"")


def test_every_log_line_is_json_and_gives_nothing_away(make_server: Callable[..., Server], zero: bytes) -> None:
    """Each line of the log is one JSON object; requests carry their id, and no path of the machine is in any."""
    server = make_server().start()
    server.post("/score", content=zero, headers={**PNG, "x-request-id": "find-me"})
    server.get("/secret/path")
    entry = struct.pack("<HHII", 0x10E, 2, 100_000, 50)  # Pillow warns about a tag that is larger than its block
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    jpeg = pngs.saved(Image.fromarray(pngs.gradient(64)), format="JPEG")
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    server.post("/score?fit=mnist", content=jpeg, headers={"content-type": "image/jpeg"})
    server.stop()
    lines = [json.loads(line) for line in server.log().splitlines()]
    (scored,) = [line for line in lines if line.get("request_id") == "find-me"]
    assert scored["status"] == 200
    assert scored["model"] == "zero"
    assert "secret" not in server.log()
    assert str(server.log_path.parent) not in server.log()


def test_slow_bodies_are_408(make_server: Callable[..., Server]) -> None:
    """A client that does not finish its body gets 408, and its connection is closed."""
    server = make_server(ANOMALY_BODY_TIMEOUT_MS="300").start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = "POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 500\r\n\r\n"
        connection.sendall(head.encode() + b"\x89PNG")
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"/problems/body-timeout" in answer


def test_a_million_tiny_chunks_are_refused(make_server: Callable[..., Server]) -> None:
    """A chunked body is counted while it arrives: one byte above the limit gets 413, for any size of the chunks."""
    server = make_server().start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = "POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b"1\r\nx\r\n" * 10_000)
        answer = b""
        with contextlib.suppress(OSError):
            while chunk := connection.recv(65536):
                answer += chunk
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413 ")
    assert server.get("/livez").status_code == 200


HOSTILE = {
    "another host": b"GET /models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
    "an absolute target": b"GET http://evil.example/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "a target with an at sign": b"GET @evil.example HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "ten thousand ranges": b"GET /models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nRange: bytes="
    + b",".join(b"%d-%d" % (n, n) for n in range(10_000))
    + b"\r\n\r\n",
    "a header of a megabyte": b"GET /models HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 2**20 + b"\r\n\r\n",
    "a trailer of a megabyte": b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: "
    + b"a" * 2**20
    + b"\r\n\r\n",
    "ten thousand headers": b"GET /models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    + b"".join(b"A%d: a\r\n" % n for n in range(10_000))
    + b"\r\n",
    "two lengths": b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "a length and chunks": b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a bad chunk": b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "two hosts": b"GET /livez HTTP/1.1\r\nHost: x\r\nHost: evil.example\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


def _head(png: bytes) -> bytes:
    return b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: %d\r\n\r\n" % len(png)


def test_a_flood_gets_scores_and_refusals_and_nothing_else(make_server: Callable[..., Server], zero: bytes) -> None:
    """In overload, each request is scored or rejected with Retry-After, and no connection is lost."""
    server = make_server(ANOMALY_QUEUE_MAX_IMAGES="64").start()
    found = drive(server.port, [_head(zero) + zero], rate=100_000, seconds=0.05, count=400)
    assert found["sent"] == 5000
    assert found["unanswered"] == found["lost_connections"] == found["refusals_without_retry_after"] == 0
    assert set(found["statuses"]) == {"200", "503"}
    assert server.post("/score", content=zero, headers=PNG).status_code == 200


def test_hostile_requests_change_nothing(make_server: Callable[..., Server], zero: bytes) -> None:
    """The service survives each of these requests; no reply contains another host name, and no log a traceback."""
    server = make_server().start()
    for name, request in HOSTILE.items():
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.settimeout(1)
            answer = b""
            with contextlib.suppress(OSError):
                connection.sendall(request)
                while chunk := connection.recv(65536):
                    answer += chunk
            assert b"evil" not in answer, name
            assert b" 500 " not in answer, name
        response = server.post("/score", content=zero, headers=PNG)
        assert response.status_code == 200, name
    assert "Traceback" not in server.log()


def test_what_is_no_http_is_refused_as_a_problem(make_server: Callable[..., Server]) -> None:
    """Bytes that are not HTTP get a problem document, like every other rejected request."""
    server = make_server().start()
    details = {}
    for name in ("no HTTP", "a bad chunk", "two lengths", "two hosts"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(HOSTILE[name])
            answer = b""
            with contextlib.suppress(OSError):
                while chunk := connection.recv(65536):
                    answer += chunk
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 "), name
        assert b"content-type: application/problem+json" in head, name
        problem = json.loads(body)
        assert problem["type"] == "/problems/malformed-request", name
        details[name] = problem["detail"]
    assert "Host" in details["two hosts"]
    assert "Host" not in details["no HTTP"]
    assert server.get("/livez").status_code == 200


def test_another_protocol_is_not_spoken(make_server: Callable[..., Server]) -> None:
    """A request with an upgrade to WebSocket is handled as a plain HTTP request."""
    server = make_server().start()
    wanted = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    for path, status, kind in (("/livez", 200, "application/json"), ("/none", 404, "application/problem+json")):
        response = server.get(path, headers=wanted)
        assert (response.status_code, response.headers["content-type"]) == (status, kind)
    server.stop()
    assert "WebSocket" not in server.log()


def batch_of(count: int, accept: str) -> bytes:
    """Return a whole request for the scores of `count` blank images."""
    array = io.BytesIO()
    np.save(array, np.zeros((count, 28, 28), np.uint8))
    head = (
        "POST /score/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\n"
        f"Accept: {accept}\r\nContent-Length: {len(array.getvalue())}\r\n\r\n"
    )
    return head.encode() + array.getvalue()


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
def test_a_batch_client_that_never_reads_loses_its_place(make_server: Callable[..., Server], accept: str) -> None:
    """A client that sends a batch and does not read the reply loses its place after the timeout."""
    server = make_server(
        ANOMALY_BATCH_MAX_REQUESTS="1",
        ANOMALY_BODY_TIMEOUT_MS="1000",
        ANOMALY_BATCH_MIN_BYTES_PER_SECOND="10000000",
        ANOMALY_DEFAULT_MODEL="zero-article",
    ).start()
    content = batch_of(60_000, accept)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.settimeout(120)
        connection.sendall(content)
        wait_until(lambda: '"client_left":true' in server.log(), 120, describe=server.log)
        small = batch_of(1, accept)
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as other:
            other.sendall(small)
            assert other.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert 'anomaly_http_requests_total{route="/score/batch",status="499"} 1.0' in server.get("/metrics").text
    server.kill()


def test_a_batch_client_that_trickles_loses_its_place(make_server: Callable[..., Server]) -> None:
    """A client that trickles single bytes gets 408, and its connection is closed."""
    server = make_server(ANOMALY_BODY_TIMEOUT_MS="600").start()
    head, _, body = batch_of(100, "application/json").partition(b"\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head + b"\r\n\r\n" + body[:200])
        connection.settimeout(0.1)
        answer, began = b"", time.monotonic()
        while not answer:
            assert time.monotonic() < began + 20, "a trickle was taken for progress"
            connection.sendall(b"\0")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close\r\n" in answer


def test_every_kind_of_request_is_described_in_the_log(make_server: Callable[..., Server], zero: bytes) -> None:
    """Log lines contain the stages of a score, the totals of a batch, and the problem type of a rejected request."""
    server = make_server().start()
    array = io.BytesIO()
    np.save(array, np.zeros((5, 28, 28), np.uint8))
    npy = {"content-type": "application/x-npy"}
    server.post("/score", content=zero, headers={**PNG, "x-request-id": "score"})
    server.post("/score/batch", content=array.getvalue(), headers={**npy, "x-request-id": "batch"})
    server.post("/score/batch", content=b"x", headers={**npy, "x-request-id": "bad-batch"})
    server.post("/score", content=b"x", headers={**PNG, "x-request-id": "bad-score"})
    server.get("/none", headers={"x-request-id": "none"})
    server.get(f"/reconstruction/{'0' * 44}?scale=99", headers={"x-request-id": "scale"})
    server.get(f"/models?{'a' * 2000}", headers={"x-request-id": "long"})
    server.stop()
    lines = {line.get("request_id"): line for line in map(json.loads, server.log().splitlines())}
    for name in ("score", "batch"):
        assert lines[name]["model"] == "zero"
        for stage in ("decode", "queue", "forward", "store"):
            assert isinstance(lines[name][f"{stage}_us"], int)
        assert lines[name]["forward_us"] > 0
    assert (lines["batch"]["count"], lines["batch"]["anomalous"], lines["batch"]["failed"]) == (5, 5, 0)
    said = {name: lines[name]["problem"].removeprefix("/problems/") for name in lines if "problem" in lines[name]}
    assert said == {
        "bad-batch": "malformed-array",
        "bad-score": "not-a-png",
        "none": "not-found",
        "scale": "invalid-parameter",
        "long": "malformed-request",
    }


@pytest.mark.long
def test_memory_stays_flat_when_versions_change(
    make_server: Callable[..., Server], tmp_path: Path, zero: bytes
) -> None:
    """Promotions, and requests for more versions than stay loaded, add at most 40 MB after the first five changes."""
    store = model_stores.copy(tmp_path / "store", *range(1, 11), current=1, name="zero")
    server = make_server(
        ANOMALY_MODEL_STORE=str(store),
        ANOMALY_DEFAULT_MODEL="zero",
        ANOMALY_WATCH_SECONDS="0.05",
        ANOMALY_DEADLINE_MS="20000",  # a busy machine loads a version slowly
    ).start()
    assert server.process is not None
    memory = psutil.Process(server.process.pid)
    with server.client(timeout=30) as client:

        def promote(version: int) -> None:
            model_stores.promote(store, version, "zero")
            wait_until(lambda: client.get("/readyz").json()["version"] == version)
            assert client.post("/score", content=zero, headers=PNG).status_code == 200

        for version in (2, 3, 4, 5, 6):
            promote(version)
        level = memory.memory_info().rss
        for version in range(25):
            promote(version % 10 + 1)
        assert memory.memory_info().rss - level < 40e6
        for version in (2, 3, 4, 5):
            assert client.post(f"/score?model=zero@{version}", content=zero, headers=PNG).status_code == 200
        level = memory.memory_info().rss
        statuses = [
            client.post(f"/score?model=zero@{number % 10 + 1}", content=zero, headers=PNG).status_code
            for number in range(500)
        ]
        assert set(statuses) == {200, 503}
        assert memory.memory_info().rss - level < 40e6


def test_memory_stays_flat_when_large_images_are_rejected(make_server: Callable[..., Server]) -> None:
    """Images of 4 megapixels that `fit` rejects are freed with their response, not by the garbage collector later."""
    blank = pngs.plain(np.full((2000, 2000), 200, np.uint8))
    server = make_server().start()
    assert server.process is not None
    memory = psutil.Process(server.process.pid)
    with server.client(timeout=30) as client:

        def reject(count: int) -> int:
            for _ in range(count):
                assert client.post("/score?fit=mnist", content=blank, headers=PNG).status_code == 422
            return memory.memory_info().rss

        level = reject(5)
        assert reject(30) - level < 40e6


def test_an_unread_standard_output_stops_nothing(make_server: Callable[..., Server], zero: bytes) -> None:
    """With its output pipe full, the service scores, replies to probes, counts dropped lines and ends at SIGTERM."""
    server = make_server()
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4096)
    server.start(output=writes)
    os.close(writes)
    assert server.process is not None
    try:
        with server.client(timeout=10) as client:
            long = {**PNG, "x-request-id": "r" * 64}
            dropped = 0.0
            for _ in range(200):
                assert client.post("/score", content=zero, headers=long).status_code == 200
            assert client.get("/livez").status_code == 200
            # The service keeps 1 MB of lines for a slow reader.
            until = time.monotonic() + 60
            while not dropped and time.monotonic() < until:
                for _ in range(2000):
                    client.get("/models/none", headers=long)
                dropped = float(
                    re.search(r"(?m)^anomaly_log_lines_dropped_total (\S+)", client.get("/metrics").text)[1]
                )
            assert dropped > 0
            assert client.post("/score", content=zero, headers=long).status_code == 200
        assert server.stop() == 0
    finally:
        os.close(reads)


@pytest.fixture
def hanging(make_server: Callable[..., Server], tmp_path: Path) -> Callable[..., Server]:
    """Return a function that starts a service whose forward pass never returns for a white image."""
    store = model_stores.hanging(tmp_path / "store")
    settings = {"MODEL_STORE": str(store), "DEFAULT_MODEL": "zero-article"}

    def start(workers: int) -> Server:
        chosen = {**settings, "WORKERS": str(workers)}
        server = make_server(**{f"ANOMALY_{name}": value for name, value in chosen.items()}).start()
        assert server.post("/score", content=pngs.plain(), headers=PNG).status_code == 200
        white = pngs.plain(np.full((28, 28), 255, np.uint8))
        assert server.post("/score", content=white, headers=PNG, timeout=10).status_code == 504
        return server

    return start


@pytest.mark.parametrize("workers", [1, 2])
def test_a_hanging_forward_pass_does_not_prevent_the_exit(hanging: Callable[..., Server], workers: int) -> None:
    """After SIGTERM, a forward pass that never returns is abandoned and logged, and the exit code is 3."""
    server = hanging(workers)
    began = time.monotonic()
    assert server.stop() == EXIT_ABANDONED
    assert time.monotonic() - began < 20
    assert "shutdown abandoned a forward pass" in server.log()


@pytest.mark.long
def test_a_worker_that_abandons_work_is_replaced(hanging: Callable[..., Server]) -> None:
    """After SIGTERM to all workers, of which one hangs, the supervisor starts others and does not end."""
    server = hanging(2)
    assert server.process is not None
    old = {
        child.pid: child for child in psutil.Process(server.process.pid).children() if "spawn" in child.cmdline()[-2]
    }
    for worker in old.values():
        worker.terminate()
    wait_until(lambda: server.log().count('"event": "started"') == 4, 60)
    assert f"exit code {EXIT_WORKER_ABANDONED}" in server.log()
    assert server.post("/score", content=pngs.plain(), headers=PNG, timeout=10).status_code == 200
    assert server.stop() == 0


def test_without_proc_the_service_starts(make_server: Callable[..., Server], zero: bytes) -> None:
    """Without `/proc`, as on macOS, the service starts and scores; only the start metric is missing."""
    hide = ["unshare", "--mount", "--", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if os.geteuid() != 0 or subprocess.run([*hide, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs root and mount namespaces")
    server = make_server().start(prefix=hide)
    assert server.post("/score", content=zero, headers=PNG).json()["id"] is not None
    assert "anomaly_start_duration_seconds 0.0" in server.get("/metrics").text
    assert server.stop() == 0


def test_a_version_keeps_one_copy_of_its_weights(tmp_path: Path) -> None:
    """Each loaded version of `zero`, whose file has 1.9 MB, takes at most 8 MB."""
    code = """
import psutil, sys, torch
from pathlib import Path
from app.inference.detector import Detector
from app.models.repository import Repository
from app.process import release_free_memory

torch.set_num_threads(1)
artifact = Repository(Path(sys.argv[1])).open("zero", 1)
loaded = [Detector.load(artifact, torch.device("cpu"), [1, 32])]
release_free_memory()
before = psutil.Process().memory_info().rss
loaded += [Detector.load(artifact, torch.device("cpu"), [1, 32]) for _ in range(8)]
release_free_memory()
print((psutil.Process().memory_info().rss - before) / 8)
"""
    command = [sys.executable, "-c", code, str(ROOT / "model_store")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 8e6


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
def test_a_slow_batch_does_not_delay_the_shutdown(make_server: Callable[..., Server], accept: str) -> None:
    """A batch whose client is slow ends with the reason after 8 s: as a 503, or as the last line of the reply."""
    server = make_server(ANOMALY_DEFAULT_MODEL="zero-article", ANOMALY_BODY_TIMEOUT_MS="60000").start()
    request = batch_of(2000, accept)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request[:-1000])
        answer = b"" if accept == "application/json" else connection.recv(65536)
        wait_until(lambda: "anomaly_forward_pass_images_count 0.0" not in server.get("/metrics").text)
        began = time.monotonic()
        assert server.process is not None
        server.process.terminate()
        while piece := connection.recv(65536):
            answer += piece
    assert server.process.wait(30) == 0
    assert 7 < time.monotonic() - began < 20
    assert b"the service is shutting down" in answer.splitlines()[-1 if accept == "application/json" else -4]
    if accept == "application/json":
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: " in answer
