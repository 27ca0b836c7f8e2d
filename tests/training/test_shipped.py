"""The accuracy of the shipped default model, measured on MNIST's test file."""

from __future__ import annotations

import numpy as np
import pytest

from app.inference.detector import Detections, Detector
from app.models.calibration import Calibration
from app.models.repository import Repository
from app.settings import Settings
from tests.training.conftest import CPU, MODEL_STORE
from training.data.splits import SPLITS
from training.evaluation.calibrate import count_band
from training.evaluation.figures import ranking
from training.evaluation.probes import probes


@pytest.fixture(scope="module")
def artifact():
    """Return the current version of the default model, its checksums compared."""
    repository = Repository(MODEL_STORE)
    name = Settings.model_fields["default_model"].default
    return repository.open(name, repository.current(name))


@pytest.fixture(scope="module")
def detector(artifact) -> Detector:
    """Return it, its golden scores compared."""
    return Detector.load(artifact, CPU)


@pytest.fixture(scope="module")
def calibration(artifact) -> Calibration:
    """Return its thresholds."""
    calibration: Calibration = artifact.calibration
    return calibration


def detect(detector: Detector, images: np.ndarray) -> Detections:
    """Score images, uint8 [n, 28, 28], 250 at a time."""
    parts = [detector.detect(np.array(images[at : at + 250, None], order="C")) for at in range(0, len(images), 250)]
    outputs = ("mse", "reconstruction", "error_map", "reason")
    return Detections(*(np.concatenate([getattr(part, name) for part in parts]) for name in outputs))


@pytest.fixture(scope="module")
def normals(full_mnist) -> np.ndarray:
    """Return the 980 zeros of the test file."""
    images, labels = full_mnist.images[full_mnist.test_start :], full_mnist.labels[full_mnist.test_start :]
    return images[labels == 0]


@pytest.fixture(scope="module")
def scores(detector, full_mnist, normals) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of the test file's zeros, and of all its other digits."""
    images, labels = full_mnist.images[full_mnist.test_start :], full_mnist.labels[full_mnist.test_start :]
    return detect(detector, normals).mse, detect(detector, images[labels != 0]).mse


def test_it_ranks_the_test_file(scores):
    """The AUROC over the 10,000 images of the test file is at least 0.9985."""
    normal, anomalous = scores
    assert (len(normal), len(anomalous)) == (980, 9020)
    assert ranking(normal, anomalous)["auroc"] >= 0.9985


@pytest.mark.parametrize(("alpha", "least"), [(0.01, 0.98), (0.05, 0.997)])
def test_it_catches_other_digits(scores, calibration, alpha, least):
    """The recall on other digits is at least 98 % at alpha 1 %, and at least 99.7 % at alpha 5 %."""
    assert (scores[1] > calibration.threshold(alpha)).mean() >= least


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_it_raises_as_many_false_alarms_as_it_says(scores, calibration, alpha):
    """The number of false positives among test zeros is in the exact 99 % interval of the calibration."""
    low, high = count_band(len(calibration.scores), calibration.rank(alpha), len(scores[0]))
    assert low <= (scores[0] > calibration.threshold(alpha)).sum() <= high


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_the_article_raises_as_many_false_alarms_as_it_says(full_mnist, alpha):
    """The same holds for `zero-article`, on the test zeros of its own split."""
    repository = Repository(MODEL_STORE)
    artifact = repository.open("zero-article", repository.current("zero-article"))
    recipe = artifact.manifest.recipe
    split = SPLITS[recipe.parameters["split"]](full_mnist, artifact.manifest.data.normal, recipe.seed)
    zeros = split.test[full_mnist.labels[split.test] == 0]
    assert len(zeros) == artifact.manifest.data.test_normal == 903
    calibration = artifact.calibration
    low, high = count_band(len(calibration.scores), calibration.rank(alpha), len(zeros))
    mse = detect(Detector.load(artifact, CPU), full_mnist.images[zeros]).mse
    assert low <= (mse > calibration.threshold(alpha)).sum() <= high


def test_what_is_no_digit_is_always_caught(detector, normals, calibration, artifact):
    """All images outside the class are anomalous, and the guards reject blank and white ones."""
    by_name = {probe.name: probe for probe in probes(normals) if probe.kind == "nothing"}
    reasons = {}
    for name, probe in by_name.items():
        found = detect(detector, probe.images)
        assert (found.mse > calibration.threshold(0.01)).all(), name
        reasons[name] = {artifact.manifest.reasons[code - 1] for code in found.reason if code}
    assert reasons["blank"] == reasons["a single lit pixel"] == {"empty"}
    assert reasons["white"] == reasons["inverted"] == {"too_much_ink"}
    assert reasons["sparse noise"] == set()


def test_no_real_zero_is_guarded(detector, normals):
    """No guard rejects a zero of the test file, at full contrast or a fifth of it."""
    for contrast in (1.0, 0.2):
        assert not detect(detector, np.round(normals * contrast).astype(np.uint8)).reason.any()


@pytest.mark.parametrize("contrast", [0.2, 0.5, 0.8])
def test_contrast_hardly_moves_a_score(detector, normals, calibration, contrast):
    """With less contrast, scores agree within 1 % (median and mean; pixels are integers), and so do verdicts.

    For at most one zero in 200, rounding moves the score across the threshold.
    """
    whole = detect(detector, normals).mse
    pale = detect(detector, np.round(normals * contrast).astype(np.uint8)).mse
    assert np.median(np.abs(pale / whole - 1)) < 0.01
    assert abs(pale.mean() / whole.mean() - 1) < 0.01
    threshold = calibration.threshold(0.01)
    assert ((pale > threshold) != (whole > threshold)).mean() <= 0.005


def test_a_zero_is_redrawn_and_a_six_is_not(detector, full_mnist):
    """The reconstruction error in pixels is small for zeros, and more than twice as large for sixes."""
    images, labels = full_mnist.images[full_mnist.test_start :], full_mnist.labels[full_mnist.test_start :]

    def difference(label: int) -> float:
        pixels = images[labels == label][:200]
        redrawn = detect(detector, pixels).reconstruction[:, 0]
        return float(np.square(redrawn - pixels / 255).mean())

    assert difference(0) < 0.02
    assert difference(6) > 2 * difference(0)


def test_the_store_stays_small():
    """All shipped versions together have less than 25 MiB, and the default one less than 5 MiB."""
    assert sum(path.stat().st_size for path in MODEL_STORE.rglob("*") if path.is_file()) < 25 * 2**20
    assert sum(path.stat().st_size for path in (MODEL_STORE / "zero" / "1").rglob("*") if path.is_file()) < 5 * 2**20
