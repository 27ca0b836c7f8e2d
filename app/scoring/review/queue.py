"""Chooses scored images for a review, and writes them to a folder from a separate thread.

An image belongs to at most one group per model version:

* `random`: drawn from all images with a fixed probability, independently of their scores. These images
  represent the stream, so a threshold may be chosen from those of them that are normal.
* `anomalous`: of the other images, those above the version's own threshold.
* `near`: of the other images, those below it with a small p-value.

Each group has a reservoir per window of time (Vitter, "Random sampling with a reservoir", 1985, algorithm R): every
image of the group is in it with the same probability, and memory does not depend on the rate of images.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from pydantic_core import to_json

from app.images import png
from app.models.manifest import Manifest
from app.scoring.review.folder import Entry, ReviewFolder
from app.scoring.verdict import Verdict
from app.stores.records import new_ids
from app.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

WINDOW_SECONDS = 5.0
"""Time from the first image of a window until the reservoirs are written."""
RESERVOIR = 20
"""Maximum number of images per window and group that a process writes."""

Reason = Literal["random", "anomalous", "near"]


class Candidate(NamedTuple):
    """An image that may be written.

    Attributes:
        id: of the reply, or None for a new id.
        image: the pixels that the model scored, uint8 [28, 28], as bytes.
        verdict: on the image.
        time: seconds since the epoch.
    """

    id: str | None
    image: bytes
    verdict: Verdict
    time: float


@dataclass
class _Group:
    """The images of a model version that were chosen for one reason in this window."""

    manifest: Manifest
    chosen: Reason
    seen: int = 0
    reservoir: list[Candidate] = field(default_factory=list)


class ReviewQueue:
    """Writes a sample of the scored images to a folder. It never blocks a score.

    Args:
        folder: where the images are written.
        metrics: counts the images.
        share: probability with which an image is drawn independently of its score.
        near: an image below the threshold is near it if its p-value is at most `near` times the false-positive rate.
        window: seconds between two writes.
        generator: source of the random numbers.
    """

    def __init__(
        self,
        folder: ReviewFolder,
        metrics: Metrics,
        *,
        share: float,
        near: float,
        window: float = WINDOW_SECONDS,
        generator: random.Random | None = None,
    ) -> None:
        self._folder = folder
        self._metrics = metrics
        self._share = share
        self._near = near
        self._window = window
        self._generator = generator or random.Random()  # noqa: S311 - a sample, not a secret
        # Guards the groups: the inference thread, the event loop and the thread of the queue use them.
        self._changed = threading.Condition()
        self._groups: dict[tuple[str, int, Reason], _Group] = {}
        self._closing = False
        self._failing = False
        self._thread: threading.Thread | None = None

    def offer(
        self,
        manifest: Manifest,
        image: bytes | memoryview,
        verdict: Verdict,
        id: str | None = None,
    ) -> None:
        """Consider an image. Any thread may call it; it does not block.

        The version's own threshold and false-positive rate decide, not those of the request, so that clients do not
        change the sample.

        Args:
            manifest: of the version that scored the image.
            image: the pixels that the model scored, uint8 [28, 28].
            verdict: on the image.
            id: of the reply. Default: a new id.
        """
        chosen: Reason
        if self._generator.random() < self._share:
            chosen = "random"
        elif verdict.mse > manifest.threshold:
            chosen = "anomalous"
        elif verdict.p_value <= self._near * manifest.alpha:
            chosen = "near"
        else:
            return
        key = manifest.name, manifest.version, chosen
        with self._changed:
            group = self._groups.get(key)
            if group is None:
                if self._closing:
                    return
                if not self._has_thread():
                    self._metrics.review_images_dropped.inc()
                    return
                group = self._groups[key] = _Group(manifest, chosen)
                self._changed.notify_all()
            place = len(group.reservoir)
            group.seen += 1
            if place == RESERVOIR:
                place = self._generator.randrange(group.seen)
                if place >= RESERVOIR:
                    return
            group.reservoir[place : place + 1] = [Candidate(id, bytes(image), verdict, time.time())]

    def close(self, timeout: float) -> bool:
        """Write the images of the last window, and end the thread. Return False if `timeout` seconds did not suffice.

        Images that are offered afterwards are ignored.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _has_thread(self) -> bool:
        """Start the thread if it does not run. Return False if the system cannot start it now."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="review", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._warn({"error": str(error), "images": 1})
                return False
            self._thread = thread
        return True

    def _warn(self, facts: dict[str, object]) -> None:
        """Log the first of several failures in a row."""
        if not self._failing:
            _log.warning("images could not be written to the review queue", extra=facts)
        self._failing = True

    def _run(self) -> None:
        closing = False
        while not closing:
            with self._changed:
                self._changed.wait_for(lambda: self._groups or self._closing)
                self._changed.wait_for(lambda: self._closing, self._window)
                closing, groups, self._groups = self._closing, self._groups, {}
            try:
                self._write(list(groups.values()))
            except Exception:  # the next window must follow
                _log.exception("images could not be written to the review queue")

    def _write(self, groups: list[_Group]) -> None:
        entries = [self._entry(group, each) for group in groups for each in group.reservoir]
        written, error = self._folder.add(entries)
        for entry in written:
            self._metrics.review_images.labels(entry.chosen).inc()
        if error is None:
            self._failing = False
            return
        dropped = len(entries) - len(written)
        self._metrics.review_images_dropped.inc(dropped)
        file = self._folder.name_of(error)
        self._warn({"error": error.strerror or str(error), "file": file, "images": dropped})

    def _entry(self, group: _Group, candidate: Candidate) -> Entry:
        manifest, verdict, id = group.manifest, candidate.verdict, candidate.id or new_ids(1)[0]
        drawn = self._share if group.chosen == "random" else 1 - self._share
        line = {
            "id": id,
            "time": datetime.fromtimestamp(candidate.time, UTC).isoformat(timespec="milliseconds"),
            "model": manifest.name,
            "version": manifest.version,
            "mse": verdict.mse,
            "p_value": verdict.p_value,
            "threshold": manifest.threshold,
            "alpha": manifest.alpha,
            "is_anomaly": verdict.mse > manifest.threshold,
            "reason": verdict.reason,
            "chosen": group.chosen,
            "probability": drawn * len(group.reservoir) / group.seen,
        }
        return Entry(manifest.name, group.chosen, id, png.encode_prepared(candidate.image), to_json(line) + b"\n")
