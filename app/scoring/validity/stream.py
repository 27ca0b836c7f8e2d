"""The stream of scores of one model version, compared with its calibration scores image by image."""

from __future__ import annotations

import math
import secrets
import time
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.models.calibration import Calibration
from app.models.manifest import Manifest
from app.scoring.validity.bins import BINS, bin_of
from app.scoring.validity.martingale import JUMPING_RATES, Jumper, mixture, p_values

BLOCK = 256
"""Number of images whose p-values are computed together."""
RECENT = 1000
"""The score quantiles describe the latest `RECENT` to 2 * `RECENT` images."""


_CHECKSUM_BYTES = 9


class JumperState(BaseModel):
    """A jumper, as `Jumper` takes it."""

    rate: float
    log_capital: float = 0.0
    difference: float = 0.0
    sides: float = 2 / 3


class StreamState(BaseModel):
    """The stream so far: all that a process needs to continue it.

    Times are seconds since the epoch. Counts per bin contain only bins with scores.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: int = Field(1, ge=1, le=1)
    started: float
    updated: float
    token: str = ""
    """Random, so that no two processes write the same state. Empty before the first images."""
    images: int = 0
    anomalous: int = 0
    accepted: dict[int, int] = Field(default_factory=dict)
    """Scores below the threshold, per bin, without those of the calibration."""
    recent: dict[int, int] = Field(default_factory=dict)
    previous: dict[int, int] = Field(default_factory=dict)
    """All scores of the latest images, and of the `RECENT` images before them, per bin."""
    jumpers: list[JumperState] = Field(default_factory=lambda: [JumperState(rate=rate) for rate in JUMPING_RATES])
    log_evidence: float = 0.0
    """Natural logarithm of the capital of the mixture now."""
    log_peak: float = 0.0
    """Its maximum so far, at least 0: a stream begins with a capital of 1."""
    changed: float | None = None
    changed_after: int | None = None
    """When the capital first reached the limit, and after how many images."""

    @classmethod
    def new(cls, now: float) -> StreamState:
        """Return the state of a stream without images."""
        return cls(started=now, updated=now)

    def pack(self) -> bytes:
        """Return the state as JSON and a checksum: SQLite and Redis do not notice each damage of a file."""
        content = self.model_dump_json().encode()
        return content + _checksum(content)

    @classmethod
    def read(cls, content: bytes | None, now: float) -> StreamState:
        """Return a state that `pack` wrote. A missing or damaged state begins a new stream, which has no token."""
        document, checksum = (content or b"")[:-_CHECKSUM_BYTES], (content or b"")[-_CHECKSUM_BYTES:]
        try:
            return cls.model_validate_json(document) if checksum == _checksum(document) else cls.new(now)
        except ValidationError:  # another format
            return cls.new(now)


@dataclass(frozen=True)
class Reference:
    """The calibration scores that the stream of a version is compared with.

    Only scores strictly below the version's own threshold are compared. The threshold is an order statistic of the
    calibration scores. Given its value, the calibration scores below it and the stream's normal scores below it are
    independent draws of one distribution, so the p-values stay exact. Anomalies above the threshold have no influence.

    Attributes:
        threshold: the version's own threshold.
        counts: calibration scores strictly below the threshold, per bin, int64 [BINS].
        all_counts: all calibration scores per bin, int64 [BINS].
    """

    threshold: float
    counts: NDArray[np.int64]
    all_counts: NDArray[np.int64]

    @classmethod
    def of(cls, manifest: Manifest, calibration: Calibration) -> Reference:
        """Return the reference of a version."""
        return cls.from_scores(np.asarray(calibration.scores), manifest.threshold)

    @classmethod
    def from_scores(cls, scores: NDArray[np.floating], threshold: float) -> Reference:
        """Return the reference with these calibration scores, [n]."""
        # Scores of the service are float32, and a score equal to the threshold is the threshold.
        single, limit = scores.astype(np.float32), np.float32(threshold)
        below, every = (np.bincount(bin_of(part), minlength=BINS) for part in (single[single < limit], single))
        return cls(float(limit), below, every)


class Stream:
    """Continues a stream.

    Args:
        reference: of the model version.
        state: the stream so far. It is not changed.
        limit: the evidence at which the stream counts as changed.
        generator: source of the random numbers of the p-values.
    """

    def __init__(
        self, reference: Reference, state: StreamState, limit: float, generator: np.random.Generator | None = None
    ) -> None:
        self._reference = reference
        self._state = state
        self._log_limit = math.log(limit)
        self._generator = generator or np.random.default_rng()
        self._counts = reference.counts + dense(state.accepted)
        self._recent, self._previous = dense(state.recent), dense(state.previous)
        self._jumpers = [Jumper(each.rate, each.log_capital, each.difference, each.sides) for each in state.jumpers]
        self._images, self._anomalous = state.images, state.anomalous
        self._log_evidence, self._log_peak = state.log_evidence, state.log_peak
        self._changed, self._changed_after = state.changed, state.changed_after

    def add(self, scores: NDArray[np.float32], now: float) -> None:
        """Add scores in order. Each block of 256 takes a fraction of a millisecond.

        Args:
            scores: finite scores that no guard decided, float32 [N].
            now: seconds since the epoch.
        """
        for start in range(0, len(scores), BLOCK):
            self._add_block(scores[start : start + BLOCK], now)
            time.sleep(0)  # releases the GIL, which other threads would otherwise wait for

    def state(self, now: float) -> StreamState:
        """Return the stream with the added scores."""
        return StreamState(
            started=self._state.started,
            updated=now,
            token=secrets.token_hex(8),
            images=self._images,
            anomalous=self._anomalous,
            accepted=_sparse(self._counts - self._reference.counts),
            recent=_sparse(self._recent),
            previous=_sparse(self._previous),
            jumpers=[
                JumperState(rate=each.rate, log_capital=each.log_capital, difference=each.difference, sides=each.sides)
                for each in self._jumpers
            ],
            log_evidence=self._log_evidence,
            log_peak=self._log_peak,
            changed=self._changed,
            changed_after=self._changed_after,
        )

    def _add_block(self, scores: NDArray[np.float32], now: float) -> None:
        bins = bin_of(scores)
        self._recent += np.bincount(bins, minlength=BINS)
        if self._recent.sum() >= RECENT:
            self._previous, self._recent = self._recent, np.zeros(BINS, np.int64)
        below = scores < np.float32(self._reference.threshold)
        places = np.flatnonzero(below)
        if len(places):
            self._bet(bins[places], places, now)
        self._images += len(scores)
        self._anomalous += int(np.count_nonzero(scores > np.float32(self._reference.threshold)))

    def _bet(self, bins: NDArray[np.int64], places: NDArray[np.int64], now: float) -> None:
        found = p_values(self._counts, bins, self._generator.random(len(bins)))
        halves = (0.5 - found).tolist()
        logs = mixture([jumper.bet(halves) for jumper in self._jumpers])
        self._log_evidence = float(logs[-1])
        highest = float(logs.max())
        self._log_peak = max(self._log_peak, highest)
        if self._changed is None and highest >= self._log_limit:
            self._changed = now
            self._changed_after = self._images + int(places[np.argmax(logs >= self._log_limit)]) + 1


def _checksum(content: bytes) -> bytes:
    return f"\n{zlib.crc32(content):08x}".encode()


def dense(counts: dict[int, int]) -> NDArray[np.int64]:
    """Return counts per bin as an array, int64 [BINS]."""
    found = np.zeros(BINS, np.int64)
    for place, count in counts.items():
        found[place] = count
    return found


def _sparse(counts: NDArray[np.int64]) -> dict[int, int]:
    places = np.flatnonzero(counts)
    return dict(zip(places.tolist(), counts[places].tolist(), strict=True))
