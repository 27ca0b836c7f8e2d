"""The table of recipes. The tests apply the contract to every entry."""

from __future__ import annotations

from training.recipes.article import ARTICLE, DEEPER
from training.recipes.contract import Recipe
from training.recipes.deep import DEEP, DEEP_LOCAL
from training.recipes.instant import INSTANT

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (ARTICLE, DEEPER, INSTANT, DEEP, DEEP_LOCAL)}
