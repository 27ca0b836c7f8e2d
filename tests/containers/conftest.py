"""One stack for all tests of this folder, started by `make test-containers`, and the table of injected faults."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT
from tests.containers.images import build, run
from tests.containers.stack import CONNECTIONS, PROJECT, TRAIN, Load, Stack

_FAULTS: list[tuple[str, Load]] = []
_NOTES: list[str] = []


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Build the images, start the stack, and remove it with all its volumes."""
    if "DOCKER" not in os.environ:
        pytest.skip("needs a Docker engine: run `make test-containers`")
    stack = Stack(tmp_path_factory.mktemp("stack"), int(os.environ.get("CONTAINER_PORT", "18443")))
    run(stack.docker, "compose", "-p", PROJECT, "down", "-t", "1", "-v", "--remove-orphans", **stack.environment)
    try:
        build()
        stack.up()
        yield stack
    finally:
        stack.compose("--profile", "*", "down", "-t", "1", "-v", "--remove-orphans")
        stack.written.close()


@pytest.fixture(scope="session", autouse=True)
def training(stack: Stack) -> Iterator[subprocess.Popen[str]]:
    """Train one epoch on the 5,000 digits into an empty volume, concurrently with the tests without load."""
    options = ("--data", "mnist-5000", "--normal", "0", "--epochs", "1", "--name", "trial", "--promote")
    command = (stack.docker, "compose", *TRAIN, "train", "train", "--recipe", "article", *options)
    # A killed run leaves its volume with a version in it.
    remove = (*TRAIN[:2], "--profile", "train", "down", "-v", "-t", "1")
    stack.compose(*remove)
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **stack.environment}, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
    stack.compose(*remove)


@pytest.fixture
def notes() -> list[str]:
    """Return the list of lines that are printed after the table."""
    return _NOTES


@pytest.fixture
def faults() -> list[tuple[str, Load]]:
    """Return the list that the table at the end is made of."""
    return _FAULTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what each fault did to the requests that were under way, and what else was measured."""
    if not _FAULTS and not _NOTES:
        return
    terminalreporter.section(f"requests through the gateway, {CONNECTIONS} connections")
    terminalreporter.write_line(f"{'fault':<34}{'sent':>8}{'failed':>8}{'id null':>9}{'slowest':>10}")
    for name, load in _FAULTS:
        slowest = f"{max(load.seconds, default=0):.2f} s"
        terminalreporter.write_line(
            f"{name:<34}{load.sent:>8}{len(load.failures):>8}{len(load.without_id):>9}{slowest:>10}"
        )
    for note in _NOTES:
        terminalreporter.write_line(note)
