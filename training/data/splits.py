"""The splits of a data set: disjoint training, calibration and test images, with anomalous images in the test only.

Every split is a pure function of the data set, the normal class and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import DataError, Dataset

ARTICLE_COUNT = 6_000
"""Number of images of the class that the founding article trains on."""
_MIN_IMAGES = 3
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of indices into a data set.

    Attributes:
        name: name of the split.
        train: normal images for training.
        calibration: normal images for the threshold.
        test: normal and anomalous images for the main metrics.
        test_description: the test images in words.
        further_tests: more test sets by description, also disjoint from `train` and `calibration`.
    """

    name: str
    train: Indices
    calibration: Indices
    test: Indices
    test_description: str
    further_tests: Mapping[str, Indices] = field(default_factory=dict)


def standard(dataset: Dataset, normal: Sequence[int], seed: int) -> Split:
    """Train on 80 % of the class's images in the training file, calibrate on 20 %, test on the whole test file.

    In a set without a test file, 60 % of the normal images train, 20 % calibrate and 20 % of every normal label test;
    all other images test.

    Raises:
        DataError: the normal class has too few images.
    """
    is_normal = np.isin(dataset.labels, normal)
    if dataset.test_start is None:
        return _without_test_file(dataset, is_normal, seed)
    indices = np.flatnonzero(is_normal[: dataset.test_start])
    train, calibration = _divide(np.random.default_rng(seed).permutation(indices), 0.8)
    test = np.arange(dataset.test_start, len(dataset.labels))
    return Split("standard", train, calibration, test, f"the {len(test):,} images of the test file")


def article(dataset: Dataset, normal: Sequence[int], seed: int) -> Split:
    """Use the first 6,000 images of the class for training, as the founding article does, and test on the rest.

    The last 1,200 of these 6,000 calibrate instead of train. For zeros, 77 of the 6,000 are in the test file. The main
    metrics are therefore of the rest of the test file (903 zeros and 9,020 others), which is comparable with published
    results; the article's own test (903 zeros and 63,097 others) is a further test. A set with too few images of the
    class is split by `standard`.
    """
    of_class = np.flatnonzero(np.isin(dataset.labels, normal))
    if dataset.test_start is None or len(of_class) <= ARTICLE_COUNT:
        return standard(dataset, normal, seed)
    train, calibration = _divide(of_class[:ARTICLE_COUNT], 0.8)
    rest = np.setdiff1d(np.arange(len(dataset.labels)), of_class[:ARTICLE_COUNT])
    test = rest[rest >= dataset.test_start]
    description = f"the {len(test):,} images of the test file outside the article's first {ARTICLE_COUNT:,}"
    return Split("article", train, calibration, test, description, {"the article's own test: all other images": rest})


SPLITS: dict[str, Callable[[Dataset, Sequence[int], int], Split]] = {"article": article, "standard": standard}


def _without_test_file(dataset: Dataset, is_normal: NDArray[np.bool_], seed: int) -> Split:
    count = is_normal.sum()
    if count < _MIN_IMAGES:
        raise DataError(f"{count} images are too few for training, calibration and test; the minimum is {_MIN_IMAGES}")
    generator = np.random.default_rng(seed)
    remaining: list[Indices] = [np.zeros(0, np.intp)]
    test: list[Indices] = [np.flatnonzero(~is_normal)]
    for label in np.unique(dataset.labels[is_normal]):
        first, last = _divide(generator.permutation(np.flatnonzero(dataset.labels == label)), 0.8)
        remaining.append(first)
        test.append(last)
    train, calibration = _divide(generator.permutation(np.concatenate(remaining)), 0.75)
    others = "" if is_normal.all() else ", and all others"
    description = f"20 % of the normal images, held out from training{others}"
    return Split("standard", train, calibration, np.concatenate(test), description)


def images_needed(calibration: int, *, has_test_file: bool) -> int:
    """Return the minimum number of normal images for a split with at least `calibration` calibration images.

    Args:
        calibration: minimum number of calibration images.
        has_test_file: whether the data set has a test file, whose images are not counted.
    """
    total = max(2 if has_test_file else _MIN_IMAGES, 5 * calibration - 10)
    while _calibration_count(total, has_test_file=has_test_file) < calibration:
        total += 1
    return total


def _calibration_count(total: int, *, has_test_file: bool) -> int:
    if has_test_file:
        return total - int(total * 0.8)
    remaining = int(total * 0.8)
    return remaining - int(remaining * 0.75)


def _divide(indices: Indices, share: float) -> tuple[Indices, Indices]:
    """Return the first `share` of the indices, and the others."""
    count = int(len(indices) * share)
    if count == 0 or count == len(indices):
        raise DataError(f"{len(indices)} images are too few for training and calibration or test")
    return indices[:count], indices[count:]
