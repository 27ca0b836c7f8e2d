"""Versions: the manifest of a small one, and the shipped one on test images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from app.inference.detector import Detector
from app.models.calibration import CalibrationError
from app.models.repository import Artifact, Repository
from tests.near import Noisy
from tests.training.conftest import CPU, MODEL_STORE, small_job
from training.data.dataset import DataError, Dataset
from training.data.splits import article, standard
from training.evaluation.calibrate import count_band, score, score_alone
from training.evaluation.figures import ranking
from training.pipeline.make import make_version


@pytest.fixture(scope="module")
def shipped() -> Artifact:
    """Return the shipped reference model."""
    return Repository(MODEL_STORE).open("zero-article", 1)


@pytest.fixture(scope="module")
def unseen(shipped, full_mnist: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and scores of the shipped model's test images."""
    test = article(full_mnist, (0,), shipped.manifest.recipe.seed).test
    return full_mnist.labels[test], score(Detector.load(shipped, CPU), full_mnist.images[test])


def test_a_version_says_how_it_was_made(draft, digits):
    """The manifest contains source, checksum and counts of the data, and the parameters."""
    data, recipe = draft.manifest.data, draft.manifest.recipe
    assert (data.name, data.source, data.sha256) == (digits.name, digits.source, digits.sha256)
    assert (data.train, data.calibration, data.test_normal, data.test_anomalous) == (300, 100, 100, 4500)
    assert recipe.parameters == {
        "autoencoder": "article",
        "input_range": [-1.0, 1.0],
        "learning_rate": 1e-3,
        "batch_size": 50,
        "epochs": 2,
        "split": "standard",
        "threads": 1,
    }


def test_the_threshold_is_of_scores_by_the_exported_bytes(draft, digits, detector):
    """The threshold is one of the exported module's scores of the calibration images."""
    scores = np.sort(score_alone(detector, digits.images[standard(digits, (0,), 0).calibration])[0])
    assert draft.manifest.threshold == float(scores[draft.manifest.calibration.rank - 1])


@pytest.mark.process  # a version records the commit, which comes from git
def test_a_calibration_score_is_that_of_the_image_alone(monkeypatch, digits):
    """If scores of several images together are off, the calibration scores and the threshold are not."""
    opened: list[Noisy] = []

    class NoisyDetector:
        @staticmethod
        def open(content: bytes, device: torch.device) -> Noisy:
            opened.append(Noisy(Detector.open(content, device)))
            return opened[0]

    monkeypatch.setitem(make_version.__globals__, "Detector", NoisyDetector)
    draft = make_version(small_job(epochs=1), digits, progress=lambda *_: None)
    images = digits.images[standard(digits, (0,), 0).calibration]
    alone = sorted(opened[0].score_alone(np.ascontiguousarray(image[None, None])) for image in images)
    assert np.load(io.BytesIO(draft.files["calibration.npy"])).tolist() == alone
    assert draft.manifest.threshold == alone[draft.manifest.calibration.rank - 1]


def test_the_number_of_threads_changes_no_calibration_score(digits):
    """Training may use several threads and the service uses one, which rounds the scores of `zero` differently."""
    detector = Detector.load(Repository(MODEL_STORE).open("zero", 1), CPU)
    images = digits.images[digits.labels == 0][:50]
    alone = [detector.score_alone(np.ascontiguousarray(image[None, None])) for image in images]
    torch.set_num_threads(2)
    try:
        scores, reasons = score_alone(detector, images)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert (scores.tolist(), reasons.any()) == (alone, False)
    assert score_alone(detector, images[:0])[0].shape == (0,)


def test_too_few_images_are_said_before_training(digits):
    """Too few calibration images for the rate are an error before the first epoch."""
    job = small_job(epochs=1)
    told: list[int] = []
    with pytest.raises(CalibrationError, match="999 calibration images"):
        make_version(type(job)(**{**vars(job), "alpha": 0.001}), digits, progress=lambda epoch, _: told.append(epoch))
    assert told == []


def test_a_class_without_images_is_refused(digits):
    """A normal class without images is an error."""
    others = digits.labels != 0
    without = Dataset("x", "test", digits.images[others], digits.labels[others], digits.label_names, "digit", None)
    with pytest.raises(DataError, match="too few"):
        make_version(small_job(), without, progress=lambda *_: None)


def test_the_shipped_model_was_made_from_all_of_mnist(shipped, full_mnist):
    """The shipped model's manifest has the checksum and counts of all of MNIST, and no path."""
    data = shipped.manifest.data
    assert data.sha256 == full_mnist.sha256
    assert (data.train, data.calibration, data.test_normal, data.test_anomalous) == (4800, 1200, 903, 9020)
    assert "/" not in data.source


def test_the_shipped_model_reaches_what_the_articles_recipe_reaches(shipped, unseen):
    """The AUROC on the rest of the test file is 0.81 within 0.03, and that of the manifest."""
    labels, scores = unseen
    auroc = ranking(scores[labels == 0], scores[labels != 0])["auroc"]
    assert auroc == pytest.approx(0.81, abs=0.03)
    assert auroc == pytest.approx(shipped.manifest.metrics["auroc"], abs=1e-4)


@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_false_alarms_on_unseen_zeros_lie_in_the_exact_band(shipped, unseen, alpha):
    """On more than 900 test zeros, false positives are in the exact 99 % interval of the calibration."""
    labels, scores = unseen
    zeros = scores[labels == 0]
    assert len(zeros) > 900
    low, high = count_band(shipped.manifest.calibration.n, shipped.calibration.rank(alpha), len(zeros), 0.99)
    assert low <= (zeros > shipped.calibration.threshold(alpha)).sum() <= high


def test_unseen_zeros_have_uniform_p_values(shipped, unseen):
    """The p-values of test zeros are uniformly distributed (Kolmogorov-Smirnov)."""
    labels, scores = unseen
    found = np.sort([shipped.calibration.p_value(float(mse)) for mse in scores[labels == 0]])
    distance = np.abs(found - (np.arange(len(found)) + 0.5) / len(found)).max()
    # The two-sample Kolmogorov-Smirnov bound at 0.1 % for 903 and 1,200 images.
    assert distance < 1.95 * np.sqrt(1 / 903 + 1 / 1200)
