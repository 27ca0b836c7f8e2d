"""Every 503, 504 and null id names its cause in a metric and in the log line."""

from __future__ import annotations

import ast
import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.http import fitting
from app.images.prepare import prepare
from app.settings import Settings
from app.stores import StoreError
from app.telemetry.metrics import CAUSES
from app.telemetry.writer import LineWriter
from tests import model_stores
from tests.conftest import ROOT, running, services
from tests.requests import raw

UNAVAILABLE = {"Overloaded", "DeadlineExceeded", "ModelUnavailable"}


def test_every_raised_problem_of_status_503_or_504_names_its_cause() -> None:
    """The causes are those that the metric exports from the start, and the documentation lists them."""
    documented = (ROOT / "docs" / "configuration.md").read_text()
    named = {"store_read", "store_down", "store_slow", "store_full"}
    for path in (ROOT / "app").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in UNAVAILABLE:
                cause = next((word.value for word in call.keywords if word.arg == "cause"), None)
                assert cause is not None, f"{path}:{call.lineno} names no cause"
                named |= {cause.value} if isinstance(cause, ast.Constant) else set()
            elif isinstance(call, ast.Call) and getattr(call.func, "id", "") == "FairPlaces":
                (cause,) = (word.value for word in call.keywords if word.arg == "cause")
                named.add(ast.literal_eval(cause))
    assert named == set(CAUSES)
    assert [cause for cause in CAUSES if f"`{cause}`" not in documented] == []


class Lines(LineWriter):
    """Collects the lines of the access log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    def write(self, content: bytes, lines: int = 1) -> None:
        """Keep lines."""
        self.lines += [json.loads(each) for each in content.splitlines()]
        assert lines <= len(self.lines)


async def counted(client: httpx.AsyncClient, cause: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    (line,) = (line for line in lines if line.startswith(f'anomaly_degraded_total{{cause="{cause}"}}'))
    return float(line.rpartition(" ")[2])


class Failing:
    """A store that fails or is slow."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds

    def put(self, _: object) -> None:
        """Fail."""
        import time

        time.sleep(self._seconds)
        raise StoreError("broken")

    def get(self, _: str) -> bytes:
        """Fail."""
        raise StoreError("broken")

    def ping(self) -> None:
        """Succeed, so that the store is up at first."""

    def close(self) -> None:
        """Do nothing."""


class Held(Failing):
    """A store that is written when `gate` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.gate = threading.Event(), threading.Event()

    def put(self, _: object) -> None:
        """Wait."""
        self.entered.set()
        assert self.gate.wait(30)


def hold(work: Callable[..., Any], gate: threading.Event) -> Callable[..., Any]:
    """Return a function that waits for the gate and then calls `work`."""

    def held(*given: Any, **named: Any) -> Any:
        assert gate.wait(30)
        return work(*given, **named)

    return held


@pytest.mark.parametrize(
    ("cause", "given", "parts"),
    [
        ("queue", {"queue_max_images": 1}, {}),
        ("deadline", {"deadline_ms": 50, "store_timeout_ms": 20}, {}),
        ("fit_places", {"fit_max_waiting": 1}, {}),
        ("fit_deadline", {"deadline_ms": 50, "store_timeout_ms": 20}, {}),
        ("batch_places", {"batch_max_connections": 1}, {}),
        ("version_places", {"max_extra_versions": 1}, {}),
        ("version_rejected", {}, {}),
        ("shutdown", {}, {}),
        ("store_read", {}, {"store": Failing()}),
        ("store_down", {}, {"store": Failing()}),
        ("store_slow", {"store_timeout_ms": 20}, {"store": Failing(0.2)}),
    ],
)
async def test_the_cause_is_in_the_metric_and_in_the_log(
    make_settings: Callable[..., Settings],
    tmp_path: Path,
    zero: bytes,
    monkeypatch: pytest.MonkeyPatch,
    cause: str,
    given: dict[str, Any],
    parts: dict[str, Any],
) -> None:
    """Requests that a limit ends are counted under the name of the limit, and their log lines contain this name."""
    if cause.startswith("version"):
        store = model_stores.copy(tmp_path / "store", 1, 2, 3, current=1)
        (store / "zero-article" / "3" / "model.pt").write_bytes(b"damaged")
        given = {**given, "model_store": store}
    log, gate = Lines(), threading.Event()
    if cause == "fit_deadline":
        monkeypatch.setattr(fitting, "prepare", hold(prepare, gate))
    async with running(make_settings(log_requests=True, **given), log_writer=log, **parts) as client:
        if cause == "deadline":
            version = await services(client).registry.select(None)
            monkeypatch.setattr(version.detector, "draw", hold(version.detector.draw, gate))
        path = {"fit_places": "?fit=mnist", "fit_deadline": "?fit=mnist"}.get(cause, "")
        if cause == "version_places":
            await raw(client, zero, "?model=zero-article@2")
            path = "?model=zero-article@3"
        elif cause == "version_rejected":
            path = "?model=zero-article@3"
        if cause in ("batch_places", "shutdown"):
            if cause == "shutdown":
                services(client).batch.begin_shutdown()
            post = client.post("/score/batch", files=[("files", ("a.png", zero, "image/png"))])
            statuses = [
                reply.status_code
                for reply in await asyncio.gather(
                    post,
                    *(client.post("/score/batch", files=[("files", ("a.png", zero, "image/png"))]) for _ in range(3)),
                )
            ]
        elif cause == "store_read":
            statuses = [(await client.get(f"/reconstruction/{'a' * 44}")).status_code]
        else:
            statuses = [
                reply.status_code for reply in await asyncio.gather(*(raw(client, zero, path) for _ in range(6)))
            ]
        gate.set()
        number = await counted(client, cause)
    lines = [line for line in log.lines if "status" in line]
    if cause in ("store_down", "store_slow"):
        assert set(statuses) == {200}
        assert sum(line.get("without_id", 0) for line in lines) == 6
        assert sum(line["without_id_cause"] == cause for line in lines) == number > 0
    else:
        shed = sum(status in (503, 504) for status in statuses)
        assert number == shed > 0
        assert sum(line.get("cause") == cause for line in lines) == shed


async def test_a_store_whose_queue_is_full_is_a_cause(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """While a record waits for the store, a further score has no id, and the log line says why; batches as well."""
    log, store = Lines(), Held()
    given = make_settings(log_requests=True, queue_max_images=1, store_timeout_ms=30_000, deadline_ms=60_000)
    async with running(given, log_writer=log, store=store) as client:
        first = asyncio.create_task(raw(client, zero))
        assert await asyncio.to_thread(store.entered.wait, 30)
        assert (await raw(client, zero)).json()["id"] is None
        batch = await client.post("/score/batch?store=true", files=[("files", ("a.png", zero, "image/png"))] * 2)
        assert [item["id"] for item in batch.json()["items"]] == [None, None]
        store.gate.set()
        assert (await first).json()["id"] is not None
        assert await counted(client, "store_full") == 3
    causes = [(line["without_id"], line["without_id_cause"]) for line in log.lines if "without_id" in line]
    assert causes == [(1, "store_full"), (2, "store_full")]
