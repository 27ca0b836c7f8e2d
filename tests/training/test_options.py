"""The options of the commands: help, limits, environment variables, documentation."""

from __future__ import annotations

import pytest
from typer.main import get_command

from app.models.calibration import Calibration, CalibrationError
from tests.conftest import EXAMPLES
from tests.training.commands import TRAIN, run
from tests.training.conftest import ROOT
from training.__main__ import app


@pytest.mark.parametrize(
    "command", ["", "train", "all", "calibrate", "publish", "promote", "rollback", "list", "verify"]
)
def test_help_teaches(command):
    """Every command has a help text of more than eight lines."""
    arguments = [part for part in (command, "--help") if part]
    code, out, _ = run(*arguments)
    assert code == 0
    assert len(out.splitlines()) > 8


@pytest.mark.process
def test_a_seed_is_one_that_torch_takes(tmp_path):
    """The maximum seed of torch is accepted, a larger one is rejected; a series also rejects a negative one."""
    store = ("--model-store", tmp_path)
    assert run(*TRAIN, "--seed", 2**63 - 1, *store)[0] == 0
    assert run(*TRAIN, "--seed", 2**63, *store)[0] == 2
    for seeds in (f"0,{2**63}", "-1"):
        code, _, errors = run("all", "--data", "mnist-5000", "--seeds", seeds, "--results", tmp_path / "r", *store)
        assert code == 2
        assert errors == f"error: --seeds is {seeds}; give seeds between 0 and {2**63 - 1}\n"


def test_threads_are_no_more_than_can_be_had(tmp_path):
    """More than 512 threads are rejected."""
    code, _, errors = run("train", "--data-dir", EXAMPLES, "--threads", 100_000, "--model-store", tmp_path)
    assert code == 2
    assert "512" in errors


def test_every_option_and_command_is_documented():
    """docs/training.md contains every command and every option."""
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
    """The table of needed calibration images in docs/training.md has the numbers that the calibration requires."""
    for needed, confidence in ((average, None), (confident, 0.99)):
        scores = [0.0] * needed
        Calibration(scores, confidence).rank(alpha)
        with pytest.raises(CalibrationError):
            Calibration(scores[1:], confidence).rank(alpha)
    assert f"| {alpha:g} | {average:,} | {confident:,} |" in (ROOT / "docs" / "training.md").read_text()
