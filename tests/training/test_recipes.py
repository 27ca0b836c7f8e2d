"""The contract of the artifact for every recipe of the table."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from app.inference.detector import Detector
from app.models.manifest import LOCAL
from tests.training.conftest import CPU, ROOT
from training.data.dataset import DataError, Dataset
from training.data.loaders import fashion_mnist
from training.data.splits import SPLITS
from training.networks.scoring import LOCAL_CODE
from training.pipeline.make import TrainingJob, make_version
from training.publishing.export import export
from training.recipes.table import RECIPES

GUARDED = [name for name, recipe in RECIPES.items() if recipe.reasons]


def signals(name: str) -> set[int]:
    """Return the codes of images that no guard rejected."""
    reasons = RECIPES[name].reasons
    return {0, reasons.index(LOCAL) + 1} if LOCAL in reasons else {0}


def fit(name: str, images: np.ndarray, seed: int = 0) -> nn.Module:
    """Fit a recipe for at most two epochs."""
    recipe = RECIPES[name].with_epochs(2)
    return recipe.fit(images, recipe.parameters, seed=seed, device=CPU, progress=lambda _epoch, _loss: None)


@pytest.fixture(scope="module")
def detectors(digits) -> dict[str, Detector]:
    """Return a small exported model of zeros of each recipe, opened as the service opens it."""
    zeros = digits.images[digits.labels == 0]
    return {name: Detector.open(export(fit(name, zeros), digits.images[::250]).model, CPU) for name in RECIPES}


def test_every_recipe_is_documented():
    """The table of recipes in docs/training.md has one row for each recipe, and no other rows."""
    page = (ROOT / "docs" / "training.md").read_text()
    section = page[page.index("## The recipes") : page.index("## All labels")]
    assert set(re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_an_entry_is_complete(name):
    """An entry has its name as key, an existing split, and parameters that are JSON values."""
    recipe = RECIPES[name]
    assert recipe.name == name
    assert recipe.split in SPLITS
    assert json.loads(json.dumps(dict(recipe.parameters))) == dict(recipe.parameters)
    assert recipe.summary
    assert recipe.score_space


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_an_artifact_and_repeats_itself(name, digits):
    """The same images and seed give the same scores; with epochs, another seed gives others."""

    def scores(seed: int) -> np.ndarray:
        return export(fit(name, digits.images[:200], seed), digits.images[::250]).golden.mse

    first = scores(0)
    assert (first == scores(0)).all()
    assert len(first) == 20
    assert (first == scores(1)).all() == ("epochs" not in RECIPES[name].parameters)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_leaves_the_caller_s_chance_alone(name, digits):
    """Fitting leaves torch's global generator unchanged."""
    before = torch.random.get_rng_state()
    fit(name, digits.images[:100])
    assert (torch.random.get_rng_state() == before).all()


@pytest.mark.parametrize("name", RECIPES)
def test_the_score_is_the_mean_of_the_error_map(name, detectors, digits):
    """The four outputs have the contract's shapes and types, and mse is the mean of the error map."""
    found = detectors[name].detect(digits.images[::700, None].copy())
    n = len(digits.images[::700])
    outputs = (found.mse, found.reconstruction, found.error_map, found.reason)
    assert [(x.shape, x.dtype) for x in outputs] == [
        ((n,), np.float32), ((n, 1, 28, 28), np.float32), ((n, 28, 28), np.float32), ((n,), np.int8),
    ]  # fmt: skip
    assert np.allclose(found.mse, found.error_map.mean((1, 2)), rtol=1e-6, atol=0)
    assert 0.0 <= found.reconstruction.min() <= found.reconstruction.max() <= 1.0
    assert set(found.reason.tolist()) <= signals(name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_score_does_not_depend_on_its_batch(name, detectors, digits):
    """An image gets the same score, within 1e-6 relative, in every batch of 1 to 64 images."""
    images = np.ascontiguousarray(digits.images[:: len(digits.images) // 64][:64, None])
    alone = np.concatenate([detectors[name].detect(image[None]).mse for image in images])
    for size in range(1, 65):
        parts = [detectors[name].detect(images[start : start + size]).mse for start in range(0, 64, size)]
        assert np.abs(np.concatenate(parts) / alone - 1).max() <= 1e-6, size


@pytest.mark.parametrize("name", GUARDED)
@pytest.mark.parametrize(
    ("pixel", "reason"), [(0, "empty"), (255, "too_much_ink"), (127, None)], ids=["blank", "white", "half grey"]
)
def test_a_guard_names_itself(name, detectors, pixel, reason):
    """A blank and a white image have their reason and the guard error; half grey has no reason."""
    found = detectors[name].detect(np.full((1, 1, 28, 28), pixel, np.uint8))
    names = dict(enumerate((None, *RECIPES[name].reasons)))
    assert names[int(found.reason[0])] in ({reason} if reason else {None, LOCAL})
    if reason:
        assert found.mse[0] == RECIPES[name].parameters["guards"]["guard_error"]


@pytest.mark.parametrize("name", GUARDED)
@pytest.mark.parametrize("contrast", [0.2, 0.5, 0.8])
def test_contrast_does_not_matter(name, detectors, digits, contrast):
    """With less contrast the mean score is the same within 1 %, and each score within 5 % (pixels are integers)."""
    images = digits.images[:100, None].copy()
    pale = np.round(images * contrast).astype(np.uint8)
    whole, found = detectors[name].detect(images).mse, detectors[name].detect(pale)
    assert set(found.reason.tolist()) <= signals(name)
    assert abs(found.mse.mean() / whole.mean() - 1) < 0.01
    assert np.abs(found.mse / whole - 1).max() < 0.05


@pytest.mark.parametrize(("name", "normal"), [("instant", (3, 5)), ("deep", tuple(range(10)))], ids=["3,5", "all"])
def test_a_set_of_digits_can_be_normal(name, digits, normal):
    """With several digits or all as normal class, the test has these labels as normal."""
    job = TrainingJob("some", RECIPES[name].with_epochs(1), normal, seed=0, alpha=0.05, confidence=None, device=CPU)
    draft = make_version(job, digits, progress=lambda *_: None).manifest
    assert draft.data.normal == normal
    assert {int(label) for label, found in draft.metrics["labels"].items() if found["normal"]} == set(normal)
    assert (draft.metrics["auroc"] is None) == (len(normal) == 10)


@pytest.mark.parametrize("name", ["instant", "deep"])
def test_a_garment_can_be_normal(name):
    """A label of Fashion-MNIST makes a version, although garments have more ink than digits."""
    try:
        everything = fashion_mnist(None)
    except DataError as error:
        pytest.skip(str(error))
    few = Dataset("fashion", "every 20th of Fashion-MNIST", everything.images[::20], everything.labels[::20],
                  everything.label_names, everything.noun, None)  # fmt: skip
    job = TrainingJob("trouser", RECIPES[name].with_epochs(2), (1,), seed=0, alpha=0.05, confidence=None, device=CPU)
    draft = make_version(job, few, progress=lambda *_: None).manifest
    assert draft.normal_class == "the garment trouser"
    assert draft.metrics["auroc"] > 0.9


def test_any_number_of_steps_can_be_trained(digits):
    """Training with nine, ten or eleven optimiser steps has finite losses; with ten, the warm-up is one step."""
    losses: list[float] = []
    for epochs in (9, 10, 11):
        recipe = RECIPES["deep"].with_epochs(epochs)
        losses.clear()
        recipe.fit(
            digits.images[:40], recipe.parameters,
            seed=0, device=CPU, progress=lambda _epoch, loss: losses.append(loss),
        )  # fmt: skip
        assert len(losses) == epochs
        assert np.isfinite(losses).all()


def test_the_local_signal_is_the_score_where_it_is_larger(digits):
    """The score is the larger of mean error and local signal; the reason and the error map follow, guards go first."""
    zeros = digits.images[digits.labels == 0]
    scoring = fit("deep-local", zeros)
    damaged = zeros.copy()
    damaged[:, 2:6, 2:6] = 255
    images = torch.from_numpy(np.concatenate([zeros, damaged, np.zeros_like(zeros[:1])]))[:, None]
    with torch.inference_mode():
        mse, _, error_map, reason = scoring(images)
        local = scoring.local
        scoring.local = None
        mean, _, plain_map, guards = scoring(images)
        signal = local(plain_map[:, ::2, ::2])
    decides = (signal > mean) & (guards == 0)
    assert decides[len(zeros) : -1].float().mean() > 0.5
    assert 0.1 < decides[: len(zeros)].float().mean() < 0.9
    assert torch.equal(reason, torch.where(decides, LOCAL_CODE, guards.long()).to(torch.int8))
    assert torch.allclose(mse, torch.where(decides, signal, mean), rtol=1e-5)
    assert torch.equal(error_map[~decides], plain_map[~decides])


def test_the_local_signal_keeps_the_false_positive_rate(digits):
    """A version of `deep-local` is calibrated as one score, and its report counts no local signal as a guard."""
    job = TrainingJob(
        "local", RECIPES["deep-local"].with_epochs(2), (0,), seed=0, alpha=0.05, confidence=None, device=CPU
    )
    manifest = make_version(job, digits, progress=lambda *_: None).manifest
    assert manifest.reasons == ("empty", "too_much_ink", LOCAL)
    assert "calibration_caught" not in manifest.metrics
