"""Default model names, and the article's model of the same class, with which a report compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from app.inference.detector import Detector
from app.models.repository import Repository
from training.data.dataset import Dataset

_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def model_name(dataset: Dataset, labels: Sequence[int], recipe: str) -> str:
    """Return the default name of a model: `zero-article`, `fashion-mnist-3-5-deep`."""
    if dataset.noun == "digit" and len(labels) == 1:
        return f"{_DIGIT_NAMES[labels[0]]}-{recipe}"
    classes = "all" if len(labels) == len(dataset.label_names) else "-".join(str(label) for label in labels)
    return f"{dataset.name}-{classes}-{recipe}"


def reference_version(model_store: Path, dataset: Dataset, labels: Sequence[int], model: str) -> tuple[str, int] | None:
    """Return name and current version of the article's model of the same class.

    Args:
        model_store: model store.
        dataset: data set.
        labels: labels of the normal class.
        model: name of the model to compare, which is never its own reference.

    Returns:
        None if the store does not contain the article's model.

    Raises:
        RepositoryError: the file CURRENT is damaged, or, for a folder of PNGs, the manifest.
    """
    name = model_name(dataset, labels, "article")
    repository = Repository(model_store)
    version = repository.current(name) if name != model else None
    if version is None:
        return None
    # The default name is the same for all folders of PNGs or IDX files.
    if dataset.name in ("folder", "idx") and repository.manifest(name, version).data.sha256 != dataset.sha256:
        return None
    return name, version


def open_reference(model_store: Path, dataset: Dataset, labels: Sequence[int], model: str) -> Detector | None:
    """Load the version of `reference_version`.

    Raises:
        RepositoryError: the version differs from its manifest.
    """
    version = reference_version(model_store, dataset, labels, model)
    return version and Detector.open(Repository(model_store).open(*version).model, torch.device("cpu"))
