"""Describes a stream of scores: whether the threshold still means what the calibration promised."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from app.models.manifest import Manifest
from app.scoring.validity.bins import edges, quantile
from app.scoring.validity.share import share_interval
from app.scoring.validity.stream import Reference, StreamState, dense

LEVELS = (0.1, 0.5, 0.9, 0.99)
_MAJORITY = 0.5
_REASONS = {
    "changed": "images below the threshold no longer score like the calibration images: recalibrate the model",
    "watch": "there is some evidence that images below the threshold score differently from the calibration images",
    "anomalous": "more than half of all images are called anomalous, so few images are left to compare",
}


class AnomalousShare(BaseModel):
    """The share of images that are called anomalous. It includes true anomalies."""

    count: int
    share: float | None = Field(description="Null before the first image")
    low: float = Field(description="Lower bound of the share, valid at all times at once with probability 0.95")
    high: float = Field(description="Upper bound of the share, valid together with the lower bound")
    alpha: float = Field(description="False-positive rate of the version: the expected share without anomalies")


class ScoreQuantile(BaseModel):
    """A quantile of the calibration scores and of the latest scores, exact to 3 %."""

    level: float
    calibration: float
    recent: float | None = Field(description="Null before the first image")


class ScoreCounts(BaseModel):
    """Scores per bin between consecutive edges, in the range that contains scores."""

    edges: list[float]
    calibration: list[int]
    recent: list[int] = Field(description="The latest 1,000 to 2,000 images")


class Validity(BaseModel):
    """The reply of `GET /models/{name}/validity`."""

    model_config = ConfigDict(frozen=True)

    model: str
    version: int
    status: Literal["valid", "watch", "changed"] = Field(
        description="`changed` remains until another version is current; `watch` ends when the evidence falls"
    )
    reason: str | None = Field(description="Null if the status is `valid`")
    evidence_log10: float = Field(description="Base-10 logarithm of the evidence for a change now; 0 means no evidence")
    peak_log10: float = Field(description="Maximum of the evidence since the start of the stream")
    limit_log10: float = Field(description="The status is `changed` if the maximum reaches this value")
    p_value: float = Field(
        description="Probability of at least this maximum, at any time, if nothing has changed: valid at all times"
    )
    images: int = Field(description="Number of images since the start, without those that a guard decided")
    since: datetime | None = Field(description="When the first images were counted. Null before the first image")
    updated: datetime | None = Field(description="When images were last counted. Null before the first image")
    changed_at: datetime | None = Field(description="When the status became `changed`")
    changed_after_images: int | None = Field(description="Number of images until then")
    anomalous: AnomalousShare
    quantiles: list[ScoreQuantile]
    scores: ScoreCounts


def describe(manifest: Manifest, reference: Reference, state: StreamState, limit: float) -> Validity:
    """Return the description of a stream.

    Args:
        manifest, reference: of the model version.
        state: the stream so far.
        limit: the evidence at which a stream counts as changed.
    """
    low, high = share_interval(state.anomalous, state.images)
    status, reason = _status(state, limit, low)
    recent = dense(state.recent) + dense(state.previous)
    levels = [(level, quantile(reference.all_counts, level), quantile(recent, level)) for level in LEVELS]
    return Validity(
        model=manifest.name,
        version=manifest.version,
        status=status,
        reason=reason,
        evidence_log10=state.log_evidence / math.log(10),
        peak_log10=state.log_peak / math.log(10),
        limit_log10=math.log10(limit),
        p_value=math.exp(-state.log_peak),
        images=state.images,
        since=_time(state.started) if state.images else None,
        updated=_time(state.updated) if state.images else None,
        changed_at=None if state.changed is None else _time(state.changed),
        changed_after_images=state.changed_after,
        anomalous=AnomalousShare(
            count=state.anomalous,
            share=state.anomalous / state.images if state.images else None,
            low=low,
            high=high,
            alpha=manifest.alpha,
        ),
        quantiles=[ScoreQuantile(level=at, calibration=was or 0.0, recent=now) for at, was, now in levels],
        scores=_scores(reference, recent),
    )


def _status(state: StreamState, limit: float, share: float) -> tuple[Literal["valid", "watch", "changed"], str | None]:
    if state.changed is not None or state.log_peak >= math.log(limit):
        return "changed", _REASONS["changed"]
    if state.log_evidence >= math.log(limit) / 2:
        return "watch", _REASONS["watch"]
    if share > _MAJORITY:
        return "watch", _REASONS["anomalous"]
    return "valid", None


def _scores(reference: Reference, recent: NDArray[np.int64]) -> ScoreCounts:
    used = np.flatnonzero(reference.all_counts + recent)
    first, last = int(used[0]), int(used[-1]) + 1
    return ScoreCounts(
        edges=edges()[first : last + 1].tolist(),
        calibration=reference.all_counts[first:last].tolist(),
        recent=recent[first:last].tolist(),
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
