"""From detections to replies: contents of a reply, stored record, and the problem for a score that is not finite."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from app.http.schemas import ScoreResponse
from app.inference.version import Detection
from app.models.calibration import Calibration
from app.problems import InternalError
from app.scoring.score import Reply, Scorer, ScoreRequest
from app.scoring.validity.monitor import ValidityMonitor
from app.scoring.verdict import DecisionRule, Fitted
from app.stores.reconstructions import Reconstructions
from app.stores.records import new_ids, unpack
from app.stores.sqlite import SqliteStore
from app.telemetry.metrics import Metrics

VERSION: Any = SimpleNamespace(
    manifest=SimpleNamespace(name="zero", version=3, threshold=0.25, files={"calibration.npy": "0" * 64}),
    calibration=Calibration([0.1, 0.2, 0.3, 0.4]),
)
RULE = DecisionRule(VERSION.manifest, VERSION.calibration, threshold=0.25, alpha=0.4)
PLAIN: dict[str, Any] = {"rule": RULE, "owner": None, "fitted": None, "include_reconstruction": False}
"""What a request without parameters asks for."""


def detection(mse: float, reason: str | None = None) -> Detection:
    """Return a detection whose pictures are easy to identify."""
    return Detection(mse, reason, bytes([1]) * 784 + bytes([2]) * 784 + bytes([3]) * 784, 0.5, 0.001, 0.002)


@pytest.fixture
async def kept(tmp_path):
    """Yield a store of the test's own."""
    store = SqliteStore(tmp_path / "r.db", ttl_seconds=60, max_entries=100)
    kept = Reconstructions(store, Metrics(), timeout=5, max_waiting=100)
    await kept.check()
    yield kept
    await kept.aclose()


async def finished(kept: Reconstructions, *pairs: tuple[dict[str, Any], Detection]) -> list[Any]:
    """Finish one micro-batch, in another thread."""
    loop = asyncio.get_running_loop()
    requests = [ScoreRequest(image=b"", future=loop.create_future(), **wanted) for wanted, _ in pairs]
    made = loop.create_future()

    def done(make: Callable[[], Sequence[Any]]) -> None:
        loop.call_soon_threadsafe(lambda: made.set_result(make()))

    scorer = Scorer(kept, Metrics(), "/prefix", ValidityMonitor(kept, Metrics(), 100))
    await asyncio.to_thread(scorer.on_batch_done, VERSION, requests, [found for _, found in pairs], done)
    return list(await made)


async def test_a_reply_is_what_the_schema_says(kept):
    """A reply has every member of the schema, in order, and its link contains the prefix and the stored id."""
    ((reply,)) = await finished(kept, (PLAIN, detection(0.3)))
    document = json.loads(reply.body)
    known = ScoreResponse.model_validate_json(reply.body)
    assert list(document) == [name for name in ScoreResponse.model_fields if name in document]
    assert set(ScoreResponse.model_fields) - set(document) == {"fitted", "reconstruction_png"}
    assert (known.mse, known.threshold, known.alpha, known.p_value, known.is_anomaly) == (0.3, 0.25, 0.4, 0.6, True)
    assert known.reconstruction == f"/prefix/reconstruction/{known.id}"
    record = await kept.find(known.id)
    assert (record.reply, record.pixels) == (reply.body, detection(0.3).pixels)


async def test_each_order_has_its_own_reply(kept):
    """Thresholds, guards, fits and embedded pictures of one micro-batch do not mix."""
    fitted = Fitted(fit="mnist", source="request", inverted=True, crop=(1, 2, 3, 4))
    replies = await finished(
        kept,
        (PLAIN, detection(0.2)),
        ({**PLAIN, "rule": replace(RULE, threshold=0.1, alpha=0.8)}, detection(0.2)),
        ({**PLAIN, "fitted": fitted}, detection(4.0, "empty")),
        ({**PLAIN, "include_reconstruction": True}, detection(0.2)),
    )
    said = [json.loads(reply.body) for reply in replies]
    assert [each["is_anomaly"] for each in said] == [False, True, True, False]
    assert [each["alpha"] for each in said] == [0.4, 0.8, 0.4, 0.4]
    assert [each["reason"] for each in said] == [None, None, "empty", None]
    assert [each.get("fitted") for each in said] == [
        None,
        None,
        {"fit": "mnist", "source": "request", "inverted": True, "crop": [1, 2, 3, 4]},
        None,
    ]
    assert ["reconstruction_png" in each for each in said] == [False, False, False, True]
    assert "reconstruction_png" not in json.loads((await kept.find(said[3]["id"])).reply)


async def test_another_key_does_not_find_it(kept):
    """A record is stored under the name of the API key that scored the image."""
    ((reply,)) = await finished(kept, ({**PLAIN, "owner": "line-1"}, detection(0.2)))
    key = json.loads(reply.body)["id"]
    assert await kept.find(key) is None
    assert await kept.find(key, "line-1") is not None


@pytest.mark.parametrize("mse", [math.nan, math.inf])
async def test_a_score_that_is_no_number_fails_its_caller_alone(kept, mse):
    """The other images of its micro-batch get replies, and nothing of the failed image is stored."""
    first, second, third = await finished(kept, (PLAIN, detection(0.2)), (PLAIN, detection(mse)), (PLAIN, detection(1)))
    assert isinstance(second, InternalError)
    assert [json.loads(reply.body)["mse"] for reply in (first, third)] == [0.2, 1]
    (alone,) = await finished(kept, (PLAIN, detection(mse)))
    assert isinstance(alone, InternalError)


async def test_what_cannot_be_kept_has_no_id(tmp_path):
    """Without a store the verdict is the same, and `id` and `reconstruction` are null."""
    (tmp_path / "file").write_text("no folder")
    store = SqliteStore(tmp_path / "file" / "r.db", ttl_seconds=60, max_entries=100)
    now = [0.0]
    kept = Reconstructions(store, Metrics(), timeout=5, max_waiting=100, clock=lambda: now[0])
    await kept.check()
    now[0] += 60  # the next write probes the store again
    ((reply,)) = await finished(kept, (PLAIN, detection(0.3)))
    said = json.loads(reply.body)
    assert (said["id"], said["reconstruction"], said["is_anomaly"]) == (None, None, True)
    await kept.aclose()


async def test_a_record_is_the_image_and_its_reply(kept):
    """Packed and unpacked, a record is the same."""
    ((reply,)) = await finished(kept, (PLAIN, detection(0.3)))
    record = await kept.find(json.loads(reply.body)["id"])
    assert unpack(record.pack(), "") == record
    assert isinstance(reply, Reply)
    assert reply.timing.startswith("decode;dur=0.000, queue;dur=1.000, forward;dur=2.000, store;dur=")


def test_ids_are_fresh_and_of_one_form():
    """Ten thousand ids: all different, 12 digits of the time and 32 of chance."""
    ids = new_ids(10_000)
    assert len({key[12:] for key in ids}) == 10_000
    assert {len(key) for key in ids} == {44}
    assert all(set(key) <= set("0123456789abcdef") for key in ids)


def test_a_local_signal_is_a_reason_for_anomalies_only() -> None:
    """A normal image has no reason, although its score is the local signal; a guard is always named."""
    assert RULE.verdict(0.26, 0.4, "local").reason == "local"
    assert RULE.verdict(0.24, 0.6, "local").reason is None
    assert RULE.verdict(0.24, 0.6, "empty").reason == "empty"
