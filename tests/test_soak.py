"""A short soak; `make soak` runs a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.telemetry.metrics import Metrics
from tests.conftest import Server
from tests.soak.load import Soak, soak


@pytest.mark.process
def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    """In five seconds of mixed load and faults, no reply is lost and no score is wrong."""
    report = soak(tmp_path, 5, seed=25)
    assert report["wrong"] == [], report
    assert report["counts"]["scored"] > 50
    assert report["counts"]["fetched reconstruction"] > 0


def test_contradicting_counters_are_found(tmp_path: Path) -> None:
    """The soak names each counter of the service that differs from what its clients have received."""
    metrics, run = Metrics(), Soak(Server(tmp_path), tmp_path, 1)
    metrics.scores("zero-article", [0.1, 0.2, 0.3], 1)
    metrics.request("/score", 200, 0.1)
    for _ in range(3):
        run.note_score({"mse": 0.1, "id": "a"}, None)
    run.note_reply("/score", 200)
    assert run._differences(metrics.exposition().decode()) == []
    metrics.scores("zero-article", [0.4], 0)
    metrics.degraded("store_slow")
    metrics.degraded("queue")
    metrics.forward_pass_failures.inc()
    metrics.request("/score", 200, 0.1)
    assert run._differences(metrics.exposition().decode()) == [
        "scores: 4 counted by the service, 3 received",
        "null ids: 1 counted by the service, 0 received",
        "statuses 503 and 504: 1 counted by the service, 0 received",
        "failed forward passes: 1 counted by the service, 0 received",
        "/score 200: 2 counted by the service, 1 received",
    ]
