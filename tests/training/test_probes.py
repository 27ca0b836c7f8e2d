"""The probes: kinds, names and reproducibility."""

from __future__ import annotations

import numpy as np
import pytest

from training.evaluation.probes import KINDS, probes


@pytest.fixture(scope="module")
def zeros(digits):
    """Return 20 real zeros."""
    return digits.images[digits.labels == 0][:20]


def test_probes_are_raw_images_of_every_kind(zeros):
    """Every probe is uint8 [n, 28, 28], names are unique, and every kind occurs."""
    found = probes(zeros)
    assert {probe.kind for probe in found} == set(KINDS)
    assert len({probe.name for probe in found}) == len(found)
    assert {(probe.images.dtype.str, probe.images.shape[1:]) for probe in found} == {("|u1", (28, 28))}


def test_probes_are_the_same_every_time(zeros):
    """Probes are deterministic, so that tables of two versions can be compared."""
    for one, other in zip(probes(zeros), probes(zeros), strict=True):
        assert (one.images == other.images).all(), one.name


def test_probes_are_what_they_are_called(zeros):
    """Shift, contrast, erasure, inversion, rotation, dilation and scaling have the effect in their names."""
    by_name = {probe.name: probe.images for probe in probes(zeros)}
    assert (by_name["moved by 2 px"][:, :, 2:] == zeros[:, :, :-2]).all()
    assert np.abs(by_name["contrast 0.5"] - zeros / 2).max() <= 0.5
    assert not by_name["lower half erased"][:, 14:].any()
    assert (by_name["inverted"] == 255 - zeros).all()
    assert (by_name["4x4 square in a corner"][:, 2:6, 2:6] == 255).all()
    assert (by_name["upside down"][:, ::-1, ::-1] == zeros).all()
    assert (by_name["thicker by a pixel all round"] >= zeros).all()
    assert by_name["scaled to 50 %"].sum() < 0.4 * zeros.sum()


def test_another_data_set_is_one_more_probe(zeros):
    """Another data set is a probe of at most 500 images."""
    clothes = np.zeros((600, 28, 28), np.uint8)
    names = {probe.name: len(probe.images) for probe in probes(zeros, clothes)}
    assert names["Fashion-MNIST"] == 500
    assert "Fashion-MNIST" not in {probe.name for probe in probes(zeros)}
