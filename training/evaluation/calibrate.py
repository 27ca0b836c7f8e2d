"""Choose the threshold on held-out normal images, with the very module that will be served.

Knows: scores, the exact band of a split-conformal threshold. Does not know: data sets, files. The order statistics
themselves are in `app.models.calibration`, which the service uses too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from app.inference.detector import Detector
from app.models.calibration import Calibration, CalibrationError
from app.models.manifest import CalibrationSummary

BAND_LEVEL = 0.99


def score(detector: Detector, images: NDArray[np.uint8], batch: int = 256) -> NDArray[np.float32]:
    """Return the MSE of every image: uint8 [n, 28, 28] to float32 [n]."""
    return judge(detector, images, batch)[0]


def judge(
    detector: Detector, images: NDArray[np.uint8], batch: int = 256
) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Return the MSE of every image, float32 [n], and the code of the guard that caught it, or 0, int8 [n]."""
    starts = range(0, len(images), batch)
    parts = [detector.detect(np.ascontiguousarray(images[start : start + batch, None])) for start in starts]
    return (
        np.concatenate([np.zeros(0, np.float32), *(part.mse for part in parts)]),
        np.concatenate([np.zeros(0, np.int8), *(part.reason for part in parts)]),
    )


def caught(reason: NDArray[np.int8], names: Sequence[str]) -> dict[str, int]:
    """Return how many images each guard caught; guards that caught none are left out.

    Args:
        reason: code of each image, int8 [n]; code k is `names[k - 1]`.
        names: of the guards.
    """
    counts = {name: int((reason == code).sum()) for code, name in enumerate(names, 1)}
    return {name: count for name, count in counts.items() if count}


def check_guards(
    scores: NDArray[np.float32],
    reason: NDArray[np.int8],
    names: Sequence[str],
    *,
    threshold: float,
    guard_error: float,
) -> dict[str, int]:
    """Return how many calibration images each guard caught.

    Args:
        scores: MSE of the calibration images, float32 [n].
        reason: codes of those, int8 [n].
        names: of the guards.
        threshold: what the scores give.
        guard_error: the score of whatever a guard catches.

    Raises:
        CalibrationError: the threshold reaches the score of caught images, so that none of them is anomalous.
    """
    counts = caught(reason, names)
    if counts and threshold >= scores[reason > 0].min():
        raise CalibrationError(
            f"{caught_words(counts, len(scores))}, so many that nothing would be anomalous: "
            "give bright strokes on a dark ground, or leave such images out"
        )
    if threshold >= guard_error:
        raise CalibrationError(
            f"the threshold {threshold:.6g} reaches {guard_error:g}, the error of all that guards catch, and an empty "
            "image would be normal: the model cannot redraw these images, so train one on their kind"
        )
    return counts


def guard_error(parameters: Mapping[str, Any]) -> float:
    """Return the score of whatever a guard catches, of a recipe with these parameters; infinite where it has none."""
    return float(parameters.get("guards", {}).get("guard_error", math.inf))


def caught_words(counts: Mapping[str, int], n: int) -> str:
    """Say how many of the `n` calibration images each guard caught."""
    each = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"guards caught {sum(counts.values()):,} of the {n:,} calibration images ({each})"


def calibrate(
    scores: NDArray[np.float32], alpha: float, confidence: float | None = None
) -> tuple[Calibration, CalibrationSummary]:
    """Turn the scores of held-out normal images into thresholds for any false-alarm rate.

    Args:
        scores: MSE of normal images that training never saw, float32 [n], in any order.
        alpha: the wanted false-alarm rate.
        confidence: None for the guarantee on average over calibration draws; else the probability over calibration
            draws with which the false-alarm rate must stay at or below `alpha`.

    Raises:
        CalibrationError: there are too few images; the message says how many are needed.
    """
    calibration = Calibration(np.sort(scores).astype(float).tolist(), confidence)
    rank = calibration.rank(alpha)
    n = len(scores)
    return calibration, CalibrationSummary(
        n=n, rank=rank, confidence=confidence, band_level=BAND_LEVEL, band=band(n, rank)
    )


def band(n: int, rank: int, level: float = BAND_LEVEL) -> tuple[float, float]:
    """Return where the false-alarm rate of the threshold at `rank` of `n` lies with probability `level`.

    It follows Beta(n + 1 - rank, rank): Vovk, "Conditional validity of inductive conformal predictors", 2012.
    """
    law = stats.beta(n + 1 - rank, rank)
    low, high = law.ppf([(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def count_band(n: int, rank: int, fresh: int, level: float = BAND_LEVEL) -> tuple[int, int]:
    """Return how many false alarms among `fresh` new normal images are to be expected with probability `level`.

    Their number is beta-binomial: the rate is drawn with the calibration images, the count with the new ones.
    """
    law = stats.betabinom(fresh, n + 1 - rank, rank)
    low, high = law.ppf([(1 - level) / 2, (1 + level) / 2])
    return int(low), int(high)
