"""Run the commands of `python -m training` in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from training.__main__ import app

TRAIN = ("train", "--recipe", "article", "--data", "mnist-5000", "--epochs", "1", "--device", "cpu")


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a command, and return exit code, standard output and standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr
