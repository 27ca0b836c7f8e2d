"""One stack for all tests of this folder, made by `make test-containers`, and the table of what it withstood."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.containers.stack import CONNECTIONS, PROJECT, Load, Stack, run

_FAULTS: list[tuple[str, Load]] = []


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Build the images, start the stack, and take it down with everything that it kept."""
    if "DOCKER" not in os.environ:
        pytest.skip("needs a Docker engine: run `make test-containers`")
    stack = Stack(tmp_path_factory.mktemp("stack"), int(os.environ.get("CONTAINER_PORT", "18443")))
    run(stack.docker, "compose", "-p", PROJECT, "down", "-t", "1", "-v", "--remove-orphans", **stack.environment)
    stack.build("redis", "gateway", "prometheus", "api")
    stack.up()
    yield stack
    stack.compose("--profile", "*", "down", "-t", "5", "-v", "--remove-orphans")


@pytest.fixture
def faults() -> list[tuple[str, Load]]:
    """Return the list that the table at the end is made of."""
    return _FAULTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what each fault did to the requests that were under way."""
    if not _FAULTS:
        return
    terminalreporter.section(f"requests through the gateway, {CONNECTIONS} connections")
    terminalreporter.write_line(f"{'fault':<34}{'sent':>8}{'failed':>8}{'id null':>9}{'slowest':>10}")
    for name, load in _FAULTS:
        slowest = f"{max(load.seconds, default=0):.2f} s"
        terminalreporter.write_line(f"{name:<34}{load.sent:>8}{len(load.failures):>8}{load.without_id:>9}{slowest:>10}")
