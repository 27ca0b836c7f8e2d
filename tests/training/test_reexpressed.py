"""The faster forms of the networks are the same functions."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from app.models.calibration import Calibration
from tests.conftest import ROOT
from training.networks.autoencoders import ArticleAutoencoder, ScaledScoring
from training.networks.gradients import OrientedGradients
from training.networks.reexpressed import ReexpressedGradients, reexpressed


def scoring(seed: int) -> ScaledScoring:
    """Return the article's scoring module with other weights."""
    torch.manual_seed(seed)
    return ScaledScoring(ArticleAutoencoder(), -1.0, 1.0).eval()


@pytest.mark.parametrize("seed", range(3))
def test_same_function(seed: int) -> None:
    """Scores agree within 1e-6 relative for noise, blank and full images; the reconstruction within 1e-6."""
    module = scoring(seed)
    fast = reexpressed(module)
    images = torch.randint(0, 256, (50, 1, 28, 28), dtype=torch.uint8)
    images[0], images[1] = 0, 255
    with torch.inference_mode():
        slow_mse, slow_picture, *_ = module(images)
        mse, picture, *_ = fast(images)
    assert ((mse - slow_mse).abs() / slow_mse).max() <= 1e-6
    assert (picture - slow_picture).abs().max() <= 1e-6


@pytest.mark.parametrize("count", [1, 2, 3, 8, 33])
def test_same_scores_for_every_batch_size(count: int) -> None:
    """Single images, which have their own code path, and batches of any size have the same scores in both forms."""
    module = scoring(7)
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8)
    with torch.inference_mode():
        slow, fast = module(images)[0], reexpressed(module)(images)[0]
    assert ((fast - slow).abs() / slow).max() <= 1e-6


def test_same_standardisation() -> None:
    """Both forms of the gradients agree within 1e-5 of the root mean square, which is 1."""
    slow = OrientedGradients(directions=6, cells=14, edge_sigma=0.7, pool_sigma=1.7)
    pixels = torch.rand(40, 28, 28)
    pixels[0], pixels[1] = 0.0, 1.0
    kept = pixels.clone()
    with torch.inference_mode():
        difference = (ReexpressedGradients(slow)(pixels) - slow(pixels)).abs().max()
    assert difference <= 1e-5
    assert (pixels == kept).all()


def test_same_verdicts_on_the_test_set() -> None:
    """For all 10,000 test images of MNIST the verdict is the same at the threshold of 1 %."""
    folder = Path(os.environ.get("DATA_DIR", ROOT.parent / "shared" / "data" / "mnist"))
    paths = [path for path in folder.glob("t10k-images*") if path.suffix == ".gz"]
    if not paths:
        pytest.skip("the MNIST files are not here; DATA_DIR can name their folder")
    pixels = np.frombuffer(gzip.decompress(paths[0].read_bytes()), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    images = torch.from_numpy(pixels.copy())
    module = scoring(0)
    with torch.inference_mode():
        slow = torch.cat([module(part)[0] for part in images.split(500)]).numpy()
        fast = torch.cat([reexpressed(module)(part)[0] for part in images.split(500)]).numpy()
    assert (np.abs(fast - slow) / slow).max() <= 1e-6
    threshold = Calibration(np.sort(slow).astype(float).tolist()).threshold(0.01)
    assert ((slow > threshold) == (fast > threshold)).mean() == 1.0
