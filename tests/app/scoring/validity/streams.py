"""Calibrations and streams of scores with a known law, for the tests of the validity monitor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from app.models.calibration import conformal_rank
from app.scoring.validity.stream import Reference, Stream, StreamState

CALIBRATION = 1185
"""Number of calibration images of the model `zero`."""
RANK = 1175
"""Rank of its threshold, for a false-positive rate of 1 %."""
LIMIT = 100.0


def scores(ranks: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return scores with these ranks, 0 to 1, in a law like that of normal images: lognormal."""
    return np.exp(-3.9 + 0.5 * ndtri(ranks)).astype(np.float32)


def reference(rng: np.random.Generator, size: int = CALIBRATION) -> Reference:
    """Return the reference of a fresh calibration with `size` images, for a false-positive rate of 1 %."""
    drawn = np.sort(scores(rng.random(size)))
    return Reference.from_scores(drawn, float(drawn[conformal_rank(size, 0.01) - 1]))


def changed_after(rng: np.random.Generator, stream: NDArray[np.float32], size: int = CALIBRATION) -> int | None:
    """Return after how many images a stream counts as changed, with a fresh calibration; None if it never does."""
    follower = Stream(reference(rng, size), StreamState.new(0.0), LIMIT, rng)
    follower.add(stream, 0.0)
    return follower.state(0.0).changed_after
