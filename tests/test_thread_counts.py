"""`train`, `verify`, `promote`, `publish` and the service use one thread per model, for any default of torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from app.inference.detector import Detector
from app.inference.device import one_thread
from tests.model_stores import copy
from tests.training.commands import run


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch use two threads, as it does by default on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_thread_ends_with_the_block(two_threads: None) -> None:
    """The number of threads from before is restored."""
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("command", ["verify", "promote", "publish", "rollback"])
def test_every_check_uses_one_thread(
    two_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Each command loads the version with one thread, as the service does."""
    store, found = copy(tmp_path / "store", 1, 2), []
    load = Detector.load

    def observed(*given: object) -> Detector:
        found.append(torch.get_num_threads())
        return load(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(Detector, "load", observed)
    arguments: dict[str, tuple[object, ...]] = {
        "verify": ("verify", "zero-article", 1),
        "promote": ("promote", "zero-article", 1),
        "publish": ("publish", store / "zero-article" / "1"),
        "rollback": ("rollback", "zero-article", "--to", 1),
    }
    run("promote", "zero-article", 2, "--model-store", store)
    target = tmp_path / "other" if command == "publish" else store
    code, _, errors = run(*arguments[command], "--model-store", target)
    assert (code, errors) == (0, "")
    assert set(found) == {1}


def test_near_identical_images_are_verified_as_trained(two_threads: None, tmp_path: Path) -> None:
    """A model of almost identical images, whose golden scores depend on the order of sums, passes `verify`."""
    folder, store = tmp_path / "folder", tmp_path / "store"
    folder.mkdir()
    image = Image.new("L", (28, 28))
    ImageDraw.Draw(image).ellipse((8, 5, 19, 23), outline=255, width=3)
    for number in range(600):
        pixels = np.array(image)
        pixels[14, 14], pixels[13, 14] = number % 256, number // 256
        Image.fromarray(pixels).save(folder / f"z{number:03d}.png")
    code, _, errors = run(
        "train", "--recipe", "instant", "--data-dir", folder, "--name", "d", "--device", "cpu", "--promote",
        "--model-store", store,
    )  # fmt: skip
    assert (code, errors) == (0, "")
    torch.set_num_threads(2)
    assert run("verify", "--model-store", store) == (0, "d@1: good\n", "")
    assert run("promote", "d", 1, "--model-store", store)[0] == 0
