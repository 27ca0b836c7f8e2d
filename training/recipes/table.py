"""The recipes: how a scoring module is made from normal images.

Knows: which fit function with which parameters. Does not know: data, export, the model store. To add a recipe, add an
entry to `RECIPES`; a test holds every entry to the contract of the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from training.networks.scoring import REASONS, SCORE_SPACE
from training.recipes.article import Fit, fit_article
from training.recipes.deep import fit_deep
from training.recipes.instant import fit_instant


@dataclass(frozen=True)
class Recipe:
    """One way to make a scoring module.

    Attributes:
        name: key in `RECIPES`.
        summary: what it is, in one line.
        fit: makes the scoring module.
        parameters: everything that `fit` must know; written to the manifest. JSON values only.
        score_space: in words, what the squared errors are taken of.
        reasons: names of the guards of the graph; code k in its fourth output is `reasons[k - 1]`.
        split: key in `training.data.splits.SPLITS`.
    """

    name: str
    summary: str
    fit: Fit
    parameters: Mapping[str, Any]
    score_space: str
    reasons: tuple[str, ...] = ()
    split: str = "standard"

    def with_epochs(self, epochs: int | None) -> Recipe:
        """Return the recipe with another number of epochs; None leaves it. A recipe without epochs stays as it is."""
        if epochs is None or "epochs" not in self.parameters:
            return self
        return replace(self, parameters={**self.parameters, "epochs": epochs})


_ARTICLE = Recipe(
    name="article",
    summary="the founding article to the letter: two convolutions, 196 numbers in the middle, plain copying",
    fit=fit_article,
    parameters={
        "autoencoder": "article",
        "input_range": [-1.0, 1.0],
        "learning_rate": 1e-3,
        "batch_size": 50,
        "epochs": 30,
    },
    score_space="pixels scaled to -1..1, against a reconstruction in 0..1",
    split="article",
)

_STANDARDISED = {
    "standardisation": {"directions": 6, "cells": 14, "edge_sigma": 0.7, "pool_sigma": 1.7},
    # The lightest of MNIST's 70,000 digits has an ink of 19.9, a fifth of its contrast 4; the darkest zero has 312.
    "guards": {"least_ink": 3.0, "most_ink": 400.0, "guard_error": 4.0},
    "components": 128,
}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _ARTICLE,
        replace(
            _ARTICLE,
            name="deeper",
            summary="the article's loop with the deeper network that it wished to try: 128 numbers in the middle",
            # With a background of -1 the sigmoid saturates within an epoch, and this network draws only black.
            parameters={**_ARTICLE.parameters, "autoencoder": "deeper", "input_range": [0.0, 1.0]},
            score_space="pixels scaled to 0..1",
        ),
        Recipe(
            name="instant",
            summary="the 40 nearest training images blended, between 128 principal components; nothing left to chance",
            fit=fit_instant,
            parameters={**_STANDARDISED, "neighbours": 40, "penalty": 200.0},
            score_space=SCORE_SPACE,
            reasons=REASONS,
        ),
        Recipe(
            name="deep",
            summary="a dense autoencoder between 128 principal components that has learned to undo stroke damage",
            fit=fit_deep,
            parameters={
                **_STANDARDISED,
                "widths": [512, 256, 64],
                "brush": 256,
                "damage": {"gain": 0.5, "loss": 0.5, "noise": 0.1},
                "precision": "bfloat16",
                "learning_rate": 2e-3,
                "weight_decay": 1e-3,
                "batch_size": 256,
                "epochs": 200,
            },
            score_space=SCORE_SPACE,
            reasons=REASONS,
        ),
    )
}
