"""The export: equal outputs of both forms, and rejection of modules that break the contract."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.inference.detector import Detector
from tests.training.conftest import CPU
from training.networks.autoencoders import ArticleAutoencoder, ScaledScoring
from training.publishing.export import ExportError, export, golden_images


def scoring() -> ScaledScoring:
    """Return an untrained scoring module, always the same."""
    torch.manual_seed(0)
    return ScaledScoring(ArticleAutoencoder(), -1.0, 1.0)


@pytest.fixture(scope="module")
def golden(digits):
    """Return golden images of zeros."""
    return golden_images(digits.images, digits.labels, (0,))


def test_golden_images_are_of_every_kind(digits, golden):
    """Golden images are twelve normal images, two of each other label and a blank one."""
    assert golden.shape == (12 + 9 * 2 + 1, 28, 28)
    assert (golden[:12] == digits.images[:12]).all()
    assert not golden[-1].any()


def test_exported_bytes_score_as_the_module_does(digits, golden):
    """The exported bytes, opened by the service's detector, have the same scores as the module in memory."""
    module = scoring()
    detector = Detector.open(export(module, golden).model, CPU)
    images = digits.images[::50, None].copy()
    with torch.inference_mode():
        expected = module.eval()(torch.from_numpy(images))[0].numpy()
    assert np.abs(detector.detect(images).mse / expected - 1).max() <= 1e-6


def test_the_bytes_hold_no_path_of_this_machine(golden):
    """TorchScript's debug files, which contain source paths, are not exported."""
    with zipfile.ZipFile(io.BytesIO(export(scoring(), golden).model)) as archive:
        assert not [name for name in archive.namelist() if b"/training/networks/autoencoders.py" in archive.read(name)]


class Broken(nn.Module):
    """A module that breaks one rule of the contract."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return wrong outputs."""
        pixels = images.to(torch.float32) / 255.0
        error_map = pixels.square().mean(1)
        mse = error_map.mean((1, 2))
        reason = torch.zeros(mse.shape, dtype=torch.int8)
        if self.how == "mse":
            mse = 2.0 * mse
        if self.how == "range":
            pixels = pixels * 2.0
        if self.how == "shape":
            pixels = pixels.squeeze(1)
        return mse, pixels, error_map, reason


@pytest.mark.parametrize(
    ("how", "message"), [("mse", "mean of the error map"), ("range", r"is outside 0\.\.1"), ("shape", "has the shape")]
)
def test_a_broken_promise_is_refused(golden, how, message):
    """A module with a wrong score, shape or range is rejected."""
    with pytest.raises(ExportError, match=message):
        export(Broken(how), golden)


class Unscriptable(Broken):
    """A module that cannot be scripted."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Use numpy."""
        return self.forward(torch.from_numpy(images.numpy()))


def test_what_does_not_script_is_refused(golden):
    """A module that cannot be scripted causes an error with this reason."""
    with pytest.raises(ExportError, match="cannot be scripted"):
        export(Unscriptable(""), golden)
