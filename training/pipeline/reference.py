"""What a model is called unless told, and the article's model of the same class, for reports to show beside it.

Knows: names, the model store. Does not know: how a version is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from app.inference.detector import Detector
from app.models.repository import Repository
from training.data.dataset import Dataset

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def model_name(dataset: Dataset, labels: Sequence[int], recipe: str) -> str:
    """Make up the name of a model: `zero-article`, `fashion-mnist-3-5-deep`."""
    if dataset.noun == "digit" and len(labels) == 1:
        return f"{_WORDS[labels[0]]}-{recipe}"
    classes = "all" if len(labels) == len(dataset.label_names) else "-".join(str(label) for label in labels)
    return f"{dataset.name}-{classes}-{recipe}"


def reference_version(model_store: Path, dataset: Dataset, labels: Sequence[int], model: str) -> tuple[str, int] | None:
    """Return name and version of the article's model of the same class; None where the store has none but `model`.

    Raises:
        RepositoryError: the store's pointer to it is damaged, or, for a folder of PNGs, its manifest.
    """
    name = model_name(dataset, labels, "article")
    repository = Repository(model_store)
    version = repository.current(name) if name != model else None
    if version is None:
        return None
    # All folders of PNGs make up the same name, whatever they show.
    if dataset.name == "folder" and repository.manifest(name, version).data.sha256 != dataset.sha256:
        return None
    return name, version


def reference(model_store: Path, dataset: Dataset, labels: Sequence[int], model: str) -> Detector | None:
    """Open that model.

    Raises:
        RepositoryError: it is not as it was published.
    """
    found = reference_version(model_store, dataset, labels, model)
    return found and Detector.open(Repository(model_store).open(*found).model, torch.device("cpu"))
