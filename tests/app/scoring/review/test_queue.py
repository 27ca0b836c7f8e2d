"""The review queue: the choice of images and its probabilities, and the service with and without a working folder."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from app.images import png
from app.models.manifest import Manifest
from app.models.repository import Repository
from app.scoring.review.folder import ReviewFolder
from app.scoring.review.queue import RESERVOIR, ReviewQueue
from app.scoring.verdict import Verdict
from app.settings import Settings
from app.telemetry.metrics import Metrics
from tests import pngs
from tests.app.http.test_batch import bulk, digits
from tests.conftest import MODEL_STORE, Server, running
from tests.infer_requests import json_request
from tests.requests import raw
from tests.waiting import wait_until

IMAGE = pngs.gradient(28).tobytes()


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """Return the manifest of a shipped version."""
    return Repository(MODEL_STORE).manifest("zero", 1)


def lines(root: Path) -> list[dict[str, Any]]:
    """Return the lines of all images in the queue."""
    return [json.loads(path.read_bytes()) for path in sorted((root / "queue").rglob("*.json"))]


def queue_at(root: Path, metrics: Metrics | None = None, *, share: float, window: float = 1e6) -> ReviewQueue:
    folder = ReviewFolder(root, 10_000, 10**8)
    generator = random.Random(1)
    return ReviewQueue(folder, metrics or Metrics(), share=share, near=3, window=window, generator=generator)


def test_each_image_has_one_reason(tmp_path: Path, manifest: Manifest) -> None:
    """Without the share, only anomalous images and images near the version's own threshold are written."""
    queue = queue_at(tmp_path, share=0)
    above, below, alpha = manifest.threshold * 1.1, manifest.threshold * 0.9, manifest.alpha
    queue.offer(manifest, IMAGE, Verdict(above, alpha / 2, True, None), "a" * 44)
    queue.offer(manifest, memoryview(IMAGE), Verdict(below, 3 * alpha, False, None))
    queue.offer(manifest, IMAGE, Verdict(below, 3.01 * alpha, False, None))
    queue.offer(manifest, IMAGE, Verdict(9e9, alpha / 2, True, "empty"))
    # A request with another false-positive rate has another verdict, and the same place in the sample.
    queue.offer(manifest, IMAGE, Verdict(below, 0.2, True, None))
    assert queue.close(30)
    found = lines(tmp_path)
    assert Counter(line["chosen"] for line in found) == {"anomalous": 2, "near": 1}
    line = next(line for line in found if line["id"] == "a" * 44)
    time = datetime.fromisoformat(line.pop("time"))
    assert datetime.now(UTC) - timedelta(minutes=5) < time <= datetime.now(UTC)
    assert line == {
        "id": "a" * 44, "model": "zero", "version": 1, "mse": above, "p_value": alpha / 2,
        "threshold": manifest.threshold, "alpha": alpha, "is_anomaly": True, "reason": None, "chosen": "anomalous",
        "probability": 1.0,
    }  # fmt: skip
    assert next(line for line in found if line["reason"] == "empty")["mse"] == 9e9
    for path in (tmp_path / "queue").rglob("*.png"):
        assert png.decode(path.read_bytes()) == IMAGE
        assert png.is_prepared(path.read_bytes())


def test_the_probability_is_that_of_the_sample(tmp_path: Path, manifest: Manifest) -> None:
    """Among 20,000 images of known groups, each line contains the share of its group that was written."""
    queue = queue_at(tmp_path, share=0.1)
    for number in range(20_000):
        mse, p_value = (manifest.threshold * 2, 0.001) if number % 4 == 0 else (manifest.threshold / 2, 0.5)
        queue.offer(manifest, IMAGE, Verdict(mse, p_value, number % 4 == 0, None))
    assert queue.close(30)
    found = lines(tmp_path)
    assert Counter(line["chosen"] for line in found) == {"random": RESERVOIR, "anomalous": RESERVOIR}
    for line in found:
        size = 20_000 if line["chosen"] == "random" else 5_000
        assert line["probability"] == pytest.approx(RESERVOIR / size, rel=0.05)


def test_each_image_of_a_window_has_the_same_chance(tmp_path: Path, manifest: Manifest) -> None:
    """Over 60 windows of 100 anomalies each, all places in a window are chosen equally often."""
    counts = np.zeros(100)
    for number in range(60):
        queue = ReviewQueue(
            ReviewFolder(tmp_path / "q", 1000, 10**8), Metrics(), share=0, near=3, window=1e6,
            generator=random.Random(number),
        )  # fmt: skip
        for place in range(100):
            queue.offer(manifest, IMAGE, Verdict(1e3 + place, 0.001, True, None))
        assert queue.close(30)
        counts[[int(line["mse"] - 1e3) for line in lines(tmp_path / "q")]] += 1
        shutil.rmtree(tmp_path / "q")
    assert counts.sum() == 60 * RESERVOIR
    expected = 60 * RESERVOIR / 100
    assert ((counts - expected) ** 2 / expected).sum() < 160  # chi-square with 99 degrees of freedom: p < 0.0001


def test_windows_follow_each_other(tmp_path: Path, manifest: Manifest) -> None:
    """Images are written while the queue is open, window by window, and counted by reason."""
    metrics = Metrics()
    queue = queue_at(tmp_path, metrics, share=0, window=0.01)
    for number in range(3):
        queue.offer(manifest, IMAGE, Verdict(1e3, 0.001, True, None))
        wait_until(lambda number=number: len(lines(tmp_path)) == number + 1)  # type: ignore[misc]
    assert queue.close(30)
    queue.offer(manifest, IMAGE, Verdict(1e3, 0.001, True, None))
    assert len(lines(tmp_path)) == 3
    sample = metrics.registry.get_sample_value("anomaly_review_images_total", {"chosen": "anomalous"})
    assert sample == 3


def test_a_folder_that_fails_costs_images_only(
    tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    """If the folder cannot be written, images are counted, one warning is logged, and a later window is written."""
    metrics = Metrics()
    queue = queue_at(tmp_path / "review", metrics, share=0, window=0.01)
    shutil.rmtree(tmp_path / "review")
    (tmp_path / "review").touch()

    def dropped() -> float | None:
        return metrics.registry.get_sample_value("anomaly_review_images_dropped_total")

    for number in range(3):
        queue.offer(manifest, IMAGE, Verdict(1e3, 0.001, True, None))
        wait_until(lambda number=number: dropped() == number + 1)  # type: ignore[misc]
    (tmp_path / "review").unlink()
    queue.offer(manifest, IMAGE, Verdict(1e3, 0.001, True, None))
    assert queue.close(30)
    assert len(lines(tmp_path / "review")) == 1
    assert [record.message for record in caplog.records] == ["images could not be written to the review queue"]


def test_only_the_images_that_failed_are_dropped(
    tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    """If one group cannot be written, the images of the other groups are counted as written; the log names the file."""
    metrics = Metrics()
    queue = queue_at(tmp_path, metrics, share=0)
    (tmp_path / "queue" / "zero").mkdir()
    (tmp_path / "queue" / "zero" / "anomalous").touch()
    for mse, p_value in ((1e3, 0.001), (0.0, manifest.alpha), (0.0, manifest.alpha)):
        queue.offer(manifest, IMAGE, Verdict(mse, p_value, True, None))
    assert queue.close(30)
    sample = metrics.registry.get_sample_value
    assert sample("anomaly_review_images_total", {"chosen": "near"}) == 2
    assert sample("anomaly_review_images_total", {"chosen": "anomalous"}) is None
    assert sample("anomaly_review_images_dropped_total") == 1
    [record] = caplog.records
    assert (record.error, record.file, record.images) == ("Not a directory", "queue/zero/anomalous", 1)  # type: ignore[attr-defined]


def test_a_thread_that_cannot_be_started_costs_images_only(
    tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the system starts no thread, images are counted, one warning is logged, and a later image is written."""
    metrics = Metrics()
    queue = queue_at(tmp_path, metrics, share=0)

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        for _ in range(3):
            queue.offer(manifest, IMAGE, Verdict(1e3, 0.001, True, None))
    assert metrics.registry.get_sample_value("anomaly_review_images_dropped_total") == 3
    queue.offer(manifest, IMAGE, Verdict(1e3, 0.001, True, None))
    assert queue.close(30)
    assert len(lines(tmp_path)) == 1
    [record] = caplog.records
    assert record.message == "images could not be written to the review queue"
    assert record.error == "can't start new thread"  # type: ignore[attr-defined]


async def test_all_routes_offer_their_images(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    """The queue gets the pixels of single scores, batches and the inference protocol, and nothing else."""
    images = digits(16)
    settings = make_settings(review_dir=tmp_path / "review", review_share=1.0, microbatch_max_size=2)
    async with running(settings) as client:
        single = (await raw(client, pngs.plain(images[0]))).json()
        stored = (await bulk(client, images[1:4], query="?store=true")).json()["items"]
        assert (await bulk(client, images[4:9])).status_code == 200
        assert (await raw(client, b"no image")).status_code == 422
        for part in (images[9:11], images[11:16]):
            reply = await client.post("/v2/models/zero-article/infer", json=json_request(part))
            assert reply.status_code == 200, reply.text
    found = lines(tmp_path / "review")
    assert {line["chosen"] for line in found} == {"random"}
    written = {path.stem: png.decode(path.read_bytes()) for path in (tmp_path / "review").rglob("*.png")}
    assert sorted(written.values()) == sorted(image.tobytes() for image in images)
    by_id = {line["id"]: line for line in found}
    for reply, image in zip([single, *stored], images, strict=False):
        assert by_id[reply["id"]]["mse"] == reply["mse"]
        assert written[reply["id"]] == image.tobytes()


async def test_without_a_folder_there_is_no_queue(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """By default, the service starts no thread for reviews."""
    async with running(make_settings()) as client:
        assert (await raw(client, zero)).status_code == 200
        assert "review" not in {thread.name for thread in threading.enumerate()}


def test_workers_share_one_queue(make_server: Callable[..., Server], zero: bytes, tmp_path: Path) -> None:
    """Two workers write to one folder, and a shutdown writes what has not been written."""
    root = tmp_path / "review"
    server = make_server(ANOMALY_WORKERS="2", ANOMALY_REVIEW_DIR=str(root), ANOMALY_REVIEW_SHARE="1").start()
    headers = {"content-type": "image/png"}
    ids = {server.post("/score", content=zero, headers=headers, timeout=30).json()["id"] for _ in range(15)}
    assert server.stop() == 0
    assert {line["id"] for line in lines(root)} == ids


def test_a_folder_that_cannot_be_made_prevents_the_start(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """The service ends at once, with one line."""
    server = make_server(ANOMALY_REVIEW_DIR=str(tmp_path / "missing" / "review")).start(wait=False)
    assert server.process is not None
    assert server.process.wait(60) == 2
    assert server.log() == (
        f"cannot start: the folder of the review queue, {tmp_path}/missing/review, cannot be used: "
        "No such file or directory\n"
    )


def test_an_empty_path_is_no_folder() -> None:
    """An empty variable does not mean the working directory."""
    with pytest.raises(ValidationError, match="must be the path of a folder"):
        Settings(review_dir="")
