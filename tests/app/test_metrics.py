"""The histograms count as the library's own do, and faster ways must not change a bucket."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram

from app.telemetry import metrics
from app.telemetry.metrics import Metrics, _Histogram

BOUNDS = (0.1, 0.5, 1.0, 4.0)


def _counted(kind: type[Histogram], count: Callable[[Histogram], None]) -> dict[tuple[str, str], float]:
    registry = CollectorRegistry()
    count(kind("seconds", "Of the test.", ("route",), buckets=BOUNDS, registry=registry).labels("/score"))
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    return {
        (sample.name, sample.labels.get("le", "")): sample.value
        for sample in samples
        if not sample.name.endswith("_created")
    }


def _values() -> list[float]:
    """Return values of every bucket."""
    chance = random.Random(7)
    # Bounds belong to their bucket; what is beyond all of them to the last.
    return [*BOUNDS, -1.0, 0.0, 4.000001, 1e9, *(chance.uniform(0.0, 5.0) for _ in range(200))]


@pytest.mark.parametrize("at_once", [False, True])
def test_histograms_count_as_the_library_does(at_once: bool) -> None:
    """Value by value and all at once, every bucket, the sum and the count are the library's."""
    values = _values()

    def one_by_one(histogram: Histogram) -> None:
        for value in values:
            histogram.observe(value)

    def all_at_once(histogram: Histogram) -> None:
        assert isinstance(histogram, _Histogram)
        histogram.observe_all(values[:3])
        histogram.observe_all([])
        histogram.observe_all(values[3:])

    expected = _counted(Histogram, one_by_one)
    assert len(expected) == len(BOUNDS) + 3
    assert _counted(_Histogram, all_at_once if at_once else one_by_one) == pytest.approx(expected)


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
