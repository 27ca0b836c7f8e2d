"""Loading a module: a version that reproduces its golden scores is accepted; errors name the rejected version."""

from __future__ import annotations

import gc
import io
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from app.inference.detector import Detector, DetectorError, _compare_scores, torchscript_allowed
from app.inference.device import DeviceError, choose_device
from app.models.repository import Artifact, Golden, Repository
from app.process import release_free_memory
from tests.conftest import MODEL_STORE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    """Return the shipped version."""
    return Repository(MODEL_STORE).open("zero-article", 1)


def refused(artifact: Artifact, message: str) -> None:
    """Fail unless the artifact is rejected with an error that contains `message` and its name."""
    with pytest.raises(DetectorError, match=message) as caught:
        Detector.load(artifact, CPU)
    assert str(caught.value).startswith("zero-article@1: ")


def test_other_work_does_not_reject_a_version(artifact):
    """While other work waits, `score` returns early; the golden scores are compared all the same."""
    assert Detector.load(artifact, CPU, step=4, others_waiting=bytearray(b"\1"))


def test_the_shipped_version_reproduces_its_golden_scores(artifact):
    """The shipped module loads, and gives its golden images their golden scores and reconstructions."""
    found = Detector.load(artifact, CPU).detect(artifact.golden.images)
    assert found.mse == pytest.approx(artifact.golden.mse, rel=1e-5)
    assert np.abs(found.reconstruction - artifact.golden.reconstructions).max() < 1e-4


def test_the_score_is_the_mean_of_the_error_map(artifact):
    """For any image, mse == error_map.mean((1, 2)), and shapes and types are those of the contract."""
    images = np.random.default_rng(0).integers(0, 256, (9, 1, 28, 28), np.uint8)
    found = Detector.load(artifact, CPU).detect(images)
    assert found.mse == pytest.approx(found.error_map.mean((1, 2)), rel=1e-6)
    assert (found.mse.dtype, found.reason.dtype) == (np.float32, np.int8)
    assert found.reconstruction.shape == (9, 1, 28, 28)
    assert 0.0 <= found.reconstruction.min() <= found.reconstruction.max() <= 1.0


def test_a_score_does_not_depend_on_its_batch(artifact):
    """An image gets the same score, within 1e-6 relative, alone and in any batch up to 64."""
    detector = Detector.load(artifact, CPU)
    images = np.concatenate([artifact.golden.images] * 3)[:64]
    alone = np.concatenate([detector.detect(image[None]).mse for image in images])
    for size in (2, 3, 7, 8, 16, 31, 32, 64):
        together = np.concatenate([detector.detect(images[i : i + size]).mse for i in range(0, len(images), size)])
        assert np.abs(together / alone - 1).max() <= 1e-6


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("mse", lambda x: x * 1.01, "golden scores differ"),
        ("mse", lambda x: np.full_like(x, np.nan), "golden scores differ"),
        ("mse", lambda x: x[:-1], "do not belong together"),
        ("mse", lambda x: np.append(x, x[:1]), "do not belong together"),
        ("reconstructions", lambda x: 1 - x, "golden reconstructions differ"),
        ("reconstructions", lambda x: x[:, :, :14], "do not belong together"),
        ("images", lambda x: x[:0], "do not get finite scores"),
        ("images", lambda x: x[:, :, :9], "not a scoring module|do not belong together"),
    ],
    ids=[
        *("scores", "no numbers", "too few scores", "too many scores"),
        *("reconstructions", "half pictures", "no images", "small images"),
    ],
)
def test_what_does_not_reproduce_its_golden_samples_is_refused(artifact, field, change, message):
    """A version is rejected if its module does not reproduce the golden scores and reconstructions."""
    golden = replace(artifact.golden, **{field: change(getattr(artifact.golden, field))})
    refused(replace(artifact, golden=golden), message)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"], ids=["empty", "text", "half an archive"])
def test_bytes_that_are_no_module_are_refused(artifact, content):
    """A version whose module is not TorchScript is rejected."""
    refused(replace(artifact, model=content), r"model\.pt is not a scoring module")


def test_a_cut_module_is_refused(artifact):
    """A version with a truncated module is rejected."""
    refused(replace(artifact, model=artifact.model[:-200]), r"model\.pt is not a scoring module")


@pytest.mark.parametrize("wanted", ["tpu", "", "cpu:1", "cuda:", "cuda:x", "CUDA", "auto:0"])
def test_a_device_that_means_nothing_is_refused(wanted):
    """Only auto, cpu, cuda and cuda:n name a device."""
    with pytest.raises(DeviceError, match="none of auto, cpu, cuda, cuda:n"):
        choose_device(wanted)


def test_a_cuda_device_that_is_not_there_is_refused():
    """CUDA without a device, or a number too high, is an error of one line; `auto` falls back to the CPU."""
    with pytest.raises(DeviceError, match="was requested, but"):
        choose_device("cuda:99")
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


class TwoRoads(torch.nn.Module):
    """A scoring module with another score for a batch of one image, or with an unknown guard code."""

    def __init__(self, alone: float, code: int) -> None:
        super().__init__()
        self.alone = alone
        self.code = code

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return scores, which may violate the contract."""
        pixels = images.to(torch.float32) / 255
        if images.size(0) == 1:
            pixels = pixels * self.alone
        reason = torch.full((images.size(0),), self.code, dtype=torch.int8)
        return pixels.mean(dim=[1, 2, 3]), pixels, pixels.squeeze(1), reason


@pytest.mark.parametrize(
    ("module", "message"),
    [(TwoRoads(1.0, 0), None), (TwoRoads(0.99, 0), "golden scores differ"), (TwoRoads(1.0, 1), "does not name")],
    ids=["right", "wrong when alone", "a guard without a name"],
)
def test_what_answers_is_proven(artifact, module, message):
    """The golden images are also scored one at a time and with guard codes, as in the service."""
    assert artifact.manifest.reasons == ()
    content = io.BytesIO()
    with torchscript_allowed():
        torch.jit.save(torch.jit.script(module), content)
        mse, reconstruction, _, _ = (part.numpy() for part in module(torch.from_numpy(artifact.golden.images)))
    golden = replace(artifact.golden, mse=mse, reconstructions=reconstruction)
    version = replace(artifact, model=content.getvalue(), golden=golden)
    if message is None:
        Detector.load(version, CPU)
    else:
        refused(version, message)


@pytest.mark.long
def test_a_version_that_is_let_go_of_leaves_no_memory_behind():
    """Loading and dropping many versions, as promotions do, takes no more memory than loading a few."""
    artifact = Repository(MODEL_STORE).open("zero", 1)
    process, sizes = psutil.Process(), []
    for _ in range(15):
        Detector.load(artifact, CPU)
        gc.collect()
        release_free_memory()
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[4] < 20 * 2**20


def test_a_version_that_was_opened_leaves_no_code_behind():
    """Torch keeps no code of versions that were dropped: 60 of them take at most 3 MB more than 20."""
    artifact = Repository(MODEL_STORE).open("zero", 1)

    def size_after(count: int) -> int:
        for _ in range(count):
            Detector.open(artifact.model, CPU)
        gc.collect()
        release_free_memory()
        return psutil.Process().memory_info().rss

    before = size_after(20)
    assert size_after(40) - before < 3e6


def test_devices_are_chosen_by_what_cuda_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is the first CUDA device if there is one; a number is that of an existing device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match="finds no CUDA device"):
        choose_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == choose_device("cuda:0") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    for wanted in ("cuda:2", "cuda:10"):
        with pytest.raises(DeviceError, match="only 2 CUDA devices"):
            choose_device(wanted)
    for wanted in ("cuda:", "cuda:-1", "cpu:0", ""):
        with pytest.raises(DeviceError, match="none of auto"):
            choose_device(wanted)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5])
def test_golden_scores_near_zero_are_compared_relatively(scale: float) -> None:
    """A difference of 1 % rejects a version, also if its scores are so small that the difference is below 0.001."""
    golden = Golden(
        np.zeros((2, 1, 28, 28), np.uint8), np.array([scale, 2 * scale], np.float32), np.zeros(0, np.float32)
    )
    _compare_scores("small@1", golden, golden.mse)
    _compare_scores("small@1", golden, golden.mse * np.float32(1.0005))
    for wrong in (golden.mse * np.float32(1.01), golden.mse * np.float32(0.99), golden.mse * np.float32(np.nan)):
        with pytest.raises(DetectorError, match="golden scores differ"):
            _compare_scores("small@1", golden, wrong)


def test_golden_scores_near_zero_are_compared_absolutely(artifact: Artifact) -> None:
    """A golden score of 0 tolerates a difference of 1e-9, the rounding of a score, and not one of 1e-8."""
    golden = replace(artifact.golden, mse=np.zeros_like(artifact.golden.mse))
    _compare_scores("zero@1", golden, golden.mse + np.float32(9e-10))
    _compare_scores("zero@1", golden, golden.mse - np.float32(9e-10))
    for difference in (2e-9, -2e-9):
        with pytest.raises(DetectorError, match=r"golden scores differ by up to 0\.002 relative"):
            _compare_scores("zero@1", golden, golden.mse + np.float32(difference))
