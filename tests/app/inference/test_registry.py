"""Versions in memory: switches, rejected versions, failures, hangs, shutdown."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import re
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.inference import registry
from app.inference.detector import Detector, Pictures
from app.inference.extras import RESIDENCE_SECONDS
from app.models.calibration import Calibration
from app.models.repository import Artifact, Repository
from app.settings import Settings
from app.telemetry.logs import JsonFormatter
from tests import model_stores
from tests.conftest import running, services
from tests.requests import assert_problem, raw
from tests.waiting import until


async def version_of(client: httpx.AsyncClient) -> int | None:
    version: int | None = (await client.get("/readyz")).json()["version"]
    return version


async def test_promotion_switches_without_losing_a_request(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """While two versions are promoted in turn under load, every request gets a score of one of them."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)
    async with running(make_settings(model_store=store)) as client:
        seen: set[int] = set()
        done = asyncio.Event()

        async def load() -> None:
            while not done.is_set():
                response = await raw(client, zero)
                assert response.status_code == 200, response.text
                seen.add(response.json()["version"])

        tasks = [asyncio.create_task(load()) for _ in range(8)]
        for version in (2, 1, 2):
            model_stores.promote(store, version)

            async def switched(version: int = version) -> bool:
                return await version_of(client) == version

            await until(switched)
        done.set()
        await asyncio.gather(*tasks)
        assert seen == {1, 2}


async def test_a_body_may_arrive_while_versions_change(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """A request whose body arrives during a change of versions is scored by the version that is current afterwards."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)
    async with running(make_settings(model_store=store, watch_seconds=300)) as client:
        engine = services(client).registry

        async def body() -> AsyncIterator[bytes]:
            yield zero[:20]
            model_stores.promote(store, 2)
            await engine.refresh()
            await asyncio.gather(*engine._retiring)
            yield zero[20:]

        response = await client.post("/score", content=body(), headers={"content-type": "image/png"})
        assert (response.status_code, response.json().get("version")) == (200, 2)


@pytest.mark.parametrize(
    "fault", ["altered module", "no module", "other scores", "no version", "garbage", "not TorchScript"]
)
async def test_a_bad_version_never_evicts_a_good_one(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes, fault: str
) -> None:
    """/models names a current version that was rejected, and the previous version continues to serve."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)
    bad = store / "zero-article" / "2"
    async with running(make_settings(model_store=store)) as client:
        if fault == "altered module":
            content = bytearray((bad / "model.pt").read_bytes())
            content[len(content) // 2] ^= 1
            (bad / "model.pt").write_bytes(content)
        elif fault == "no module":
            (bad / "model.pt").unlink()
        elif fault == "other scores":
            model_stores.put_module(bad, model_stores.Blind())
        elif fault == "not TorchScript":
            model_stores.put_bytes(bad, b"not a module")
        model_stores.promote(store, 3 if fault == "no version" else 2)
        if fault == "garbage":
            (store / "zero-article" / "CURRENT").write_text("../../etc\n")

        async def refused() -> bool:
            return (await client.get("/models")).json()["models"][0]["problem"] is not None

        await until(refused)
        assert (await raw(client, zero)).json()["version"] == 1
        assert (await client.get("/readyz")).status_code == 200
        model_stores.promote(store, 1)

        async def healed() -> bool:
            return (await client.get("/models")).json()["models"][0]["problem"] is None

        await until(healed)


async def test_an_empty_store_is_live_not_ready_and_heals(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """Without a model, the process runs, /readyz and scores get 503. After a version is published, they get 200."""
    store = tmp_path / "store"
    async with running(make_settings(model_store=store)) as client:
        assert (await client.get("/livez")).status_code == 200
        response = await client.get("/readyz")
        assert response.status_code == 503
        assert response.json()["problems"] == ["the model zero-article is not in the model store"]
        assert_problem(await raw(client, zero), 503, "model-unavailable")
        model_stores.copy(store, 1)

        async def ready() -> bool:
            return (await client.get("/readyz")).status_code == 200

        await until(ready)
        assert (await raw(client, zero)).status_code == 200


async def test_versions_are_loaded_by_number_within_a_bound(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """`name@version` selects any version; at most `max_extra_versions` stay loaded, each for its minimum time."""
    store = model_stores.copy(tmp_path / "store", 1, 2, 3, 4, current=1)
    now = [0.0]
    chosen = make_settings(model_store=store, max_extra_versions=2, deadline_ms=30_000)
    async with running(chosen, clock=lambda: now[0]) as client:
        for version in (2, 3, 2):
            assert (await raw(client, zero, f"?model=zero-article@{version}")).json()["version"] == version
        refused = await raw(client, zero, "?model=zero-article@4")
        assert_problem(refused, 503, "overloaded")
        assert "besides the current ones" in refused.json()["detail"]
        assert_problem(await raw(client, zero, "?model=zero-article@5"), 404, "model-not-found")
        for version in (4, 2, 3):
            now[0] += RESIDENCE_SECONDS
            assert (await raw(client, zero, f"?model=zero-article@{version}")).json()["version"] == version
        assert len(services(client).registry.extras.versions()) == 2


async def test_a_retired_version_is_freed_without_the_garbage_collector(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a promotion or an eviction no reference to the retired version is left, cyclic ones included."""
    now = [0.0]
    trimmed: list[None] = []
    monkeypatch.setattr(registry, "release_free_memory", lambda: trimmed.append(None))
    store = model_stores.copy(tmp_path / "store", 1, 2, 3, 4, current=1)
    chosen = make_settings(model_store=store, watch_seconds=300, max_extra_versions=1, deadline_ms=30_000)
    async with running(chosen, clock=lambda: now[0]) as client:
        served = services(client).registry
        before = len(trimmed)
        gc.disable()
        try:
            versions = [weakref.ref(served.current("zero-article"))]
            assert (await raw(client, zero)).status_code == 200
            model_stores.promote(store, 2)
            await served.refresh()
            for version in (3, 4):
                assert (await raw(client, zero, f"?model=zero-article@{version}")).status_code == 200
                versions.append(weakref.ref(served.extras.get("zero-article", version)))
                now[0] += RESIDENCE_SECONDS

            async def freed() -> bool:
                return [version() is None for version in versions] == [True, True, False] and len(trimmed) >= before + 2

            await until(freed)
        finally:
            gc.enable()


async def test_a_model_store_that_vanishes_takes_nothing_with_it(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """If the model store disappears, loaded versions still serve, one log line reports it, and polling recovers."""
    store = model_stores.copy(tmp_path / "store", 1)
    model_stores.copy(store, 1, name="other")
    async with running(make_settings(model_store=store, watch_seconds=300)) as client:
        away = store.rename(tmp_path / "away")
        for state in ("no folder", "an empty folder"):
            if state == "an empty folder":
                store.mkdir()
            for _ in range(3):
                await services(client).registry.refresh()
            for name in ("zero-article", "other"):
                assert (await raw(client, zero, f"?model={name}")).status_code == 200, state
        assert len([record for record in caplog.records if "missing or empty" in record.message]) == 1
        assert (await client.get("/readyz")).status_code == 200
        store.rmdir()
        away.rename(store)
        await services(client).registry.refresh()
        assert (await raw(client, zero)).status_code == 200


async def test_a_model_store_that_fails_at_the_start_heals(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """If the first access to the model store is an OSError, the service is live and unready until the store works."""
    store = model_stores.copy(tmp_path / "store", 1)
    link = model_stores.link(tmp_path / "link", model_stores.UNREADABLE)
    with pytest.raises(OSError, match="File name too long"):
        Repository(link).names()
    async with running(make_settings(model_store=link)) as client:
        assert "the model store could not be read" in caplog.text
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
        assert_problem(await raw(client, zero), 503, "model-unavailable")
        model_stores.link(link, store)

        async def served() -> bool:
            return await version_of(client) == 1

        await until(served)
        assert (await raw(client, zero)).status_code == 200


async def test_only_a_model_whose_folder_is_gone_is_dropped(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """A model without its file CURRENT continues to serve; a model whose folder was removed does not."""
    store = model_stores.copy(tmp_path / "store", 1)
    model_stores.copy(store, 1, name="other")
    async with running(make_settings(model_store=store, watch_seconds=300)) as client:
        (store / "other" / "CURRENT").unlink()
        await services(client).registry.refresh()
        assert (await raw(client, zero, "?model=other")).status_code == 200
        shutil.rmtree(store / "other")
        await services(client).registry.refresh()
        assert_problem(await raw(client, zero, "?model=other"), 404, "model-not-found")
        assert (await raw(client, zero)).status_code == 200


async def test_loaded_versions_go_with_their_model(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """After a model's folder was removed, a version that was requested by number does not serve either."""
    store = model_stores.copy(tmp_path / "store", 1)
    model_stores.copy(store, 1, 2, name="other")
    async with running(make_settings(model_store=store, watch_seconds=300, deadline_ms=30_000)) as client:
        assert (await raw(client, zero, "?model=other@1")).status_code == 200
        shutil.rmtree(store / "other")
        await services(client).registry.refresh()
        assert_problem(await raw(client, zero, "?model=other@1"), 404, "model-not-found")


async def test_whatever_is_off_with_one_model_the_others_are_looked_at(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error rejects only the version that caused it, and a rejected version is tried again later."""
    store = model_stores.copy(tmp_path / "store", 1)
    wrong = [UnicodeError("of /some/path")]

    class Odd(Repository):
        def open(self, name: str, version: int) -> Artifact:
            if name == "aaa" and wrong:
                raise wrong.pop()
            return super().open(name, version)

    monkeypatch.setattr(registry, "REJECTED_SECONDS", 0.0)
    async with running(make_settings(model_store=store, watch_seconds=300)) as client:
        its = services(client).registry
        its.repository = its._loader.repository = Odd(store)
        model_stores.copy(store, 1, name="aaa")
        model_stores.copy(store, 2)
        await its.refresh()
        assert its.rejection("aaa") == "aaa@1: it cannot be loaded (UnicodeError)"
        assert await version_of(client) == 2
        await its.refresh()
        assert its.rejection("aaa") is None
        assert (await raw(client, zero, "?model=aaa")).status_code == 200


async def test_a_refused_request_holds_no_version(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """A version whose only request was rejected can be retired."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)
    async with running(make_settings(model_store=store, deadline_ms=30_000)) as client:
        assert_problem(await raw(client, zero, "?model=zero-article@2&alpha=1e-9"), 422, "unsupported-alpha")
        assert all(version.queue.waiting == 0 for version in services(client).registry.extras.versions())


class Slow:
    """A repository that counts opened versions, and opens them only when the test allows it."""

    def __init__(self, repository: Repository, gate: threading.Event) -> None:
        self._repository = repository
        self._gate = gate
        self.opened = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._repository, name)

    def open(self, name: str, version: int) -> Artifact:
        """Read a version, later."""
        self.opened += 1
        self._gate.wait(30)
        return self._repository.open(name, version)


def slowed(registry: Any, gate: threading.Event) -> Slow:
    """Make a registry read its versions through `Slow`."""
    registry.repository = registry._loader.repository = slow = Slow(registry.repository, gate)
    return slow


async def test_a_refused_version_is_read_once(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """Repeated requests for a rejected version do not read it again at once."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)
    model_stores.put_bytes(store / "zero-article" / "2", b"not a module")
    async with running(make_settings(model_store=store, deadline_ms=30_000)) as client:
        gate = threading.Event()
        gate.set()
        counting = slowed(services(client).registry, gate)
        for _ in range(3):
            replies = await asyncio.gather(*(raw(client, zero, "?model=zero-article@2") for _ in range(5)))
            for reply in replies:
                assert_problem(reply, 503, "model-unavailable")
        assert counting.opened == 1


async def test_a_version_whose_load_fails_unexpectedly_is_read_once(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """After an unexpected error, the registry rejects further requests for the version without loading it again."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)

    class Odd(Repository):
        opened = 0

        def open(self, name: str, version: int) -> Artifact:
            self.opened += 1
            raise UnicodeError(f"of {name}@{version}")

    async with running(make_settings(model_store=store)) as client:
        its = services(client).registry
        its.repository = its._loader.repository = odd = Odd(store)
        for _ in range(3):
            assert_problem(await raw(client, zero, "?model=zero-article@2"), 503, "model-unavailable")
        assert odd.opened == 1


async def test_a_version_that_was_loaded_twice_is_retired_once(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """A request loads a version while the watcher loads it too: when it is replaced, one of the two is retired."""
    store = model_stores.copy(tmp_path / "store", 1, 2, 3, current=1)
    async with running(make_settings(model_store=store, deadline_ms=30_000, watch_seconds=300)) as client:
        its, gate = services(client).registry, threading.Event()
        counting = slowed(its, gate)
        model_stores.promote(store, 2)
        watched = asyncio.create_task(its.refresh())
        await until(lambda: counting.opened == 1)
        requested = asyncio.create_task(raw(client, zero, "?model=zero-article@2"))
        await until(lambda: its.extras._loads)
        gate.set()
        await watched
        assert (await requested).json()["version"] == 2
        second, first = its.extras.get("zero-article", 2), its.current("zero-article")
        assert second is not None
        assert first is not second
        model_stores.promote(store, 3)
        await its.refresh()
        assert its.extras.versions()[-1] is first
        await until(lambda: second.queue._closed is not None)
        assert (await raw(client, zero, "?model=zero-article@2")).status_code == 200


async def test_waiting_for_a_version_is_bounded(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """A request waits for the load of a version until its deadline; too many are rejected; later ones are served."""
    store = model_stores.copy(tmp_path / "store", 1, 2, 3, 4, current=1)
    query = "?model=zero-article@2"
    limits = {"deadline_ms": 300, "store_timeout_ms": 200, "queue_max_images": 4, "max_extra_versions": 2}
    chosen = make_settings(model_store=store, **limits)
    async with running(chosen) as client:
        gate = threading.Event()
        counting = slowed(services(client).registry, gate)
        replies = await asyncio.gather(*(raw(client, zero, query) for _ in range(10)))
        assert sorted(reply.status_code for reply in replies) == [503] * 6 + [504] * 4
        assert_problem(await raw(client, zero, "?model=zero-article@3"), 504, "deadline-exceeded")
        assert_problem(await raw(client, zero, "?model=zero-article@4"), 503, "overloaded")
        assert 'anomaly_problems_total{type="overloaded"} 7.0' in (await client.get("/metrics")).text
        assert (await raw(client, zero)).status_code == 200
        gate.set()

        async def loaded() -> bool:
            return (await raw(client, zero, query)).status_code == 200

        await until(loaded)
        assert counting.opened <= 2


class Hanging(Slow):
    """A repository on a file system that hangs until the test opens the gate. It counts the calls."""

    calls = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._repository, name)

        def hang(*given: Any) -> Any:
            self.calls += 1
            assert self._gate.wait(30)
            return found(*given)

        return hang if callable(found) else found


async def test_a_model_store_that_hangs_delays_only_the_requests_that_read_it(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """Reads get 504 at their deadline, and 503 if too many wait; all other routes work, and so do reads afterwards."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)
    chosen = make_settings(model_store=store, deadline_ms=30_000, queue_max_images=40)
    query = "?model=zero-article@2"
    paths = [
        "/models",
        "/models/zero-article/versions/1",
        "/models/zero-article/versions/2/calibration",
        "/models/zero-article/versions/1/report/model-card.md",
        "/v2/models/zero-article",
        "/v2/models/zero-article/versions/1/ready",
    ]
    async with running(chosen) as client:
        its, gate = services(client).registry, threading.Event()
        its.repository = its._loader.repository = Hanging(its.repository, gate)
        its.reads._deadline = 0.05
        try:
            assert_problem(await raw(client, zero, query), 504, "deadline-exceeded")
            await until(lambda: its.reads._worker.waiting == 0)  # the thread has begun the read
            replies = await asyncio.gather(*(raw(client, zero, query) for _ in range(60)))
            assert sorted(reply.status_code for reply in replies) == [503] * 20 + [504] * 40
            assert_problem(await raw(client, zero, query), 503, "overloaded")
            assert_problem(await client.get("/models"), 503, "overloaded")
            stored = await raw(client, zero)
            assert stored.status_code == 200
            panel = await client.get(f"{stored.json()['reconstruction']}?view=panel")
            assert panel.status_code == 200
            for path in ("/openapi.json", "/models/zero-article", "/models/zero-article/validity", "/readyz"):
                assert (await client.get(path)).status_code == 200, path
        finally:
            gate.set()
        await until(lambda: its.reads._worker.waiting == 0)
        its.reads._deadline = 30
        for path in paths:
            assert (await client.get(path)).status_code == 200, path
        gate.clear()
        its.reads._deadline = 0.05
        try:
            for path in paths:
                assert (await client.get(path)).status_code == 504, path
        finally:
            gate.set()


async def test_a_refusal_is_a_gauge(make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes) -> None:
    """`anomaly_model_version_rejected` is 1 from the first rejection on, and 0 again once the version loads."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)
    model_stores.put_bytes(store / "zero-article" / "2", b"not a module")
    async with running(make_settings(model_store=store, watch_seconds=300)) as client:

        async def refused() -> str:
            text = (await client.get("/metrics")).text
            return next(line for line in text.splitlines() if line.startswith("anomaly_model_version_rejected{"))

        assert await refused() == 'anomaly_model_version_rejected{model="zero-article"} 0.0'
        for version, value in ((2, 1), (1, 0)):
            model_stores.promote(store, version)
            await services(client).registry.refresh()
            assert await refused() == f'anomaly_model_version_rejected{{model="zero-article"}} {value}.0'


class Faulty:
    """A detector that applies a fault of the test to its results until `heal` is called."""

    def __init__(self, detector: Detector, fault: Callable[[Pictures], Pictures]) -> None:
        self._detector = detector
        self._fault: Callable[[Pictures], Pictures] | None = fault

    def draw(self, images: np.ndarray) -> Pictures:
        """Score a micro-batch, and apply the fault."""
        found = self._detector.draw(images)
        return found if self._fault is None else self._fault(found)

    def heal(self) -> None:
        """Return correct scores from now on."""
        self._fault = None


def break_model(client: httpx.AsyncClient, fault: Callable[[Pictures], Pictures]) -> Faulty:
    serving = services(client).registry.current("zero-article")
    assert serving is not None
    serving.detector = faulty = Faulty(serving.detector, fault)
    return faulty


def out_of_memory(_: Pictures) -> Pictures:
    raise RuntimeError("CUDA out of memory at /secret/path")


def not_a_number(found: Pictures) -> Pictures:
    return Pictures(np.full_like(found.mse, np.nan), found.planes, found.peak, found.reason)


def a_guard_without_a_name(found: Pictures) -> Pictures:
    return Pictures(found.mse, found.planes, found.peak, np.full_like(found.reason, 99))


@pytest.mark.parametrize("fault", [out_of_memory, a_guard_without_a_name])
async def test_a_failing_model_gives_500_becomes_unready_and_heals(
    make_settings: Callable[..., Settings], zero: bytes, fault: Callable[[Pictures], Pictures]
) -> None:
    """A failed pass or unknown guard code gets 500 without details; after three, /readyz returns 503 for a time."""
    async with running(make_settings(watch_seconds=0.2)) as client:
        faulty = break_model(client, fault)
        for _ in range(3):
            document = assert_problem(await raw(client, zero), 500, "internal-error")
            assert "secret" not in str(document)
            assert "memory" not in str(document)
        assert (await client.get("/readyz")).status_code == 503
        version = services(client).registry.current("zero-article")
        assert version is not None
        await version.probe()
        assert version.failures, "the probe finds the same fault as the scores"
        faulty.heal()

        async def ready() -> bool:
            return (await client.get("/readyz")).status_code == 200

        await until(ready)
        assert (await raw(client, zero)).status_code == 200


async def test_a_model_heals_while_the_model_store_hangs(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """A model that works again becomes ready by a probe, although the watcher never gets a reply; both loops end."""
    async with running(make_settings(watch_seconds=0.05)) as client:
        its, gate = services(client).registry, threading.Event()
        its.repository = its._loader.repository = hanging = Hanging(its.repository, gate)
        try:
            await until(lambda: hanging.calls)
            faulty = break_model(client, out_of_memory)
            for _ in range(3):
                assert_problem(await raw(client, zero), 500, "internal-error")
            assert (await client.get("/readyz")).status_code == 503
            faulty.heal()

            async def ready() -> bool:
                return (await client.get("/readyz")).status_code == 200

            await until(ready)
            assert (await raw(client, zero)).status_code == 200
            assert hanging.calls == 1
        finally:
            gate.set()
    assert [loop.cancelled() for loop in its._loops] == [True, True]


async def test_the_log_of_a_failure_names_a_place_and_nothing_else(
    client: httpx.AsyncClient, zero: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log lines of a 500 contain the error's type and module:line, but not its message, a path or a stack."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("at /secret/path")

    def overflow(*_: object) -> None:
        raise OverflowError("at /secret/path")

    with monkeypatch.context() as context:
        context.setattr(Calibration, "p_values", overflow)  # after the forward pass, in the inference thread
        assert_problem(await raw(client, zero), 500, "internal-error")
    break_model(client, out_of_memory)
    assert_problem(await raw(client, zero), 500, "internal-error")
    monkeypatch.setattr(services(client).registry, "names", fail)
    assert_problem(await client.get("/models"), 500, "internal-error")
    lines = [JsonFormatter().format(record) for record in caplog.records if record.levelno >= logging.ERROR]
    places = {line["error"]: line["at"] for line in map(json.loads, lines) if "error" in line}
    assert set(places) == {"OverflowError", "RuntimeError", "ZeroDivisionError"}
    assert all(re.fullmatch(r"app(\.\w+)+:\d+", place) for place in places.values()), places
    for line in lines:
        assert not re.search(r"secret|memory|/|Traceback|File", line), line


async def test_a_score_that_is_not_a_number_is_never_normal(
    make_settings: Callable[..., Settings], zero: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """NaN is above no threshold: it is an error instead of the verdict normal, and counts as a failed forward pass."""
    async with running(make_settings(watch_seconds=60)) as client:  # no probe, which would fail too
        break_model(client, not_a_number)
        assert_problem(await raw(client, zero), 500, "internal-error")
        assert "anomaly_forward_pass_failures_total 1.0" in (await client.get("/metrics")).text
    (line,) = [record for record in caplog.records if "not finite" in record.getMessage()]
    assert (line.levelname, line.__dict__["model"], line.__dict__["images"]) == ("ERROR", "zero-article", 1)


async def test_only_a_version_that_fails_for_its_golden_image_becomes_unready(
    make_settings: Callable[..., Settings], zero: bytes
) -> None:
    """An image whose score is NaN makes no version unready; a version whose probes give NaN becomes so, and heals."""
    async with running(make_settings(watch_seconds=0.05)) as client:
        serving = services(client).registry.current("zero-article")
        assert serving is not None
        golden = serving._golden.tobytes()

        def not_a_number_unless_golden(found: Pictures) -> Pictures:
            return found if found.planes[0, 0].tobytes() == golden else not_a_number(found)

        faulty = break_model(client, not_a_number_unless_golden)
        for _ in range(5):
            assert_problem(await raw(client, zero), 500, "internal-error")
        await until(lambda: not serving.suspect)
        assert (await client.get("/readyz")).status_code == 200
        faulty._fault = not_a_number
        assert_problem(await raw(client, zero), 500, "internal-error")

        async def status() -> int:
            return (await client.get("/readyz")).status_code

        async def unready() -> bool:
            return await status() == 503

        async def ready() -> bool:
            return await status() == 200

        await until(unready)
        faulty.heal()
        await until(ready)


async def test_a_hanging_model_is_504_and_unready(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """While the inference thread hangs, requests get 504 at their deadline, /livez returns 200 and /readyz 503."""
    gate = threading.Event()

    def hang(found: Pictures) -> Pictures:
        gate.wait(30)
        return found

    async with running(make_settings(deadline_ms=1000)) as client:
        faulty = break_model(client, hang)
        first, second = await asyncio.gather(raw(client, zero), raw(client, zero))
        assert_problem(first, 504, "deadline-exceeded")
        assert_problem(second, 504, "deadline-exceeded")
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
        faulty.heal()
        gate.set()

        async def ready() -> bool:
            return (await client.get("/readyz")).status_code == 200

        await until(ready)
        assert (await raw(client, zero)).status_code == 200


async def test_stopping_answers_what_was_accepted(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """Requests accepted before the stop get their scores while the application shuts down."""
    gate = threading.Event()
    begun: list[int] = []

    def wait(found: Pictures) -> Pictures:
        begun.append(len(found.mse))
        gate.wait(30)
        return found

    async with running(make_settings()) as client:
        break_model(client, wait)
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(raw(client, zero)) for _ in range(20)]
        await until(lambda: sum(begun) + services(client).registry.waiting == 20)
        asyncio.get_running_loop().call_later(0.2, gate.set)
    assert [task.result().status_code for task in tasks] == [200] * 20


async def test_a_promotion_reuses_loaded_versions(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes
) -> None:
    """A version that a request named becomes the current one without a second load, and so does the one before it."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)
    async with running(make_settings(model_store=store, watch_seconds=300, deadline_ms=30_000)) as client:
        its = services(client).registry
        gate = threading.Event()
        gate.set()
        counting = slowed(its, gate)
        assert (await raw(client, zero, "?model=zero-article@2")).json()["version"] == 2
        for current in (2, 1, 2):
            model_stores.promote(store, current)
            await its.refresh()
            assert (await raw(client, zero)).json()["version"] == current
            assert (await raw(client, zero, f"?model=zero-article@{3 - current}")).json()["version"] == 3 - current
        assert counting.opened == 1


async def test_a_current_that_blocks_does_not_stop_the_watcher(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """A FIFO as CURRENT rejects its model with a reason, and the watcher loads the next version afterwards."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)
    async with running(make_settings(model_store=store)) as client:
        current = store / "zero-article" / "CURRENT"
        current.unlink()
        os.mkfifo(current)
        reason = services(client).registry.rejection
        await until(lambda: reason("zero-article") == "zero-article: CURRENT cannot be read")
        assert await version_of(client) == 1
        model_stores.promote(store, 2)

        async def switched() -> bool:
            return await version_of(client) == 2

        await until(switched)
        assert reason("zero-article") is None


async def test_a_model_whose_folder_cannot_be_read_does_not_stop_the_watcher(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """It is rejected with a reason, and new versions of the other models are loaded."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)
    async with running(make_settings(model_store=store, watch_seconds=300)) as client:
        model_stores.link(store / "aaa", model_stores.UNREADABLE)
        model_stores.promote(store, 2)
        await services(client).registry.refresh()
        assert services(client).registry.rejection("aaa") == "aaa: CURRENT cannot be read"
        assert await version_of(client) == 2
