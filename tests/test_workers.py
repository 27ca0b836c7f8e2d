"""Several worker processes on one port: a shared store, common metrics, and a stop without lost requests."""

from __future__ import annotations

import hashlib
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import psutil
import pytest

from app.process import EXIT_ABANDONED
from tests import model_stores
from tests.conftest import ROOT, Server
from tests.waiting import wait_until

PNG = {"content-type": "image/png"}


def two_workers(
    make_server: Callable[..., Server], store: Path, prefix: Sequence[str] = (), **environment: str
) -> Server:
    """Return a service of two workers that have started, with `zero-article` of a model store.

    Args:
        make_server: the fixture.
        store: folder of the model store.
        prefix: a command that executes the service.
        environment: settings.
    """
    chosen = {"ANOMALY_MODEL_STORE": str(store), "ANOMALY_DEFAULT_MODEL": "zero-article", **environment}
    server = make_server(ANOMALY_WORKERS="2", **chosen).start(wait=False, prefix=prefix)
    wait_until(lambda: server.log().count('"event": "started"') == 2, 120, describe=server.log)
    server.wait_ready()
    return server


def series(server: Server, name: str) -> float:
    """Return the sum of a series over its labels."""
    text = server.get("/metrics", timeout=10).text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def workers_of(server: Server) -> list[psutil.Process]:
    """Return the worker processes."""
    assert server.process is not None
    return [child for child in psutil.Process(server.process.pid).children() if _is_worker(child)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # the supervisor has reaped it since it was listed
        return False


@pytest.mark.long
def test_two_workers_are_one_service(make_server: Callable[..., Server], zero: bytes, tmp_path: Path) -> None:
    """All workers find ids of one worker, /metrics is the same from every worker, and a killed worker is replaced."""
    server = make_server(ANOMALY_WORKERS="2", TMPDIR=str(tmp_path)).start()
    assert list(tmp_path.glob("anomaly-metrics-*"))
    wait_until(lambda: series(server, "anomaly_start_duration_seconds") > 0 and len(workers_of(server)) == 2)
    replies = [server.post("/score", content=zero, headers=PNG, timeout=30) for _ in range(40)]
    assert {reply.status_code for reply in replies} == {200}
    for reply in replies:
        for _ in range(3):
            assert server.get(reply.json()["reconstruction"], timeout=30).status_code == 200
    for name in ("anomaly_scores_total", "anomaly_score_mse_count"):
        assert {series(server, name) for _ in range(10)} == {40.0}
    assert {series(server, "anomaly_reconstruction_store_up") for _ in range(5)} == {1.0}

    victim = workers_of(server)[0]
    victim.send_signal(signal.SIGKILL)
    wait_until(lambda: len([w for w in workers_of(server) if w.is_running() and w.pid != victim.pid]) == 2)
    wait_until(lambda: _answers(server))
    assert series(server, "anomaly_scores_total") == 40.0
    assert server.stop() == 0
    assert not list(tmp_path.glob("*metrics-*"))


def _readiness(server: Server) -> set[int]:
    """Return the statuses of ten requests of /readyz, enough to reach all workers with high probability."""
    return {server.get("/readyz", timeout=5).status_code for _ in range(10)}


def _answers(server: Server) -> bool:
    try:
        return _readiness(server) == {200}
    except httpx.TransportError:
        return False


def test_a_stop_drains_every_worker(make_server: Callable[..., Server], zero: bytes) -> None:
    """After SIGTERM, each worker returns 503 on /readyz, still scores, and then ends."""
    server = make_server(ANOMALY_WORKERS="2", ANOMALY_DRAIN_SECONDS="15").start()
    wait_until(lambda: server.log().count('"event": "started"') == 2)
    assert _readiness(server) == {200}
    assert server.process is not None
    server.process.terminate()
    # uvicorn's supervisor polls for signals twice per second, then signals the workers.
    wait_until(lambda: _readiness(server) == {503}, seconds=10)
    scores = [server.post("/score", content=zero, headers=PNG, timeout=5).status_code for _ in range(10)]
    assert set(scores) == {200}
    assert server.process.wait(60) == 0


def test_every_worker_says_by_itself_that_it_is_ready(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """`anomaly_ready` is 1 as soon as all workers are ready, including workers without a request so far."""
    store = tmp_path / "store"
    environment = {"ANOMALY_DEFAULT_MODEL": "zero-article", "ANOMALY_ALLOW_EMPTY": "true"}
    server = make_server(ANOMALY_WORKERS="2", ANOMALY_MODEL_STORE=str(store), **environment)
    server.start(wait=False)
    wait_until(lambda: server.log().count('"event": "started"') == 2)
    model_stores.copy(store, 1)
    wait_until(lambda: server.log().count('"event": "version serves"') == 2)
    # One connection, so that one worker replies for both.
    with server.client(timeout=30) as client:
        wait_until(lambda: "\nanomaly_ready 1.0\n" in client.get("/metrics").text)


def test_a_worker_starts_while_the_model_store_fails(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """A worker that starts while the model store cannot be read is unready until it recovers; the others serve."""
    store = model_stores.copy(tmp_path / "store", 1)
    link = model_stores.link(tmp_path / "link", store)
    server = two_workers(make_server, link, ANOMALY_WATCH_SECONDS="0.2")
    model_stores.link(link, model_stores.UNREADABLE)
    workers_of(server)[0].kill()
    wait_until(lambda: server.log().count('"event": "started"') == 3, 120, describe=server.log)
    wait_until(lambda: 200 in _readiness(server))
    model_stores.link(link, store)
    wait_until(lambda: server.log().count('"event": "version serves"') == 3)
    wait_until(lambda: _readiness(server) == {200})
    assert server.stop() == 0


def test_a_worker_that_cannot_start_ends_no_other(
    make_server: Callable[..., Server], article_alone: Path, tmp_path: Path, zero: bytes
) -> None:
    """If a worker cannot start because a file is damaged, one line has the reason, and it is started again later."""
    key, keys = "k" * 64, tmp_path / "keys"
    valid, headers = f"{hashlib.sha256(key.encode()).hexdigest()} name\n", {**PNG, "x-api-key": key}
    keys.write_text(valid)
    server = two_workers(make_server, article_alone, ANOMALY_API_KEYS_FILE=str(keys), TMPDIR=str(tmp_path))
    assert server.post("/score", content=zero, headers=headers).status_code == 200
    server.get("/metrics", timeout=10)
    files = {path.name for path in tmp_path.glob("anomaly-metrics-*/*.db")}
    assert len([name for name in files if name.startswith("counter_")]) == 2
    keys.write_text("damaged\n")
    workers_of(server)[0].kill()
    failed = "worker cannot start: the next attempt is in 5 s"
    wait_until(lambda: failed in server.log(), 60, describe=server.log)
    assert server.post("/score", content=zero, headers=headers, timeout=20).status_code == 200
    assert "cannot start: line 1 of the file of the API keys is not '<SHA-256> <name>'" in server.log()
    assert {path.name for path in tmp_path.glob("anomaly-metrics-*/*.db")} <= files, "a failed start left files"
    keys.write_text(valid)
    wait_until(lambda: server.log().count('"event": "started"') == 3, 120, describe=server.log)
    assert server.log().count(failed) < 3
    assert "Traceback" not in server.log()
    assert {server.post("/score", content=zero, headers=headers).status_code for _ in range(10)} == {200}
    assert server.stop() == 0


def test_a_worker_that_no_process_can_replace_is_replaced_later(
    make_server: Callable[..., Server], article_alone: Path, zero: bytes
) -> None:
    """If the supervisor cannot start a process, it says so, the other worker serves, and the next attempt succeeds."""
    server = two_workers(make_server, article_alone)
    assert server.process is not None
    supervisor = psutil.Process(server.process.pid)
    soft, hard = supervisor.rlimit(psutil.RLIMIT_NOFILE)
    supervisor.rlimit(psutil.RLIMIT_NOFILE, (3, hard))
    workers_of(server)[0].kill()
    problem = "no process can be started (Too many open files): the next attempt is in 5 s"
    wait_until(lambda: problem in server.log(), 60, describe=server.log)
    assert server.post("/score", content=zero, headers=PNG, timeout=20).status_code == 200
    supervisor.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: server.log().count('"event": "started"') == 3, 120, describe=server.log)
    assert "Traceback" not in server.log()
    assert server.stop() == 0


FAILING = """
import errno
import os
import sys

from app.__main__ import main
from app.http.supervisor import Worker

start, started = Worker.start, []


def fail(worker):
    if started:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    started.append(worker)
    start(worker)


Worker.start = fail
if __name__ == "__main__":
    sys.exit(main([]))
"""


def test_a_first_worker_that_no_process_can_run_is_exit_code_2(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    """If the second of two processes cannot be started, the first one is stopped, and the log has the reason."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    server = make_server(ANOMALY_WORKERS="2", PYTHONPATH=str(ROOT))
    server.start(wait=False, prefix=[sys.executable, str(script)])
    assert server.process is not None
    assert server.process.wait(60) == 2
    assert "the first workers cannot start: Resource temporarily unavailable" in server.log()
    assert "Traceback" not in server.log()


IMPATIENT = """
import sys

from app.__main__ import main
from app.http import supervisor

supervisor.STOP_SECONDS = 8.0
if __name__ == "__main__":
    sys.exit(main([]))
"""


def test_a_worker_that_does_not_react_is_killed(
    make_server: Callable[..., Server], article_alone: Path, tmp_path: Path
) -> None:
    """SIGTERM ends the service although one worker is stopped; the other worker shuts down as usual."""
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    prefix = [sys.executable, str(script)]
    server = two_workers(make_server, article_alone, prefix=prefix, PYTHONPATH=str(ROOT))
    assert server.process is not None
    supervisor = psutil.Process(server.process.pid)
    supervisor.suspend()  # else it may check the worker between the two signals
    workers_of(server)[0].suspend()
    supervisor.terminate()
    supervisor.resume()
    assert server.process.wait(60) == EXIT_ABANDONED
    assert server.log().count("a worker has not ended in time and is killed") == 1
    assert server.log().count('"event": "stopped"') == 1


def test_a_terminal_that_closes_stops_the_service(make_server: Callable[..., Server], article_alone: Path) -> None:
    """SIGHUP stops the service as SIGTERM does; further signals that uvicorn has a use for change nothing."""
    # If the tests run under nohup, the service would inherit that SIGHUP is ignored.
    server = two_workers(make_server, article_alone, prefix=["env", "--default-signal=HUP"])
    assert server.process is not None
    server.process.send_signal(signal.SIGTTIN)
    server.process.send_signal(signal.SIGTTOU)
    for each in [*workers_of(server), server.process]:
        each.send_signal(signal.SIGHUP)
    assert server.process.wait(60) == 0
    assert server.log().count('"event": "started"') == 2
    assert server.log().count('"event": "stopped"') == 2


def test_nohup_keeps_the_service_running(make_server: Callable[..., Server], article_alone: Path, zero: bytes) -> None:
    """If `nohup` has started the service, SIGHUP ends neither the supervisor nor a worker."""
    server = two_workers(make_server, article_alone, prefix=["nohup"])
    assert server.process is not None
    processes = [*workers_of(server), psutil.Process(server.process.pid)]
    assert all(_ignores(each, signal.SIGHUP) for each in processes)
    for each in processes:
        each.send_signal(signal.SIGHUP)
    assert server.post("/score", content=zero, headers=PNG, timeout=20).status_code == 200
    assert server.stop() == 0
    assert server.log().count('"event": "started"') == 2
    assert server.log().count('"event": "stopped"') == 2


def _ignores(process: psutil.Process, number: signal.Signals) -> bool:
    (ignored,) = re.findall(r"SigIgn:\s+(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return bool(int(ignored, 16) & 1 << number - 1)


def test_ctrl_c_during_a_start_prints_no_traceback(make_server: Callable[..., Server], article_alone: Path) -> None:
    """A terminal sends SIGINT to the supervisor and to workers that still import modules."""
    environment = {"ANOMALY_MODEL_STORE": str(article_alone), "ANOMALY_DEFAULT_MODEL": "zero-article"}
    server = make_server(ANOMALY_WORKERS="2", **environment).start(wait=False)
    assert server.process is not None
    supervisor = psutil.Process(server.process.pid)

    def has_started_workers() -> bool:
        """Return whether two workers run, and the supervisor does not ignore SIGINT, as it does while it starts one."""
        return len(workers_of(server)) == 2 and not _ignores(supervisor, signal.SIGINT)

    wait_until(has_started_workers, 60, describe=server.log)
    for each in [*workers_of(server), server.process]:
        each.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log()


def test_a_stop_refuses_new_connections(make_server: Callable[..., Server], article_alone: Path) -> None:
    """After SIGTERM, new connections are refused while a worker finishes a request; one worker died before."""
    server = two_workers(make_server, article_alone, ANOMALY_BODY_TIMEOUT_MS="60000")
    workers_of(server)[0].kill()
    wait_until(lambda: server.log().count('"event": "started"') == 3, 120, describe=server.log)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as slow:
        slow.sendall(b"POST /score/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\n")
        slow.sendall(b"Expect: 100-continue\r\nContent-Length: 1000000\r\n\r\n")
        assert slow.recv(65536).startswith(b"HTTP/1.1 100 ")
        assert server.process is not None
        server.process.terminate()
        wait_until(lambda: _refuses(server))
        # The service ends the batch request 8 s after SIGTERM.
        slow.setblocking(False)
        with pytest.raises(BlockingIOError):
            slow.recv(1)
        slow.settimeout(30)
        assert slow.recv(65536).startswith(b"HTTP/1.1 503 ")
    assert server.process.wait(60) == 0


def _refuses(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_signal_to_the_whole_group_drains(
    make_server: Callable[..., Server], article_alone: Path, zero: bytes
) -> None:
    """If the supervisor and its workers get SIGTERM, as from systemd, the drain has its full length."""
    server = two_workers(make_server, article_alone, ANOMALY_DRAIN_SECONDS="10")
    assert server.process is not None
    began = time.monotonic()
    for each in [*workers_of(server), server.process]:
        each.terminate()
    wait_until(lambda: _readiness(server) == {503})
    assert server.post("/score", content=zero, headers=PNG, timeout=5).status_code == 200
    assert server.process.wait(60) == 0
    assert time.monotonic() - began >= 10
