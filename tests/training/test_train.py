"""The article's training loop, and its errors."""

from __future__ import annotations

import pytest
import torch

from tests.training.conftest import CPU
from training.recipes.article import fit_article
from training.recipes.contract import TrainingError
from training.recipes.deep import supports_bfloat16
from training.recipes.table import RECIPES

PARAMETERS = {**RECIPES["article"].parameters, "epochs": 3}


def silent(_epoch: int, _loss: float) -> None:
    """Ignore the progress."""


def test_the_loss_falls_and_every_epoch_is_reported(digits):
    """Every epoch is reported once, in order, and the loss falls."""
    told: list[tuple[int, float]] = []
    fit_article(digits.images[:300], PARAMETERS, seed=0, device=CPU, progress=lambda *epoch: told.append(epoch))
    epochs, losses = zip(*told, strict=True)
    assert epochs == (1, 2, 3)
    assert losses[0] > losses[1] > losses[2]


def test_the_callers_random_numbers_are_left_alone(digits):
    """Training leaves torch's global generator unchanged."""
    before = torch.random.get_rng_state()
    fit_article(digits.images[:50], PARAMETERS, seed=0, device=CPU, progress=silent)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_diverging_loss_is_an_error(digits):
    """A loss that is not finite is an error that contains what to try."""
    with pytest.raises(TrainingError, match="lower learning rate"):
        fit_article(
            digits.images[:100], {**PARAMETERS, "learning_rate": float("inf")}, seed=0, device=CPU, progress=silent
        )


@pytest.mark.parametrize("flags", [{}, {"avx512_bf16": False, "amx_bf16": False}, {"avx2": True, "amx_bf16": True}])
def test_bfloat16_is_used_where_the_processor_multiplies_in_it(monkeypatch, digits, flags):
    """Only a CPU with bfloat16 units trains in bfloat16; the loss is the same within 1 %."""
    losses: dict[str, list[float]] = {"bfloat16": [], "float32": []}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    has = flags.get("amx_bf16", False)
    assert supports_bfloat16(CPU) == has
    for precision, found in losses.items():
        parameters = {**RECIPES["deep"].parameters, "epochs": 2, "precision": precision}
        RECIPES["deep"].fit(
            digits.images[:64], parameters, seed=0, device=CPU, progress=lambda _, loss, to=found: to.append(loss)
        )
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    assert (losses["bfloat16"] == losses["float32"]) is not has


@pytest.mark.gpu
def test_training_on_cuda_gives_a_module_of_the_contract(digits):
    """A module trained on a CUDA device scores on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cuda = torch.device("cuda")
    module = fit_article(digits.images[:300], PARAMETERS, seed=0, device=cuda, progress=silent).cpu()
    assert torch.isfinite(module(torch.from_numpy(digits.images[:4, None].copy()))[0]).all()
