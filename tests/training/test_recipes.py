"""Every recipe of the table makes a module that exports, and repeats itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.training.conftest import CPU
from training.export import export
from training.recipes import RECIPES
from training.splits import SPLITS

pytestmark = pytest.mark.parametrize("name", RECIPES)


def test_an_entry_is_complete(name):
    """An entry is filed under its name, its split exists, and its parameters fit into a manifest."""
    recipe = RECIPES[name]
    assert recipe.name == name
    assert recipe.split in SPLITS
    assert json.loads(json.dumps(dict(recipe.parameters))) == dict(recipe.parameters)
    assert recipe.summary
    assert recipe.score_space


def test_a_recipe_makes_an_artifact_and_repeats_itself(name, digits):
    """The same images and seed give the same scores; another seed gives others."""
    recipe = RECIPES[name].with_epochs(1)

    def scores(seed: int) -> np.ndarray:
        module = recipe.fit(
            digits.images[:200], recipe.parameters, seed=seed, device=CPU, progress=lambda _epoch, _loss: None
        )
        return export(module, digits.images[::250]).golden.mse

    first = scores(0)
    assert (first == scores(0)).all()
    assert len(first) == 20
    assert not (first == scores(1)).all()
