"""Which images train, which calibrate, which test: disjoint, and nothing anomalous before the test.

Knows: labels and order. Does not know: pixels, models. Every split is a pure function of the data set and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import DataError, Dataset

ARTICLE_FIRST = 6_000
_LEAST = 3
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Split:
    """Three disjoint lists of positions in a data set.

    Attributes:
        name: of the split.
        train: normal images to learn from.
        calibration: normal images that choose the threshold; never learned from.
        test: normal and anomalous images of the headline figures; neither learned from nor calibrated on.
        test_words: what the test images are.
        also: further test sets by what they are, equally unseen.
    """

    name: str
    train: Indices
    calibration: Indices
    test: Indices
    test_words: str
    also: Mapping[str, Indices] = field(default_factory=dict)


def standard(dataset: Dataset, normal: Sequence[int], seed: int) -> Split:
    """Train on 80 % of the class's images of the training file, calibrate on 20 %, test on the whole test file.

    A set without a test file keeps back 20 % of every normal label for the test, and calibrates on another 20 % of the
    class. Its other images can do nothing but test, so all of them do.

    Raises:
        DataError: the normal class has too few images to divide.
    """
    is_normal = np.isin(dataset.labels, normal)
    if dataset.test_start is None:
        return _standard_without_test_file(dataset, is_normal, seed)
    pool = np.flatnonzero(is_normal[: dataset.test_start])
    train, calibration = _cut(np.random.default_rng(seed).permutation(pool), 0.8)
    test = np.arange(dataset.test_start, len(dataset.labels))
    return Split("standard", train, calibration, test, f"the {len(test):,} images of the test file")


def article(dataset: Dataset, normal: Sequence[int], seed: int) -> Split:
    """Divide as the founding article did: the first 6,000 of the class to learn from, all the rest to test.

    The last 1,200 of those 6,000 calibrate and are not trained on. For zeros the 6,000 reach 77 images into the test
    file, so the headline is measured on the *rest of the test file* (903 zeros and 9,020 others), which compares with
    published figures; the article's own test (903 zeros and 63,097 others) is measured beside it. A set with too few
    images for this is divided by `standard`.
    """
    of_class = np.flatnonzero(np.isin(dataset.labels, normal))
    if dataset.test_start is None or len(of_class) <= ARTICLE_FIRST:
        return standard(dataset, normal, seed)
    train, calibration = _cut(of_class[:ARTICLE_FIRST], 0.8)
    rest = np.setdiff1d(np.arange(len(dataset.labels)), of_class[:ARTICLE_FIRST])
    test = rest[rest >= dataset.test_start]
    words = f"the {len(test):,} images of the test file that the article's first {ARTICLE_FIRST:,} leave"
    return Split("article", train, calibration, test, words, {"the article's own test: all that it left": rest})


SPLITS: dict[str, Callable[[Dataset, Sequence[int], int], Split]] = {"article": article, "standard": standard}


def _standard_without_test_file(dataset: Dataset, is_normal: NDArray[np.bool_], seed: int) -> Split:
    count = is_normal.sum()
    if count < _LEAST:
        raise DataError(
            f"{count} images are too few to divide into training, calibration and test; {_LEAST} are the least"
        )
    random = np.random.default_rng(seed)
    kept: list[Indices] = [np.zeros(0, np.intp)]
    test: list[Indices] = [np.flatnonzero(~is_normal)]
    for label in np.unique(dataset.labels[is_normal]):
        first, last = _cut(random.permutation(np.flatnonzero(dataset.labels == label)), 0.8)
        kept.append(first)
        test.append(last)
    train, calibration = _cut(random.permutation(np.concatenate(kept)), 0.75)
    words = "20 % of the normal images, kept back before training, and all others"
    return Split("standard", train, calibration, np.concatenate(test), words)


def _cut(positions: Indices, share: float) -> tuple[Indices, Indices]:
    at = int(len(positions) * share)
    if at == 0 or at == len(positions):
        raise DataError(f"{len(positions)} images are too few to divide into training and calibration or test")
    return positions[:at], positions[at:]
