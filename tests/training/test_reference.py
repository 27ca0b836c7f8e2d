"""The article's model with which a report compares."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.training.conftest import small_job
from training.data.dataset import Dataset
from training.pipeline.make import make_version
from training.pipeline.reference import reference_version


def folder_of(digits: Dataset, label: int) -> Dataset:
    """Return 150 images of a label as a folder of PNGs holds them."""
    images = digits.images[digits.labels == label][:150]
    return Dataset("folder", "folder of PNG files", images, np.zeros(150, np.uint8), ("normal", "odd"), "image", None)


def test_a_model_of_another_folder_is_no_reference(tmp_path, digits):
    """The article's model of a folder of PNGs is a reference for the same images, not for another folder."""
    zeros, sixes = folder_of(digits, 0), folder_of(digits, 6)
    job = replace(small_job("folder-0-article", epochs=1), alpha=0.1)
    make_version(job, zeros, progress=lambda *_: None).publish(tmp_path, promote=True)
    assert reference_version(tmp_path, zeros, (0,), "mine") == ("folder-0-article", 1)
    assert reference_version(tmp_path, sixes, (0,), "mine") is None
