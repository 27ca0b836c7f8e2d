"""A fixed geometric grid of score bins.

The grid must not depend on calibration scores or on the stream, or the p-values would not be uniform. It is therefore
the same for all versions. A factor of two has 32 bins, and each bin is 2 to 3 % wide.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_SHIFT = 23 - 5
"""Drops all bits of a float32 but the exponent and the first 5 bits of the mantissa."""
_LOWEST, _HIGHEST = 2.0**-14, 2.0**8
_FIRST = int(np.float32(_LOWEST).view(np.int32)) >> _SHIFT
BINS = (int(np.float32(_HIGHEST).view(np.int32)) >> _SHIFT) - _FIRST
"""Number of bins. The first and the last bin also contain the scores beyond the grid."""


def bin_of(scores: ArrayLike) -> NDArray[np.int64]:
    """Return the bin of each score, int64 [N] in 0 to `BINS` - 1. A higher score is never in a lower bin.

    Args:
        scores: finite and not negative, [N].
    """
    bits = np.asarray(scores, np.float32).view(np.int32) >> _SHIFT
    return np.clip(bits.astype(np.int64) - _FIRST, 0, BINS - 1)


def edges() -> NDArray[np.float64]:
    """Return the lower edges of all bins and the upper edge of the last bin, float64 [BINS + 1]."""
    bits = (np.arange(BINS + 1, dtype=np.int32) + _FIRST) << _SHIFT
    return bits.view(np.float32).astype(np.float64)


def quantile(counts: NDArray[np.int64], level: float) -> float | None:
    """Return the geometric middle of the bin in which a quantile of the counted scores lies; None without scores.

    Args:
        counts: scores per bin, int64 [BINS].
        level: between 0 and 1.
    """
    total = int(counts.sum())
    if total == 0:
        return None
    place = int(np.searchsorted(np.cumsum(counts), max(1, np.ceil(level * total))))
    low, high = edges()[place : place + 2].tolist()
    return float(np.sqrt(low * high))
