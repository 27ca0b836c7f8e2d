"""More connections than the gateway accepts."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.gateway.conftest import Both
from tests.gateway.process import gateway, make_secrets

CONNECTIONS = 1100
"""More than the limit of the process, which is 1,000."""


@pytest.fixture
def _many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("_many_descriptors")
def test_the_health_check_is_answered_in_a_flood(both: Both, tmp_path: Path) -> None:
    """Clients hold every connection that they can get; the port of metrics and health check answers."""
    key = make_secrets(tmp_path / "secrets")
    with (
        gateway(tmp_path / "secrets", both.service.port, key, CONNECTIONS_PER_ADDRESS="5000") as flooded,
        contextlib.ExitStack() as flood,
    ):
        for _ in range(CONNECTIONS):
            flood.enter_context(socket.create_connection(("127.0.0.1", flooded.port), 30))
        for path in ("/up", "/metrics"):
            url = f"http://127.0.0.1:{flooded.metrics_port}{path}"
            assert httpx.get(url, timeout=2, trust_env=False).status_code == 200
