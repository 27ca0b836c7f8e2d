"""Faults that are injected into a running service: memory that runs out, threads that end, clocks that jump."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from app.concurrency.lanes import LaneWorker
from app.settings import Settings
from app.stores import StoreError
from app.stores.sqlite import SqliteStore
from app.telemetry.logs import JsonFormatter
from tests import pngs
from tests.conftest import running, services
from tests.requests import assert_problem, raw
from tests.waiting import until


class Small:
    """A detector with memory for a number of images; the error is one that TorchScript raises."""

    def __init__(self, detector: Any, room: int, error: Exception) -> None:
        self._detector = detector
        self._room = room
        self._error = error
        self.score_alone = detector.score_alone

    def draw(self, images: np.ndarray) -> Any:
        """Score a micro-batch, or fail."""
        if len(images) > self._room:
            raise self._error
        return self._detector.draw(images)

    def score(self, images: np.ndarray) -> Any:
        """Score a chunk, or fail."""
        if len(images) > self._room:
            raise self._error
        return self._detector.score(images)


def inject(client: httpx.AsyncClient, room: int, error: Exception) -> None:
    version = services(client).registry.current("zero-article")
    assert version is not None
    version.detector = Small(version.detector, room, error)  # type: ignore[assignment]


def npy(images: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, images)
    return file.getvalue()


IMAGES = np.random.default_rng(4).integers(0, 256, (21, 28, 28), dtype=np.uint8)
ARRAY = {"content-type": "application/x-npy"}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("The following operation failed in the TorchScript interpreter.\nRuntimeError: CUDA out of memory."),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["CUDA", "CPU", "in TorchScript", "Python"])
async def test_memory_that_runs_out_splits_the_forward_pass(
    make_settings: Callable[..., Settings], error: Exception
) -> None:
    """Single scores, batches, and batches with pictures get the scores that they get with enough memory."""
    async with running(make_settings(microbatch_max_size=16)) as client:
        expected = (await client.post("/score/batch", content=npy(IMAGES), headers=ARRAY)).json()["items"]
        inject(client, 3, error)
        singles = await asyncio.gather(*(raw(client, pngs.plain(image)) for image in IMAGES))
        assert [reply.json()["mse"] for reply in singles] == pytest.approx([item["mse"] for item in expected], rel=1e-6)
        for query in ("", "?store=true"):
            reply = (await client.post(f"/score/batch{query}", content=npy(IMAGES), headers=ARRAY)).json()
            assert reply["failed"] == 0
            assert [item["mse"] for item in reply["items"]] == pytest.approx([i["mse"] for i in expected], rel=1e-6)
        assert (await client.get("/readyz")).status_code == 200


async def test_no_memory_for_one_image_is_an_error(make_settings: Callable[..., Settings]) -> None:
    """If not even one image fits, the response is 500; another error does not count as a lack of memory."""
    async with running(make_settings()) as client:
        inject(client, 0, ERRORS[0])
        assert_problem(await raw(client, pngs.plain()), 500, "internal-error")
        inject(client, 1, RuntimeError("expected scalar type Float"))
        replies = await asyncio.gather(*(raw(client, pngs.plain()) for _ in range(4)))
        assert {reply.status_code for reply in replies} == {500}


@pytest.mark.parametrize(
    ("thread", "path", "then"),
    [
        ("inference", "/score", 200),
        ("inference", "/score/batch", 200),
        ("fit", "/score?fit=mnist", 200),
        ("model store", "/score?model=zero-article@77", 404),
        ("pictures", "panel", 200),
    ],
)
async def test_a_thread_that_cannot_be_started_is_503(
    make_settings: Callable[..., Settings],
    zero: bytes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    thread: str,
    path: str,
    then: int,
) -> None:
    """The request gets 503 with Retry-After and a cause, one log line contains the place, and the next one succeeds."""
    refused: list[str] = []
    start = threading.Thread.start

    def refuse_once(started: threading.Thread) -> None:
        if started.name != thread or refused:
            return start(started)
        refused.append(started.name)
        raise RuntimeError("can't start new thread")

    async with running(make_settings()) as client:

        async def request() -> httpx.Response:
            if path == "panel":
                return await client.get(panel)
            content, headers = (npy(IMAGES), ARRAY) if "batch" in path else (zero, {"content-type": "image/png"})
            return await client.post(path, content=content, headers=headers)

        panel = f"{(await raw(client, zero)).json()['reconstruction']}?view=panel" if path == "panel" else ""
        monkeypatch.setattr(threading.Thread, "start", refuse_once)
        reply = await request()
        assert_problem(reply, 503, "overloaded")
        assert reply.headers["retry-after"] == "1"
        assert (await request()).status_code == then
        assert 'anomaly_degraded_total{cause="thread"} 1.0' in (await client.get("/metrics")).text
    lines = [json.loads(JsonFormatter().format(line)) for line in caplog.records if line.levelno >= logging.ERROR]
    assert [(line["event"], line["worker"], line["error"]) for line in lines] == [
        ("a thread could not be started", thread, "RuntimeError")
    ]
    assert lines[0]["at"].startswith("app.concurrency.lanes:")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_thread_that_ended_is_started_again() -> None:
    """A thread whose initializer fails ends; the next piece of work starts another one, which does all work."""
    failures, done = [RuntimeError("no memory for a thread")], list[int]()

    def initialize() -> None:
        if failures:
            raise SystemExit  # threading prints no traceback for this exception

    worker = LaneWorker("inference", initialize)
    worker.submit(lambda: done.append(1))
    await until(lambda: worker._thread is not None and not worker._thread.is_alive())
    failures.clear()
    worker.submit(lambda: done.append(2))
    await until(lambda: done == [1, 2])
    assert await worker.run(lambda: 3) == 3
    assert worker.close(10)


def test_a_clock_that_jumps_loses_no_entry_that_lives(tmp_path: Path) -> None:
    """After a jump back, entries exist and new ones can be stored; after a jump forward, expired ones are deleted."""
    clock = [1_000_000.0]
    store = SqliteStore(tmp_path / "a.db", ttl_seconds=60, max_entries=10_000, clock=lambda: clock[0])
    store.put([("before", b"1")])
    clock[0] -= 86_400
    store.put([("during", b"2")])
    assert (store.get("before"), store.get("during")) == (b"1", b"2")
    store.put([(f"many-{number}", b"") for number in range(600)])  # sweeps
    assert (store.get("before"), store.get("during")) == (b"1", b"2")
    clock[0] += 86_400
    assert (store.get("before"), store.get("during")) == (b"1", None)
    store.put([("after", b"3")])
    assert store.get("after") == b"3"
    store.close()


async def test_a_wall_clock_that_jumps_changes_no_deadline(
    client: httpx.AsyncClient, zero: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deadlines, the breaker and the cache of versions use the monotonic clock; ids stay unique."""
    import time

    ids = set()
    real = time.time_ns
    for jump in (0, 10**18, -(10**18), 0):
        monkeypatch.setattr(time, "time_ns", lambda jump=jump: real() + jump)
        monkeypatch.setattr(time, "time", lambda jump=jump: (real() + jump) / 1e9)
        reply = await raw(client, zero)
        assert reply.status_code == 200
        ids.add(reply.json()["id"])
        assert (await client.get("/readyz")).status_code == 200
    assert len(ids - {None}) == 4


def test_a_store_without_a_file_descriptor_is_down_and_recovers(tmp_path: Path) -> None:
    """If the process has no descriptor left, each access is a StoreError, and the next one after that works."""
    store = SqliteStore(tmp_path / "a.db", ttl_seconds=60, max_entries=100)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        for call in (store.ping, lambda: store.put([("a", b"1")]), lambda: store.get("a")):
            with pytest.raises(StoreError):
                call()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    store.put([("a", b"1")])
    assert store.get("a") == b"1"
    assert not (tmp_path / "a.db.damaged").exists()
    store.close()
