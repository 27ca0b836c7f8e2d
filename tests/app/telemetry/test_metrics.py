"""The histograms count as the library's own do, and faster ways must not change a bucket."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.telemetry import metrics
from app.telemetry.metrics import Metrics


def test_scores_are_counted_by_verdict_and_by_bucket() -> None:
    """What is above its threshold and what is not are told apart, and all scores are in the histogram."""
    metrics = Metrics()
    metrics.scores("zero", [0.0005, 0.4, 0.4, 9.0], anomalous=1)
    lines = metrics.exposition().decode().splitlines()
    assert 'anomaly_scores_total{model="zero",verdict="normal"} 3.0' in lines
    assert 'anomaly_scores_total{model="zero",verdict="anomalous"} 1.0' in lines
    assert 'anomaly_score_mse_bucket{le="0.001",model="zero"} 1.0' in lines
    assert 'anomaly_score_mse_bucket{le="0.5",model="zero"} 3.0' in lines
    assert 'anomaly_score_mse_bucket{le="+Inf",model="zero"} 4.0' in lines
    assert 'anomaly_score_mse_count{model="zero"} 4.0' in lines


def test_a_worker_that_died_is_forgotten_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers that are asked at once may both forget it: what the other has removed is no error."""

    def too_late(pid: int) -> None:
        raise FileNotFoundError(f"gauge_livesum_{pid}.db")

    monkeypatch.setattr(metrics, "mark_process_dead", too_late)
    (tmp_path / f"gauge_livesum_{2**30}.db").touch()
    metrics._forget_dead(tmp_path)
