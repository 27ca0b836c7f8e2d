"""Split-conformal calibration: the threshold from held-out normal images, scored by the exported module.

The order statistics are in `app.models.calibration`, which the service uses as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from app.inference.detector import Detector
from app.inference.device import one_thread
from app.models.calibration import Calibration, CalibrationError, needed
from app.models.manifest import LOCAL, CalibrationSummary

BAND_LEVEL = 0.99


def score(detector: Detector, images: NDArray[np.uint8], batch_size: int = 256) -> NDArray[np.float32]:
    """Return the MSE, float32 [n], of images, uint8 [n, 28, 28]."""
    return score_with_reasons(detector, images, batch_size)[0]


def score_with_reasons(
    detector: Detector, images: NDArray[np.uint8], batch_size: int = 256
) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Return the MSE, float32 [n], and the code of the guard that rejected the image, or 0, int8 [n]."""
    starts = range(0, len(images), batch_size)
    batches = [detector.detect(np.ascontiguousarray(images[start : start + batch_size, None])) for start in starts]
    return (
        np.concatenate([np.zeros(0, np.float32), *(batch.mse for batch in batches)]),
        np.concatenate([np.zeros(0, np.int8), *(batch.reason for batch in batches)]),
    )


def score_alone(detector: Detector, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Return the scores and codes of calibration images as `score_with_reasons` does, from a forward pass per image.

    The service scores an image near the threshold in the same way, so the image whose score is the threshold is normal.
    The number of threads of training changes no score.
    """
    with one_thread():
        found = [detector.score(np.ascontiguousarray(image[None, None])) for image in images]
    return (
        np.concatenate([np.zeros(0, np.float32), *(mse for mse, _ in found)]),
        np.concatenate([np.zeros(0, np.int8), *(reason for _, reason in found)]),
    )


def guard_counts(reason: NDArray[np.int8], names: Sequence[str]) -> dict[str, int]:
    """Return the number of images that each guard rejected. Guards that rejected no image are left out.

    Args:
        reason: code of each image, int8 [n]; code k means `names[k - 1]`.
        names: names of the guards.
    """
    counts = {name: int((reason == code).sum()) for code, name in enumerate(names, 1) if name != LOCAL}
    return {name: count for name, count in counts.items() if count}


def check_guards(
    scores: NDArray[np.float32],
    reason: NDArray[np.int8],
    names: Sequence[str],
    *,
    threshold: float,
    guard_error: float,
) -> dict[str, int]:
    """Return the number of calibration images that each guard rejected.

    Args:
        scores: MSE of the calibration images, float32 [n].
        reason: guard code of each image, int8 [n].
        names: names of the guards.
        threshold: threshold that follows from the scores.
        guard_error: score of every image that a guard rejects.

    Raises:
        CalibrationError: the threshold is not below the score of rejected images, which would then be normal.
    """
    counts = guard_counts(reason, names)
    rejected = np.isin(reason, [code for code, name in enumerate(names, 1) if name != LOCAL])
    if counts and threshold >= scores[rejected].min():
        raise CalibrationError(
            f"{describe_guard_counts(counts, len(scores))}, so many that no image would be anomalous: "
            "give bright strokes on a dark background, or remove these images"
        )
    if threshold >= guard_error:
        raise CalibrationError(
            f"the threshold {threshold:.6g} is not below {guard_error:g}, the error of images that a guard rejects, so "
            "an empty image would be normal: the model cannot reconstruct these images; train one on such images"
        )
    return counts


def guard_error(parameters: Mapping[str, Any]) -> float:
    """Return the score of images that a guard rejects, from the parameters of a recipe; infinite without guards."""
    return float(parameters.get("guards", {}).get("guard_error", math.inf))


def describe_guard_counts(counts: Mapping[str, int], n: int) -> str:
    """Return in words how many of the `n` calibration images each guard rejected."""
    each = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"guards rejected {sum(counts.values()):,} of the {n:,} calibration images ({each})"


def calibrate(
    scores: NDArray[np.float32], alpha: float, confidence: float | None = None
) -> tuple[Calibration, CalibrationSummary]:
    """Return the calibration, which gives the threshold for any false-positive rate, and its summary.

    Args:
        scores: MSE of normal images that were not trained on, float32 [n], in any order.
        alpha: false-positive rate of the version.
        confidence: probability over calibration draws with which the false-positive rate is at most `alpha`; None for
            a guarantee on average over calibration draws.

    Raises:
        CalibrationError: there are too few images; the message contains the minimum number.
    """
    calibration = Calibration(np.sort(scores).astype(float).tolist(), confidence)
    rank = calibration.rank(alpha)
    n = len(scores)
    return calibration, CalibrationSummary(
        n=n, rank=rank, confidence=confidence, band_level=BAND_LEVEL, band=band(n, rank)
    )


def smallest_alpha(n: int, confidence: float | None = None) -> float | None:
    """Return the smallest false-positive rate for `n` calibration images, rounded up to two digits.

    None if `n` is too small for every rate below 1.
    """
    if n < 1:
        return None
    exact = 1 / (n + 1) if confidence is None else max(1 / (n + 1), -math.expm1(math.log1p(-confidence) / n))
    step = Decimal(10) ** (math.floor(math.log10(exact)) - 1)
    rate = math.floor(Decimal(exact) / step) * step
    while rate < 1:
        if rate > 0 and needed(float(rate), confidence) <= n:
            return float(rate)
        rate += step
    return None


def band(n: int, rank: int, level: float = BAND_LEVEL) -> tuple[float, float]:
    """Return the interval that contains the false-positive rate with probability `level`.

    The threshold is the score at rank `rank` of `n` calibration scores. The rate is distributed as
    Beta(n + 1 - rank, rank). Source: Vovk, "Conditional validity of inductive conformal predictors", 2012.
    """
    distribution = stats.beta(n + 1 - rank, rank)
    low, high = distribution.ppf([(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def count_band(n: int, rank: int, fresh: int, level: float = BAND_LEVEL) -> tuple[int, int]:
    """Return the interval that contains the number of false positives with probability `level`.

    The threshold is as for `band`, and is applied to `fresh` new normal images. The number has a beta-binomial
    distribution: the rate varies with the calibration images, and the number with the new images.
    """
    distribution = stats.betabinom(fresh, n + 1 - rank, rank)
    low, high = distribution.ppf([(1 - level) / 2, (1 + level) / 2])
    return int(low), int(high)
