"""The histograms count as the library's own do, and faster ways must not change a bucket."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from app.telemetry import metrics
from app.telemetry.metrics import Metrics
from tests.conftest import ROOT


def test_scores_are_counted_by_verdict_and_by_bucket() -> None:
    """Scores are counted by verdict, and all scores are in the histogram."""
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
    """Two workers may remove the files of a dead worker at the same time: a missing file is not an error."""

    def too_late(pid: int) -> None:
        raise FileNotFoundError(f"gauge_livesum_{pid}.db")

    monkeypatch.setattr(metrics, "mark_process_dead", too_late)
    (tmp_path / f"gauge_livesum_{2**30}.db").touch()
    metrics._forget_dead(tmp_path)


def test_only_a_traced_request_has_an_exemplar() -> None:
    """The bucket of a traced request names its trace in OpenMetrics. The text format has no place for that."""
    counted = Metrics()
    counted.request("/score", 200, 0.003, "ab" * 16)
    counted.request("/score", 200, 0.003, "cd" * 16)  # within a second of the one before
    counted.request("/score", 200, 0.3)
    text, open_metrics = (counted.exposition(each).decode() for each in metrics.FORMATS)
    found = {
        sample.labels["le"]: sample.exemplar
        for family in text_string_to_metric_families(open_metrics)
        for sample in family.samples
        if sample.name == "anomaly_http_request_duration_seconds_bucket" and sample.exemplar
    }
    assert {bound: (each.labels, each.value) for bound, each in found.items()} == {
        "0.005": ({"trace_id": "ab" * 16}, 0.003)
    }
    assert "ab" * 16 not in text


@pytest.mark.process
def test_several_workers_have_no_exemplars(tmp_path: Path) -> None:
    """Metrics that workers share count a traced request, and have no exemplar for it."""
    code = (
        "from app.telemetry.metrics import FORMATS, Metrics; metrics = Metrics();"
        "metrics.request('/score', 200, 0.003, 'ab' * 16);"
        "print(*(metrics.exposition(each).decode() for each in FORMATS))"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.count('_duration_seconds_bucket{le="0.005",route="/score"} 1.0\n') == 2
    assert "ab" * 16 not in run.stdout
