"""Several worker processes on one port: a shared store, common metrics, and a stop without lost requests."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from tests import model_stores
from tests.conftest import Server
from tests.waiting import wait_until

PNG = {"content-type": "image/png"}


def series(server: Server, name: str) -> float:
    """Return the sum of a series over its labels."""
    text = server.get("/metrics", timeout=10).text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def workers_of(server: Server) -> list[psutil.Process]:
    """Return the worker processes."""
    assert server.process is not None
    children = psutil.Process(server.process.pid).children()
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "spawn_main" in " ".join(child.cmdline())]


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
