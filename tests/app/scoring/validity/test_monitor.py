"""The validity monitor in the service: compared images, persistence, and the values of the route and the metrics."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from app.inference.version import ModelVersion
from app.models.calibration import Calibration
from app.scoring.validity.monitor import ValidityMonitor
from app.scoring.validity.stream import Stream
from app.settings import Settings
from app.stores import StoreError
from app.stores.sqlite import SqliteStore
from tests import model_stores, pngs
from tests.app.http.test_batch import bulk, digits
from tests.conftest import MODEL_STORE, Server, running, services
from tests.requests import assert_problem, raw
from tests.training.commands import run
from tests.waiting import until, wait_until

VALIDITY = "/models/zero-article/validity"


def version_of(client: httpx.AsyncClient) -> ModelVersion:
    version = services(client).registry.current("zero-article")
    assert version is not None
    return version


def like_calibration(version: ModelVersion, count: int, power: float = 1.0) -> np.ndarray:
    """Return calibration scores drawn with replacement; with a power above 1, high scores are more frequent."""
    calibration = np.asarray(version.calibration.scores)
    ranks = np.random.default_rng(0).beta(power, 1, count)
    return calibration[(ranks * len(calibration)).astype(int)]


def hold_up_streams(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Hold up each call that adds scores to a stream. The events say that one has begun, and that it may go on."""
    add, has_begun, may_go_on = Stream.add, threading.Event(), threading.Event()

    def held_up(stream: Stream, scores: np.ndarray, now: float) -> None:
        has_begun.set()
        assert may_go_on.wait(10)
        add(stream, scores, now)

    monkeypatch.setattr(Stream, "add", held_up)
    return has_begun, may_go_on


async def test_single_and_batch_scores_count(make_settings: Callable[..., Settings], zero: bytes, six: bytes) -> None:
    """Each scored image counts once; rejected images and images that a guard decided do not."""
    async with running(make_settings(model_store=MODEL_STORE, default_model="zero")) as client:
        singles = [
            (await raw(client, image)).json() for image in (zero, six, zero, pngs.plain(np.zeros((28, 28), np.uint8)))
        ]
        scored = (await bulk(client, np.concatenate([digits(300), np.zeros((2, 28, 28), np.uint8)]))).json()["items"]
        assert [item["reason"] for item in (singles + scored)[-2:]] == ["empty", "empty"]
        assert singles[-1]["reason"] == "empty"
        assert_problem(await raw(client, b"no image"), 422, "not-a-png")
        counted = [item for item in singles + scored if item["reason"] is None]
        found = (await client.get("/models/zero/validity")).json()
        manifest = (await client.get("/models/zero")).json()
    assert found["images"] == len(counted) > 3
    assert found["anomalous"]["count"] == sum(item["is_anomaly"] for item in counted)
    assert sum(found["scores"]["recent"]) == len(counted)
    assert sum(found["scores"]["calibration"]) == manifest["calibration"]["n"]
    assert len(found["scores"]["edges"]) == len(found["scores"]["recent"]) + 1


async def test_a_version_without_images_is_valid(client: httpx.AsyncClient) -> None:
    """Before the first image there is no evidence."""
    found = (await client.get(VALIDITY)).json()
    assert (found["status"], found["images"], found["p_value"], found["evidence_log10"]) == ("valid", 0, 1.0, 0.0)
    assert found["anomalous"]["share"] is None
    assert (found["since"], found["updated"]) == (None, None)
    assert_problem(await client.get("/models/none/validity"), 404, "model-not-found")
    assert_problem(await client.get(f"{VALIDITY}?since=1"), 422, "invalid-parameter")


async def test_a_change_is_reported(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """When scores below the threshold rise, the status, the metrics and the log say so."""
    monitor, version = services(client).validity, version_of(client)
    monitor.add(version, like_calibration(version, 4000, power=3.0))
    found = (await client.get(VALIDITY)).json()
    assert found["status"] == "changed"
    assert found["peak_log10"] >= found["limit_log10"] == 2.0
    assert found["p_value"] <= 0.01
    assert 0 < found["changed_after_images"] < 4000
    assert found["changed_at"] is not None
    assert found["quantiles"][1]["recent"] > found["quantiles"][1]["calibration"]
    (line,) = [line for line in caplog.records if "no longer resemble" in line.message]
    assert line.images == found["changed_after_images"]  # type: ignore[attr-defined]
    page = (await client.get("/models/zero-article", headers={"accept": "text/html"})).text
    assert f"changed after {found['changed_after_images']:,} of 4,000 images (p = " in page
    await until(lambda: b'validity_changed{model="zero-article"} 1.0' in services(client).metrics.exposition())


async def test_a_model_that_was_trained_again_has_its_own_stream(client: httpx.AsyncClient) -> None:
    """After a model was deleted, its version 1 may be another one: it is compared with its own calibration."""
    monitor, version = services(client).validity, version_of(client)
    monitor.add(version, like_calibration(version, 100))
    assert (await monitor.report(version)).images == 100
    other = {
        "files": {**version.manifest.files, "calibration.npy": "0" * 64},
        "threshold": version.manifest.threshold + 5,
    }
    version.manifest = version.manifest.model_copy(update=other)
    version.calibration = Calibration(np.asarray(version.calibration.scores) + 5)
    assert (await monitor.report(version)).images == 0
    monitor.add(version, like_calibration(version, 200))
    report = await monitor.report(version)
    assert (report.images, report.status) == (200, "valid")


async def test_the_same_image_again_and_again_is_a_change(client: httpx.AsyncClient, zero: bytes) -> None:
    """Images must be exchangeable: a few dozen copies of one normal image change the status, as the docs say."""
    for _ in range(50):
        await raw(client, zero)
    assert (await client.get(VALIDITY)).json()["status"] == "changed"


async def test_the_model_card_has_the_status(client: httpx.AsyncClient) -> None:
    """The card as a page contains the status and a link to the figures."""
    await bulk(client, digits(3))
    page = (await client.get("/models/zero-article", headers={"accept": "text/html"})).text
    assert '<a href="zero-article/validity">valid after 3 images (p = ' in page


async def test_only_anomalies_are_watched(client: httpx.AsyncClient) -> None:
    """If nearly all images are anomalous, no image is left to compare, and the status is not `valid`."""
    monitor, version = services(client).validity, version_of(client)
    monitor.add(version, np.full(500, 2 * version.manifest.threshold))
    found = (await client.get(VALIDITY)).json()
    assert found["status"] == "watch"
    assert "more than half" in found["reason"]
    assert found["anomalous"]["low"] > 0.9


async def test_the_limit_is_a_setting(make_settings: Callable[..., Settings]) -> None:
    """A higher `ANOMALY_VALIDITY_LIMIT` needs more evidence."""
    async with running(make_settings(validity_limit=1e9)) as client:
        version = version_of(client)
        services(client).validity.add(version, like_calibration(version, 250, power=1.5))
        found = (await client.get(VALIDITY)).json()
        assert found["limit_log10"] == 9.0
        assert found["status"] != "changed"


async def test_streams_survive_restarts_and_version_switches(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """A stream continues after a restart; each version has a stream of its own, which it continues when it returns."""
    store = model_stores.copy(tmp_path / "models", 1, 2, current=1)
    settings = make_settings(model_store=store)
    async with running(settings) as client:
        await bulk(client, digits(100))  # the end of the service stores them
    async with running(settings) as client:
        assert (await client.get(VALIDITY)).json()["images"] == 100
        await bulk(client, digits(10))
        model_stores.promote(store, 2)
        await until(lambda: version_of(client).manifest.version == 2)
        await bulk(client, digits(20))
        found = (await client.get(VALIDITY)).json()
        assert (found["version"], found["images"]) == (2, 20)
        model_stores.promote(store, 1)
        await until(lambda: version_of(client).manifest.version == 1)
        assert (await client.get(VALIDITY)).json()["images"] == 110


@pytest.mark.process
async def test_a_version_with_the_same_threshold_begins_a_new_stream(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """`calibrate` with the version's own rate changes nothing but the number, so `changed` ends and stays recorded."""
    store = model_stores.copy(tmp_path / "models", 1)
    async with running(make_settings(model_store=store)) as client:
        old = version_of(client)
        services(client).validity.add(old, like_calibration(old, 4000, power=3.0))
        assert (await client.get(VALIDITY)).json()["status"] == "changed"
        arguments = ("calibrate", "zero-article", "--alpha", old.manifest.alpha, "--promote", "--model-store", store)
        code, _, errors = await asyncio.to_thread(run, *arguments)
        assert code == 0, errors
        await until(lambda: version_of(client).manifest.version == 2)
        found = (await client.get(VALIDITY)).json()
        assert (found["status"], found["images"], found["version"]) == ("valid", 0, 2)
        assert version_of(client).manifest.threshold == old.manifest.threshold
        recalibrated = version_of(client).manifest.calibration.recalibrated
        assert recalibrated is not None
        assert recalibrated.version == 1
        model_stores.promote(store, 1)
        await until(lambda: version_of(client).manifest.version == 1)
        assert (await client.get(VALIDITY)).json()["status"] == "changed"


async def test_images_are_counted_within_a_second(client: httpx.AsyncClient) -> None:
    """The monitor stores waiting images by itself."""
    await bulk(client, digits(30))
    await until(lambda: b'validity_images{model="zero-article"} 30.0' in services(client).metrics.exposition())


async def test_a_report_counts_images_that_are_being_stored(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that begins while the monitor stores images waits for them."""
    monitor, version, reconstructions = services(client).validity, version_of(client), services(client).reconstructions
    has_begun, may_go_on = hold_up_streams(monkeypatch)
    monitor.add(version, like_calibration(version, 7))
    flush = asyncio.create_task(monitor.flush())
    assert await asyncio.to_thread(has_begun.wait, 10)
    report = asyncio.create_task(monitor.report(version))
    for _ in range(3):
        await reconstructions.read_state("none")  # the report begins, and would read the stream if it did not wait
    may_go_on.set()
    assert (await report).images == 7
    await flush


async def test_the_end_loses_no_images_that_are_being_stored(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the service ends while the monitor stores images, they are stored, once."""
    found, version = services(client), version_of(client)
    monitor = ValidityMonitor(found.reconstructions, found.metrics, limit=100.0)
    has_begun, may_go_on = hold_up_streams(monkeypatch)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(monitor.watch(found.registry))
        monitor.add(version, like_calibration(version, 7))
        assert await asyncio.to_thread(has_begun.wait, 10)
        end = asyncio.create_task(stack.aclose())
        await found.reconstructions.read_state("none")  # meanwhile, the end begins
        may_go_on.set()
        await end
    assert (await monitor.report(version)).images == 7


async def test_a_client_that_leaves_loses_no_images(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a report is cancelled while it stores images, they are stored, once."""
    monitor, version = services(client).validity, version_of(client)
    has_begun, may_go_on = hold_up_streams(monkeypatch)
    monitor.add(version, like_calibration(version, 7))
    report = asyncio.create_task(monitor.report(version))
    assert await asyncio.to_thread(has_begun.wait, 10)
    report.cancel()
    with pytest.raises(asyncio.CancelledError):
        await report
    may_go_on.set()
    assert (await monitor.report(version)).images == 7


async def test_a_damaged_stream_begins_again(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """A changed bit of a stored stream is noticed once, and the next images are counted from zero."""
    monitor, version, reconstructions = services(client).validity, version_of(client), services(client).reconstructions
    monitor.add(version, like_calibration(version, 20))
    assert (await monitor.report(version)).images == 20
    (watched,) = monitor._watched.values()
    stored = await reconstructions.read_state(watched.key)
    assert stored is not None
    assert await reconstructions.swap_state(watched.key, stored, stored.replace(b'"images":20', b'"images":28'))
    monitor.add(version, like_calibration(version, 3))
    for _ in range(2):
        assert (await client.get(VALIDITY)).json()["images"] == 3
    assert caplog.text.count("a damaged stream of scores was found") == 1
    assert b"anomaly_reconstruction_store_damaged_total 1.0" in services(client).metrics.exposition()


async def test_a_failing_store_counts_no_image_twice(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the state cannot be read, images wait. If it is unknown whether they were stored, they are dropped."""
    monitor, version = services(client).validity, version_of(client)

    def failing(*_: object) -> bytes | None:
        raise StoreError("down")

    def stored_without_reply(store: SqliteStore, *given: object) -> bool:
        swap(store, *given)
        raise StoreError("no reply")

    await client.get(VALIDITY)
    with monkeypatch.context() as patched:
        patched.setattr(SqliteStore, "read_state", failing)
        monitor.add(version, like_calibration(version, 7))
        assert_problem(await client.get(VALIDITY), 503, "store-unavailable")
    await services(client).reconstructions.check()
    assert (await client.get(VALIDITY)).json()["images"] == 7
    swap = SqliteStore.swap_state
    with monkeypatch.context() as patched:
        patched.setattr(SqliteStore, "swap_state", stored_without_reply)
        monitor.add(version, like_calibration(version, 5))
        await monitor.flush()
    await services(client).reconstructions.check()
    assert (await client.get(VALIDITY)).json()["images"] == 12
    assert services(client).metrics.registry.get_sample_value("anomaly_validity_images_dropped_total") == 5.0


async def test_waiting_images_are_bounded(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the store is down, further images are dropped and counted."""
    monitor, version = services(client).validity, version_of(client)
    monkeypatch.setattr("app.scoring.validity.monitor._MAX_WAITING", 1000)
    monitor.add(version, like_calibration(version, 900))
    monitor.add(version, like_calibration(version, 200))
    assert services(client).metrics.registry.get_sample_value("anomaly_validity_images_dropped_total") == 200.0
    assert (await client.get(VALIDITY)).json()["images"] == 900


@pytest.mark.process
def test_a_killed_process_loses_at_most_a_second(
    make_server: Callable[..., Server], zero: bytes, article_alone: Path
) -> None:
    """After `kill -9` of two workers, the stream of both continues; no image counts twice."""
    environment = {"ANOMALY_MODEL_STORE": str(article_alone), "ANOMALY_DEFAULT_MODEL": "zero-article"}
    server = make_server(ANOMALY_WORKERS="2", **environment).start()

    def images() -> int:
        return int(server.get(VALIDITY).json()["images"])

    def send(count: int) -> None:
        for _ in range(count):  # a connection each, so that both workers get some
            assert server.post("/score", content=zero, headers={"content-type": "image/png"}).status_code == 200

    send(40)
    wait_until(lambda: images() == 40, 10, describe=server.log)
    server.kill()
    server = make_server(**environment).start()  # with the same store
    assert images() == 40
    send(10)
    wait_until(lambda: images() == 50, 10, describe=server.log)
