"""The contract of the artifact for every autoencoder of the table."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from app.inference.detector import torchscript_allowed
from training.networks.autoencoders import AUTOENCODERS, ScaledScoring

pytestmark = pytest.mark.parametrize("name", AUTOENCODERS)


def scoring(name: str) -> ScaledScoring:
    """Return a scoring module around an untrained autoencoder."""
    torch.manual_seed(0)
    return ScaledScoring(AUTOENCODERS[name](), -1.0, 1.0).eval()


def real(digits, n: int) -> torch.Tensor:
    """Return n digits of all kinds, uint8 [n, 1, 28, 28]."""
    return torch.from_numpy(digits.images[:: len(digits.images) // n][:n, None].copy())


def test_the_shape_is_kept(name, digits):
    """The reconstruction of [N, 1, 28, 28] has the same shape and is in 0..1."""
    module = scoring(name)
    redrawn = module.autoencoder(module.scale(real(digits, 3)))
    assert redrawn.shape == (3, 1, 28, 28)
    assert 0.0 <= redrawn.min() <= redrawn.max() <= 1.0


def test_the_score_is_the_mean_of_the_error_map(name, digits):
    """The four outputs have the contract's shapes and types, and mse == error_map.mean((1, 2))."""
    mse, reconstruction, error_map, reason = scoring(name)(real(digits, 7))
    assert [(x.shape, x.dtype) for x in (mse, reconstruction, error_map, reason)] == [
        ((7,), torch.float32),
        ((7, 1, 28, 28), torch.float32),
        ((7, 28, 28), torch.float32),
        ((7,), torch.int8),
    ]
    assert torch.equal(mse, error_map.mean((1, 2)))
    assert not reason.any()


def test_it_scripts_and_says_the_same(name, digits):
    """The scripted module, after saving and loading, has the same scores as the eager module."""
    module, images, buffer = scoring(name), real(digits, 5), io.BytesIO()
    with torchscript_allowed():
        torch.jit.save(torch.jit.script(module), buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
    assert torch.allclose(loaded(images)[0], module(images)[0], rtol=1e-6, atol=0)


def test_a_score_does_not_depend_on_its_batch(name, digits):
    """An image gets the same score, within 1e-6 relative, in every batch of 1 to 64 images."""
    module, images = scoring(name), real(digits, 64)
    with torch.inference_mode():
        alone = np.array([module(image[None])[0].item() for image in images])
        for size in range(1, 65):
            together = np.concatenate([module(part)[0].numpy() for part in images.split(size)])
            assert np.abs(together / alone - 1).max() <= 1e-6, size
