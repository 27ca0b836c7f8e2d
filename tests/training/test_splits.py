"""The splits: disjoint, normal images only in training and calibration, deterministic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.dataset import DataError, Dataset
from training.data.splits import SPLITS, Split, article, images_needed, standard


def labelled(labels: list[int], test_start: int | None = None) -> Dataset:
    """Return a data set with these labels and blank images."""
    pixels = np.zeros((len(labels), 28, 28), np.uint8)
    return Dataset("any", "test", pixels, np.array(labels, np.uint8), tuple("0123"), "digit", test_start)


def check(split: Split, dataset: Dataset, normal: tuple[int, ...]) -> None:
    """Fail unless the split is disjoint, and normal in training and calibration."""
    for test in (split.test, *split.further_tests.values()):
        seen = np.concatenate([split.train, split.calibration, test])
        assert len(np.unique(seen)) == len(seen)
    learned = np.concatenate([split.train, split.calibration])
    assert np.isin(dataset.labels[learned], normal).all()
    assert len(split.train) > 0
    assert len(split.calibration) > 0


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("normal", [(0,), (3, 5), tuple(range(10))], ids=str)
def test_every_split_keeps_its_promises_on_real_digits(digits, name, normal):
    """Training, calibration and test images are disjoint, and the first two are normal."""
    check(SPLITS[name](digits, normal, 0), digits, normal)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("normal", [(0,), (5,), (3, 5), tuple(range(10))], ids=str)
def test_every_split_keeps_its_promises_on_all_of_mnist(full_mnist, name, normal):
    """Training, calibration and test images are disjoint, and the first two are normal."""
    check(SPLITS[name](full_mnist, normal, 0), full_mnist, normal)


@given(
    st.lists(st.integers(0, 3), max_size=80),
    st.sets(st.integers(0, 3), min_size=1),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(0, 80)),
)
def test_any_labels_split_cleanly_or_are_refused(labels, normal, seed, test_start):
    """For any labels, the standard split is disjoint, or the error is that there are too few images."""
    dataset = labelled(labels, None if test_start is None else min(test_start, len(labels)))
    try:
        split = standard(dataset, tuple(normal), seed)
    except DataError as error:
        assert "too few" in str(error)
    else:
        check(split, dataset, tuple(normal))


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_is_a_function_of_its_arguments(digits, name):
    """The same seed gives the same split, and another seed another one."""
    first, again, other = (SPLITS[name](digits, (0,), seed) for seed in (0, 0, 1))
    assert (first.train == again.train).all()
    assert (first.test == again.test).all()
    assert not (first.train == other.train).all()


def test_the_standard_split_tests_on_the_whole_test_file(full_mnist):
    """With two files, the training file is split 80 to 20, and the whole test file tests."""
    split = standard(full_mnist, (0,), 0)
    assert (len(split.train), len(split.calibration)) == (4738, 1185)
    assert split.test.tolist() == list(range(60_000, 70_000))


def test_the_articles_split_is_the_articles(full_mnist):
    """The first 6,000 zeros train and calibrate; 903 zeros and 63,097 others test, 9,020 of them in the test file."""
    split = article(full_mnist, (0,), 0)
    zeros = np.flatnonzero(full_mnist.labels == 0)
    assert np.concatenate([split.train, split.calibration]).tolist() == zeros[:6000].tolist()
    assert len(split.calibration) == 1200
    own = next(iter(split.further_tests.values()))
    assert np.bincount(full_mnist.labels[own] != 0).tolist() == [903, 63_097]
    assert np.bincount(full_mnist.labels[split.test] != 0).tolist() == [903, 9_020]
    assert split.test.min() >= 60_000


def test_the_articles_split_needs_six_thousand(digits):
    """A set with fewer images of the class has the standard split."""
    assert article(digits, (0,), 0).name == "standard"


def test_all_that_is_not_normal_tests():
    """Without a test file, all anomalous images, even a single one, and 20 % of the normal images test."""
    split = standard(labelled([0] * 50 + [1]), (0,), 0)
    assert (len(split.train), len(split.calibration)) == (30, 10)
    assert 50 in split.test
    assert len(split.test) == 11


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_to_divide_are_counted_before_they_are_divided(count):
    """The error contains the number of normal images before any division; three are enough."""
    with pytest.raises(DataError, match=f"^{count} images are too few .*; the minimum is 3"):
        standard(labelled([0] * count + [1] * 9), (0,), 0)
    check(standard(labelled([0] * 3), (0,), 0), labelled([0] * 3), (0,))


@pytest.mark.parametrize("has_test_file", [False, True])
@given(needed=st.integers(1, 300))
def test_the_number_of_images_needed_is_the_minimum(has_test_file: bool, needed: int) -> None:
    """The split of that many images calibrates with enough of them, and the split of one image less does not."""
    total = images_needed(needed, has_test_file=has_test_file)
    for count, enough in ((total, True), (total - 1, False)):
        try:
            found = standard(labelled([0] * count, count if has_test_file else None), (0,), seed=0)
        except DataError:  # too few for any split
            assert not enough or needed == 1
            continue
        assert (len(found.calibration) >= needed) is enough
