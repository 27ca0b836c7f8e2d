"""The service's Prometheus metrics. Every label takes its values from a small, fixed set.

Nothing is created at import: each application has its own registry, unless several processes share their values through
the folder that PROMETHEUS_MULTIPROC_DIR names.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, exposition
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.openmetrics import exposition as openmetrics

from app import __version__

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_BATCH_SECONDS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_EXEMPLAR_SECONDS = 1.0
"""Minimum time between two exemplars of a bucket."""
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
_MSE = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 4.0)
_ALERTED_PROBLEMS = ("overloaded", "internal-error", "deadline-exceeded", "model-unavailable")
"""Exported from the start: a rate needs the value before the first problem."""
CAUSES = (
    "queue", "thread", "deadline", "fit_places", "fit_deadline", "batch_places", "version_places", "version_load",
    "model_store", "version_rejected", "version_retired", "connections", "shutdown", "store_read",
    "store_down", "store_slow", "store_full",
)  # fmt: skip
"""Causes of a 503 or 504, and, the last three, of a score without an id."""
STAGES = ("decode", "queue", "forward", "store")
FORMATS: dict[str, Callable[[CollectorRegistry], bytes]] = {
    exposition.CONTENT_TYPE_LATEST: exposition.generate_latest,
    openmetrics.CONTENT_TYPE_LATEST: openmetrics.generate_latest,
}
"""Media types of the exposition, the default first. Only OpenMetrics contains exemplars."""
_TIMING = ", ".join(f"{stage};dur=%.3f" for stage in STAGES)


def stage_times(stages: Sequence[float]) -> tuple[str, dict[str, int]]:
    """Return the seconds of each of `STAGES` as the header Server-Timing (W3C) in ms and as log members in µs."""
    decode, queue, forward, store = stages
    return _TIMING % (1e3 * decode, 1e3 * queue, 1e3 * forward, 1e3 * store), {
        "decode_us": int(1e6 * decode),
        "queue_us": int(1e6 * queue),
        "forward_us": int(1e6 * forward),
        "store_us": int(1e6 * store),
    }


class Metrics:
    """All metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("anomaly_http_requests", "Requests answered.", "route", "status")
        self._problems = self._counter("anomaly_problems", "Requests answered with a problem (RFC 9457).", "type")
        for name in _ALERTED_PROBLEMS:
            self._problems.labels(name)
        self._seconds = self._histogram(
            "anomaly_http_request_duration_seconds", "Time from request to response.", _SECONDS, "route"
        )
        stage = self._histogram(
            "anomaly_score_stage_duration_seconds",
            "Time of a micro-batch per stage: decoding of all images, longest wait in the queue, forward pass, store.",
            _SECONDS,
            "stage",
        )
        self._stages = [stage.labels(name) for name in STAGES]
        batch_stage = self._histogram(
            "anomaly_batch_stage_duration_seconds", "Time of a batch request per stage.", _BATCH_SECONDS, "stage"
        )
        self._batch_stages = [batch_stage.labels(name) for name in STAGES]
        self._verdicts = self._counter("anomaly_scores", "Images scored.", "model", "verdict")
        self._mse = self._histogram("anomaly_score_mse", "Anomaly scores.", _MSE, "model")
        self._forward_images = self._histogram("anomaly_forward_pass_images", "Images per forward pass.", _SIZES)
        self._degraded = self._counter(
            "anomaly_degraded", "Requests that a limit ended with 503 or 504, and scores without an id.", "cause"
        )
        for cause in CAUSES:
            self._degraded.labels(cause)
        self.reconstructions_dropped = self._counter(
            "anomaly_reconstructions_dropped", "Scores without an id because the reconstruction store failed."
        )
        self.reconstruction_store_reopened = self._counter(
            "anomaly_reconstruction_store_reopened",
            "Times that the store's file was deleted or replaced, and reopened.",
        )
        self.reconstruction_store_damaged = self._counter(
            "anomaly_reconstruction_store_damaged",
            "Times that the store's file was damaged and moved aside, or that a damaged record or state was ignored.",
        )
        self.forward_pass_failures = self._counter(
            "anomaly_forward_pass_failures", "Forward passes that failed, or returned a score that is not finite."
        )
        self.log_lines_dropped = self._counter(
            "anomaly_log_lines_dropped", "Log lines dropped because standard output was not read."
        )
        self.model_load_failures = self._counter("anomaly_model_load_failures", "Versions rejected.", "model")
        self.model_version_rejected = self._gauge(
            "anomaly_model_version_rejected",
            "1 while the version in CURRENT is rejected and the version before it, if any, serves.",
            "livemax",
            "model",
        )
        self.queue_images = self._gauge("anomaly_queue_images", "Images waiting for a forward pass.", "livesum")
        self.reconstruction_store_up = self._gauge(
            "anomaly_reconstruction_store_up", "1 while the reconstruction store can be written.", "livemin"
        )
        self.ready = self._gauge("anomaly_ready", "1 while /readyz returns 200.", "livemin")
        self.model_version = self._gauge("anomaly_model_version", "The current version.", "livemax", "model")
        self.model_threshold = self._gauge(
            "anomaly_model_threshold", "The threshold of the current version.", "livemax", "model"
        )
        self._gauge("anomaly_build_info", "1; the version of the service.", "livemax", "version").labels(
            __version__
        ).set(1)
        self.start_duration = self._gauge(
            "anomaly_start_duration_seconds", "Time from process start to ready.", "livemax"
        )
        self.event_loop_lag = self._histogram(
            "anomaly_event_loop_lag_seconds", "Delay of a timer on the event loop.", _SECONDS
        )
        self._validity_images = self._gauge(
            "anomaly_validity_images",
            "Images of the current version compared with its calibration.",
            "livemax",
            "model",
        )
        self._validity_evidence = self._gauge(
            "anomaly_validity_evidence_log10",
            "Maximum so far of the base-10 logarithm of the evidence that scores differ from the calibration scores.",
            "livemax",
            "model",
        )
        self._validity_changed = self._gauge(
            "anomaly_validity_changed",
            "1 if the scores of the current version no longer resemble its calibration scores.",
            "livemax",
            "model",
        )
        self.validity_images_dropped = self._counter(
            "anomaly_validity_images_dropped", "Images not compared with the calibration because the store failed."
        )
        self.review_images = self._counter("anomaly_review_images", "Images written to the review queue.", "chosen")
        self.review_images_dropped = self._counter(
            "anomaly_review_images_dropped", "Images chosen for the review queue that could not be written."
        )
        # Looking up a child by its labels costs more than counting.
        self._request_children: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._next_exemplars: dict[tuple[str, int], float] = {}
        self._model_children: dict[str, tuple[Counter, Counter, Histogram]] = {}

    def request(self, route: str, status: int, seconds: float | None, trace_id: str | None = None) -> None:
        """Count one answered request, and its time if it is known: with its trace as an exemplar, once per second."""
        children = self._request_children.get((route, status))
        if children is None:
            children = self._requests.labels(route, status), self._seconds.labels(route)
            self._request_children[route, status] = children
        children[0].inc()
        if seconds is not None:
            has_exemplar = trace_id is not None and self._needs_exemplar(route, seconds)
            children[1].observe(seconds, {"trace_id": str(trace_id)} if has_exemplar else None)

    def _needs_exemplar(self, route: str, seconds: float) -> bool:
        # Setting an exemplar takes longer than counting the request, and a scraper reads it every few seconds.
        bucket, now = (route, bisect_left(_SECONDS, seconds)), time.monotonic()
        if now < self._next_exemplars.get(bucket, 0.0):
            return False
        self._next_exemplars[bucket] = now + _EXEMPLAR_SECONDS
        return True

    def problem(self, type: str | None, cause: str | None = None) -> None:
        """Count one request that was answered with a problem, and its cause. None is not counted."""
        if type is not None:
            self._problems.labels(type.rpartition("/")[2]).inc()
        self.degraded(cause)

    def degraded(self, cause: str | None, count: int = 1) -> None:
        """Count requests, or scores without an id, by one of `CAUSES`. None is not counted."""
        if cause is not None:
            self._degraded.labels(cause).inc(count)

    def forward_passes(self, sizes: Iterable[int]) -> None:
        """Count forward passes by their number of images."""
        for size in sizes:
            self._forward_images.observe(size)

    def micro_batch(
        self, size: int, stages: Iterable[float], model: str | None, mses: Sequence[float], anomalous: int
    ) -> None:
        """Count a micro-batch.

        Args:
            size: number of images.
            stages: seconds in each of `STAGES`.
            model: its name; None if no image has a finite score.
            mses: the finite scores.
            anomalous: number of scores above their threshold.
        """
        self._forward_images.observe(size)
        if model is not None:
            self.scores(model, mses, anomalous)
            for histogram, seconds in zip(self._stages, stages, strict=True):
                histogram.observe(seconds)

    def batch(self, stages: Iterable[float]) -> None:
        """Count the seconds of a batch request in each of `STAGES`."""
        for histogram, seconds in zip(self._batch_stages, stages, strict=True):
            histogram.observe(seconds)

    def scores(self, model: str, mses: Sequence[float], anomalous: int) -> None:
        """Count scored images, `anomalous` of them above their threshold."""
        children = self._model_children.get(model)
        if children is None:
            verdicts = self._verdicts.labels(model, "normal"), self._verdicts.labels(model, "anomalous")
            self._model_children[model] = children = *verdicts, self._mse.labels(model)
        for counter, count in ((children[0], len(mses) - anomalous), (children[1], anomalous)):
            if count:
                counter.inc(count)
        for mse in mses:
            children[2].observe(mse)

    def validity(self, model: str, images: int, log_evidence: float, *, changed: bool) -> None:
        """Set the evidence, as a natural logarithm, that the scores of a current version have changed."""
        self._validity_images.labels(model).set(images)
        self._validity_evidence.labels(model).set(log_evidence / math.log(10))
        self._validity_changed.labels(model).set(changed)

    def exposition(self, media_type: str = next(iter(FORMATS))) -> bytes:
        """Return every metric in one of `FORMATS`, summed over all worker processes.

        The sums of several processes have no exemplars, because prometheus_client does not store them in its files.
        """
        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            _forget_dead(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return FORMATS[media_type](registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str, mode: Literal["livemax", "livemin", "livesum"], *labels: str) -> Gauge:
        return Gauge(name, help, labels, multiprocess_mode=mode, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, help, labels, buckets=buckets, registry=self.registry)


def _forget_dead(folder: Path) -> None:
    """Delete the gauges of killed workers, which would be summed forever."""
    for pid in {path.stem.rpartition("_")[2] for path in folder.glob("gauge_live*_*.db")}:
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            with contextlib.suppress(FileNotFoundError):  # another worker has just removed it
                mark_process_dead(int(pid))  # type: ignore[no-untyped-call]
        except PermissionError:
            continue  # the process is alive
