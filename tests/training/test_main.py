"""The command `train`: output, exit codes, and interruption."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from app.models.repository import Repository
from tests.conftest import EXAMPLES
from tests.test_idx_files import write_idx
from tests.training.commands import TRAIN, run
from tests.training.conftest import ROOT, write_pngs
from training.recipes.table import RECIPES


def test_the_same_command_gives_the_same_scores(tmp_path):
    """Training twice with the same seed publishes two versions with the same scores and threshold."""
    for _ in range(2):
        assert run(*TRAIN, "--model-store", tmp_path, "--normal", "3,5", "--seed", "7")[0] == 0
    repository = Repository(tmp_path)
    assert repository.versions("mnist-5000-3-5-article") == [1, 2]
    first, second = (repository.open("mnist-5000-3-5-article", version) for version in (1, 2))
    assert list(first.calibration.scores) == list(second.calibration.scores)
    assert first.manifest.threshold == second.manifest.threshold
    assert (first.golden.mse == second.golden.mse).all()
    assert first.manifest.normal_class == "the digits 3 and 5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--recipe", "magic"), f"choose one of {', '.join(RECIPES)}"),
        (("train", "--data", "cifar"), "choose one of mnist"),
        (("train", "--data-dir", "/nowhere"), "there is no folder /nowhere"),
        (("train", "--data", "mnist", "--data-dir", "/nowhere"), "there is no folder /nowhere"),
        (("train", "--data-dir", EXAMPLES), "needs --name"),
        (("train", "--data-dir", EXAMPLES, "--name", "mine", "--normal", "1"), "leave --normal out"),
        (("train", "--data-dir", EXAMPLES, "--name", "mine", "--normal", "all"), "leave --normal out"),
        (("all", "--data", "folder"), "PNGs have none; use: anomaly train"),
        (("all", "--data-dir", EXAMPLES), "PNGs have none; use: anomaly train"),
        ((*TRAIN, "--normal", "twelve"), "give a label"),
        ((*TRAIN, "--normal", "12"), "0 to 9"),
        ((*TRAIN, "--alpha", "0.001"), "at least 999 calibration images, and there are 100"),
        ((*TRAIN, "--alpha", "0.001"), "There are 500 normal images in all"),
        ((*TRAIN, "--alpha", "0.001"), "give at least 4,992, or use --alpha 0.01, the smallest that works"),
        ((*TRAIN, "--alpha", "1.5"), "between 0 and 1"),
        ((*TRAIN, "--confidence", "0.99"), "at least 459 calibration images"),
        ((*TRAIN, "--name", "Not A Name"), "is not a model name"),
        (("train", "--data", "mnist-5000", "--device", "tpu"), "none of auto, cpu, cuda"),
        (("verify", "nothing"), "no versions of nothing"),
        (("rollback", "nothing"), "no version below"),
        (("promote", "nothing", "1"), "there is no model nothing"),
    ],
    ids=lambda value: "-".join(map(str, value[-2:])) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_clear_line(tmp_path, arguments, message):
    """An error exits with code 2 and one line with the reason, and publishes nothing."""
    code, _, errors = run(*arguments, "--model-store", tmp_path)
    assert code == 2
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        (*TRAIN, "--model-store", "in-the-way"),
        (*TRAIN, "--model-store", "in-the-way/store"),
        ("all", "--data", "mnist-5000", "--recipe", "instant", "--results", "in-the-way"),
        ("all", "--data", "mnist-5000", "--recipe", "instant", "--publish", "--model-store", "in-the-way"),
    ],
    ids=str,
)
def test_a_path_in_the_way_is_told_before_training(tmp_path, monkeypatch, arguments):
    """If the store or the results cannot be written, one line contains the path, and training does not start."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in-the-way").write_text("")
    code, out, errors = run(*arguments)
    assert code == 2
    assert errors == f"error: {tmp_path / 'in-the-way'} cannot be written: Not a directory\n"
    assert "training on" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["in-the-way"]


def test_what_the_disk_refuses_is_one_line(tmp_path):
    """An OSError is one line with path and reason, without a traceback."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "CURRENT").mkdir()
    made = run(*TRAIN, "--name", "mine", "--model-store", tmp_path)
    assert made[0] == 0
    code, _, errors = run("promote", "mine", 1, "--model-store", tmp_path)
    assert code == 2
    assert errors == f"error: {tmp_path / 'mine' / '.CURRENT-draft'}: Is a directory\n"


def test_a_folder_of_pngs_is_all_it_takes(tmp_path, digits):
    """`train --data-dir FOLDER_OF_PNGS --name mine` makes a detector; one anomalous PNG is enough for an AUROC."""
    for folder, label, count in (("normal", 0, 500), ("odd", 6, 1)):
        (tmp_path / folder).mkdir()
        for number, image in enumerate(digits.images[digits.labels == label][:count]):
            Image.fromarray(image).save(tmp_path / folder / f"{number}.png")
    arguments = ("train", "--data-dir", tmp_path / "normal", "--name", "mine", "--model-store", tmp_path / "store")
    # Fewer epochs than the recipe's own, which the tutorial's test trains to the end.
    code, out, errors = run(*arguments, "--anomalies-dir", tmp_path / "odd", "--device", "cpu", "--epochs", "10")
    assert code == 0, errors
    assert f"{tmp_path / 'normal'} contains PNGs: using --data folder" in out
    manifest = Repository(tmp_path / "store").manifest("mine", 1)
    assert (manifest.recipe.name, manifest.data.name) == ("deep", "folder")
    assert (manifest.data.train, manifest.data.calibration) == (300, 100)
    assert (manifest.data.test_normal, manifest.data.test_anomalous) == (100, 1)
    assert manifest.metrics["auroc"] >= 0.95
    assert run(*arguments, "--recipe", "instant")[0] == 0


def test_dark_strokes_on_white_choose_no_threshold(tmp_path, digits):
    """If guards reject more images than the rate allows, nothing is published, and one line states the reason.

    If they reject fewer, the output and the model card contain the number.
    """
    zeros = digits.images[digits.labels == 0]
    dark = write_pngs(tmp_path / "dark", 255 - zeros[:475])
    others = digits.images[digits.labels != 0][:100]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    # Of a folder, the limits of the guards follow from its images; of IDX files, they are those of digits.
    for stem, images, normal in (("train", np.concatenate([zeros[:475], 255 - zeros[475:]]), 1), ("t10k", others, 0)):
        write_idx(mixed / f"{stem}-images-idx3-ubyte", images)
        write_idx(mixed / f"{stem}-labels-idx1-ubyte", np.full(len(images), 1 - normal))
    arguments = ("--name", "mine", "--recipe", "instant", "--alpha", 0.1, "--model-store", tmp_path / "store")
    code, _, errors = run("train", "--data-dir", dark, *arguments)
    assert (code, len(errors.splitlines())) == (2, 1)
    assert "polarity: bright background 475, dark background 0" in errors
    assert "--no-invert" in errors
    assert not (tmp_path / "store").exists()

    code, out, errors = run("train", "--data", "idx", "--normal", "0", "--data-dir", mixed, *arguments, "--promote")
    assert code == 0, errors
    repository = Repository(tmp_path / "store")
    manifest = repository.manifest("mine", 1)
    count = manifest.metrics["calibration_caught"]["too_much_ink"]
    words = f"uards rejected {count} of the 100 calibration images (too_much_ink {count}); they are false positives"
    assert 0 < count <= 10
    assert manifest.threshold < 4.0
    assert f"g{words}\n" in out
    assert f"G{words}." in repository.read(manifest, "report/model-card.md").decode()

    # The rate of 0.01 is too small for them; and the images of a folder are judged as those of training are.
    calibrate = ("calibrate", "mine", "--model-store", tmp_path / "store")
    code, _, errors = run(*calibrate, "--alpha", 0.01)
    assert (code, len(errors.splitlines())) == (2, 1)
    assert f"guards rejected {count} of the 100 calibration images (empty or too_much_ink {count})" in errors
    code, _, errors = run(*calibrate, "--data-dir", dark)
    assert (code, len(errors.splitlines())) == (2, 1)
    assert "guards rejected 475 of the 475 calibration images (too_much_ink 475)" in errors
    # Dots score above the guards' error. At a threshold from dots, an image that a guard rejects would be normal.
    dots = np.zeros((9, 28, 28), np.uint8)
    for place, dot in enumerate(dots, 5):
        dot[place : place + 3, place : place + 3] = 255
    code, _, errors = run(*calibrate, "--data-dir", write_pngs(tmp_path / "dots", dots))
    assert (code, len(errors.splitlines())) == (2, 1)
    assert "is not below 4, the error of images that a guard rejects" in errors
    code, out, errors = run(*calibrate, "--alpha", 0.2)
    assert (code, repository.versions("mine")) == (0, [1, 2])
    assert f"guards rejected {count} of the 100 calibration images" in out


def test_few_images_leave_a_warning(tmp_path, digits):
    """A version from fewer than 200 images has a warning in output, manifest and card; the table has counts."""
    folder = write_pngs(tmp_path / "few", digits.images[digits.labels == 0][:150])
    store = tmp_path / "store"
    command = ("train", "--recipe", "article", "--epochs", 1, "--device", "cpu", "--data-dir", folder, "--name", "mine")
    code, _, errors = run(*command, "--model-store", store)
    assert code == 2
    assert "There are 150 normal images in all" in errors
    assert "use --alpha 0.033, the smallest that works" in errors
    code, out, _ = run(*command, "--model-store", store, "--alpha", 0.033)
    assert code == 0
    assert "warning: This version was made from 150 normal images." in out
    assert re.search(r"^ *0\.033 +\S+ +\d+ of 30 +\d+\.\d\d % \(", out, re.MULTILINE)
    assert len(out.splitlines()) < 20
    repository = Repository(store)
    manifest = repository.manifest("mine", 1)
    assert "150 normal images" in manifest.warnings[0]
    card = repository.read(manifest, "report/model-card.md").decode()
    assert card.index("**Warning.**") < card.index("## Limits") < card.index("## How to use") < card.index("## Metrics")


def test_an_interruption_leaves_nothing(tmp_path):
    """Ctrl-C during training exits with 130 and one line, and the model store is unchanged."""
    command = [sys.executable, "-m", "training", *TRAIN, "--epochs", "50"]
    process = subprocess.Popen(
        [*command, "--model-store", str(tmp_path / "store")],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 5 of 50, loss "):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted; no incomplete files were left behind\n"
    assert not (tmp_path / "store").exists()


def test_an_interruption_of_the_imports_is_silent(tmp_path):
    """Ctrl-C during the import of torch exits with 130 and without output."""
    # This module replaces torch, and interrupts its own import.
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    found = subprocess.run(
        [sys.executable, "-m", "training", "list"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")
