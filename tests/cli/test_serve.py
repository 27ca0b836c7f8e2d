"""`anomaly serve`, `anomaly --version`, and the commands that need the code of the service."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import anomaly
from anomaly import Client, ConnectionFailed
from anomaly.cli import checkout
from tests.cli.conftest import Anomaly, environment
from tests.conftest import EXAMPLES, MODEL_STORE, ROOT, free_port
from tests.waiting import wait_until


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Return the processes that `serve` would become: their arguments and environment."""
    calls: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda _, arguments, variables: calls.append((arguments, variables)))
    return calls


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """Run `anomaly serve` in a folder until it can score, and yield its address."""
    port = free_port()
    command = [sys.executable, "-m", "anomaly.cli", "serve", "--port", str(port), *options]
    with subprocess.Popen(command, cwd=folder, env=environment(ANOMALY_LOG_REQUESTS="false")) as process:
        try:
            with Client(f"http://127.0.0.1:{port}") as service:
                wait_until(lambda: process.poll() is not None or _ready(service), 60)
            assert process.poll() is None
            yield f"http://127.0.0.1:{port}"
            process.terminate()
            assert process.wait(30) in (0, -15)
        finally:
            process.kill()


def _ready(service: Client) -> bool:
    try:
        return bool(service.ready())
    except ConnectionFailed:
        return False


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.process
def test_serve_runs_the_service(tmp_path: Path, workers: str, zero: bytes) -> None:
    """From any folder, `serve` is the service of the checkout; a package `app` in that folder is not imported."""
    for name in ("app", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('this is another project')\n")
    with serving(tmp_path, "--model-store", str(MODEL_STORE), "--workers", workers) as url, Client(url) as service:
        assert service.score(zero).model == "zero"


def test_the_options_are_variables(
    in_process: Anomaly, executed: list[tuple[list[str], dict[str, str]]], tmp_path: Path
) -> None:
    """Each option of `serve` sets its variable; without options the environment is that of the caller."""
    options = ("--host", "::", "--port", "1234", "--workers", "3", "--model-store", tmp_path)
    assert in_process("serve", *options, ANOMALY_DEVICE="cuda").returncode == 0
    assert in_process("serve", ANOMALY_MODEL_STORE=str(tmp_path)).returncode == 0
    arguments, variables = executed[0]
    assert arguments == [sys.executable, "-P", "-m", "app"]
    expected = {"HOST": "::", "PORT": "1234", "WORKERS": "3", "MODEL_STORE": str(tmp_path), "DEVICE": "cuda"}
    assert {name: variables.get(f"ANOMALY_{name}") for name in expected} == expected
    assert {name for name in executed[1][1] if name.startswith("ANOMALY_")} == {"ANOMALY_DEVICE", "ANOMALY_MODEL_STORE"}


@pytest.mark.parametrize(
    "arguments",
    [("--bogus",), ("extra",), ("--port", "70000"), ("--port", "x"), ("--workers", "0"), ("--host",)],
    ids=" ".join,
)
def test_wrong_arguments_start_nothing(
    in_process: Anomaly, executed: list[tuple[list[str], dict[str, str]]], arguments: tuple[str, ...]
) -> None:
    """An unknown option, an extra argument and a wrong value are errors with exit code 2."""
    done = in_process("serve", *arguments)
    assert (done.returncode, executed) == (2, [])
    assert done.stderr


def test_help_starts_nothing(in_process: Anomaly, executed: list[tuple[list[str], dict[str, str]]]) -> None:
    """`serve --help` lists the options, also after other options."""
    for arguments in (("--help",), ("--port", "1", "--help")):
        done = in_process("serve", *arguments)
        assert (done.returncode, executed) == (0, [])
        assert "--model-store" in done.stdout


def test_a_missing_model_store_is_an_error(anomaly_process: Anomaly, tmp_path: Path) -> None:
    """A folder without a model store is one line of the service, which has the setting to start nevertheless."""
    done = anomaly_process("serve", "--model-store", tmp_path / "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"cannot start: there is no model store {tmp_path / 'none'}; ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.process
def test_the_version(anomaly_process: Anomaly) -> None:
    """`anomaly --version` prints the name and the version."""
    done = anomaly_process("--version")
    assert (done.returncode, done.stdout) == (0, f"anomaly {anomaly.__version__}\n")


@pytest.fixture
def anomaly_process(request: pytest.FixtureRequest) -> Anomaly:
    """Return the runner of the command, whose fixture has the name of the package."""
    runner: Anomaly = request.getfixturevalue("anomaly")
    return runner


def test_a_missing_dependency_of_the_training_is_explained(anomaly_process: Anomaly, tmp_path: Path) -> None:
    """After `make serve`, which installs less, the line names the package, the extra and the command that helps."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['scipy'] = None\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = anomaly_process("calibrate", "zero", "--data-dir", EXAMPLES, "--dry-run", PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (2, "")
    for words in ("`anomaly calibrate` needs the package scipy", "`train`", "make install"):
        assert words in done.stderr


COMMANDS = [
    (("serve",), "anomaly-api"),
    (("train",), "anomaly-train"),
    (("train", "--help"), "anomaly-train"),
    (("list", "--model-store", "model_store"), "anomaly-train"),
    (("score", str(EXAMPLES / "zero.png"), "--model-store", str(MODEL_STORE)), "anomaly-api"),
    (("watch", str(EXAMPLES), "--model-store", str(MODEL_STORE)), "anomaly-api"),
]


@pytest.mark.parametrize(("arguments", "image"), COMMANDS, ids=[" ".join(each[:2])[:16] for each, _ in COMMANDS])
def test_without_a_checkout(
    in_process: Anomaly,
    executed: list[tuple[list[str], dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    image: str,
) -> None:
    """Without the code of the service, one line names the checkout and the container image; the exit code is 2."""
    monkeypatch.setattr(checkout, "find_checkout", lambda: None)
    done = in_process(*arguments)
    assert (done.returncode, done.stdout, executed) == (2, "", [])
    assert len(done.stderr.splitlines()) == 1
    for words in ("checkout", "make install", image):
        assert words in done.stderr


def test_without_a_dependency(
    in_process: Anomaly, executed: list[tuple[list[str], dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout whose extra is not installed is one line that names the package and the extra."""
    monkeypatch.setattr(checkout, "find_spec", lambda name: None if name == "torch" else object())
    done = in_process("serve", ANOMALY_MODEL_STORE=str(MODEL_STORE))
    assert (done.returncode, executed) == (2, [])
    assert done.stderr == (
        "error: `anomaly serve` needs the package torch of the extra `serve`; run `make install` in the checkout\n"
    )


@pytest.mark.process
def test_a_checkout_is_found_from_the_package(tmp_path: Path) -> None:
    """The checkout is the folder that contains the package; a copy of the package alone has none."""
    assert checkout.find_checkout() == ROOT
    shutil.copytree(ROOT / "anomaly", tmp_path / "anomaly", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from anomaly.cli.checkout import find_checkout; print(find_checkout())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


@pytest.mark.process
def test_training_of_another_project_is_not_imported(tmp_path: Path) -> None:
    """`anomaly list` in a folder with a package `training` runs the training of the checkout."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("raise RuntimeError('this is another project')\n")
    done = subprocess.run(
        [sys.executable, "-m", "anomaly.cli", "list", "--model-store", str(MODEL_STORE)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "zero-article" in done.stdout
