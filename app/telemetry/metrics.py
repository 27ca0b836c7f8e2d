"""What Prometheus sees. Every label takes its values from a fixed, small set.

Nothing is made at import: each application has its own registry, unless several processes share their numbers through
the folder that PROMETHEUS_MULTIPROC_DIR names.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.samples import Sample

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_BATCH_SECONDS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
_MSE = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 4.0)
STAGES = ("decode", "queue", "forward", "store")
CONTENT_TYPE = CONTENT_TYPE_LATEST


_MOST_HELD = 500


class _Histogram(Histogram):
    """The library's histogram, which counts values when somebody looks, or when there are many.

    The library compares each value with one bound after the other, which matters where every request and every image is
    counted. Here a value costs the interpreter nothing but its place in a list. Only for the event loop's thread.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        self._held: list[float] = []
        # Where processes share their numbers, somebody else looks.
        self._most = 1 if _shared() else _MOST_HELD
        super().__init__(*given, **named)

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """Count one value."""
        if exemplar is not None:
            super().observe(amount, exemplar)
            return
        self._held.append(amount)
        if len(self._held) >= self._most:
            self._settle()

    def observe_all(self, amounts: Sequence[float]) -> None:
        """Count many values."""
        self._held.extend(amounts)
        if len(self._held) >= self._most:
            self._settle()

    def _child_samples(self) -> Iterable[Sample]:
        self._settle()
        return super()._child_samples()

    def _settle(self) -> None:
        amounts, self._held = self._held, []
        self._sum.inc(sum(amounts))
        for bucket, count in Tally(map(partial(bisect_left, self._upper_bounds), amounts)).items():
            self._buckets[bucket].inc(count)


class Metrics:
    """All series of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "anomaly_http_requests", "Requests answered.", ("route", "status"), registry=self.registry
        )
        self._seconds = _Histogram(
            "anomaly_http_request_duration_seconds",
            "From request to reply.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        stage = _Histogram(
            "anomaly_score_stage_duration_seconds",
            "Where the time of a micro-batch went: decode of all its images, queue of the one that waited longest.",
            ("stage",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._stages = [stage.labels(name) for name in STAGES]
        batch_stage = _Histogram(
            "anomaly_batch_stage_duration_seconds",
            "Where a batch request's time went, all its images together.",
            ("stage",),
            buckets=_BATCH_SECONDS,
            registry=self.registry,
        )
        self._batch_stages = [batch_stage.labels(name) for name in STAGES]
        self._verdicts = Counter("anomaly_scores", "Images scored.", ("model", "verdict"), registry=self.registry)
        self._mse = _Histogram("anomaly_score_mse", "Anomaly scores.", ("model",), buckets=_MSE, registry=self.registry)
        self.batch_images = _Histogram(
            "anomaly_microbatch_images", "Images in one forward pass.", buckets=_SIZES, registry=self.registry
        )
        self.shed = Counter(
            "anomaly_score_shed", "Requests refused because too much was waiting.", registry=self.registry
        )
        self.not_kept = Counter(
            "anomaly_reconstructions_dropped",
            "Scores answered without an id: the store failed.",
            registry=self.registry,
        )
        self.model_failures = Counter(
            "anomaly_forward_pass_failures", "Forward passes that failed.", registry=self.registry
        )
        self.log_lines_dropped = Counter(
            "anomaly_log_lines_dropped",
            "Log lines dropped because nobody read standard output.",
            registry=self.registry,
        )
        self.load_failures = Counter(
            "anomaly_model_load_failures", "Versions refused.", ("model",), registry=self.registry
        )
        self.model_refused = Gauge(
            "anomaly_model_version_rejected",
            "1 while the version that should answer is refused and the one before it answers, if any.",
            ("model",),
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.queue_images = Gauge(
            "anomaly_queue_images", "Images waiting for the model.", multiprocess_mode="livesum", registry=self.registry
        )
        self.store_up = Gauge(
            "anomaly_reconstruction_store_up",
            "1 while the store keeps what it is given.",
            multiprocess_mode="livemin",
            registry=self.registry,
        )
        self.ready = Gauge(
            "anomaly_ready", "1 while /readyz says yes.", multiprocess_mode="livemin", registry=self.registry
        )
        self.model_version = Gauge(
            "anomaly_model_version",
            "The version that answers by default.",
            ("model",),
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.start_seconds = Gauge(
            "anomaly_start_duration_seconds",
            "From process start to ready.",
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.loop_lag = _Histogram(
            "anomaly_event_loop_lag_seconds",
            "How much later than asked for the event loop woke a sleeper.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        # Looking up a series by its labels costs more than counting in it.
        self._request_series: dict[tuple[str, int], tuple[Counter, _Histogram]] = {}
        self._model_series: dict[str, tuple[Counter, Counter, _Histogram]] = {}

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        series = self._request_series.get((route, status))
        if series is None:
            series = self._requests.labels(route, status), self._seconds.labels(route)
            self._request_series[route, status] = series
        series[0].inc()
        series[1].observe(seconds)

    def micro_batch(self, stages: Iterable[float]) -> None:
        """Count the seconds that a micro-batch spent in each of `STAGES`."""
        for histogram, seconds in zip(self._stages, stages, strict=True):
            histogram.observe(seconds)

    def batch(self, stages: Iterable[float]) -> None:
        """Count the seconds that a batch request spent in each of `STAGES`."""
        for histogram, seconds in zip(self._batch_stages, stages, strict=True):
            histogram.observe(seconds)

    def scores(self, model: str, mses: Sequence[float], anomalous: int) -> None:
        """Count the images that one micro-batch scored, `anomalous` of them above their threshold."""
        series = self._model_series.get(model)
        if series is None:
            verdicts = self._verdicts.labels(model, "normal"), self._verdicts.labels(model, "anomalous")
            self._model_series[model] = series = *verdicts, self._mse.labels(model)
        for counter, count in ((series[0], len(mses) - anomalous), (series[1], anomalous)):
            if count:
                counter.inc(count)
        series[2].observe_all(mses)

    def exposition(self) -> bytes:
        """Return every series in Prometheus' text format, summed over all worker processes."""
        if _shared():
            _forget_dead(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            return generate_latest(registry)
        return generate_latest(self.registry)


def _shared() -> bool:
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def _forget_dead(folder: Path) -> None:
    """Drop what killed workers said of themselves at the time: their gauges would be summed for ever."""
    for pid in {path.stem.rpartition("_")[2] for path in folder.glob("gauge_live*_*.db")}:
        if not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(FileNotFoundError):  # another worker has just done it
                mark_process_dead(int(pid))  # type: ignore[no-untyped-call]
