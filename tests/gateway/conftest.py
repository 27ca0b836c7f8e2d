"""One service with API keys, and one gateway in front of it, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.conftest import Server
from tests.gateway.process import Gateway, gateway, make_secrets


@dataclass
class Both:
    """The same service by both ways.

    Attributes:
        service: straight.
        gateway: through HAProxy.
    """

    service: Server
    gateway: Gateway

    @property
    def key(self) -> str:
        """The API key that both accept."""
        return self.gateway.key


ORIGIN = "https://page.example"


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """Run the service and the gateway; pages of `ORIGIN` may call them."""
    folder = tmp_path_factory.mktemp("gateway")
    secrets = folder / "secrets"
    key = make_secrets(secrets)
    keys = str(secrets / "keys" / "api_keys")
    service = Server(folder, ANOMALY_API_KEYS_FILE=keys, ANOMALY_CORS_ORIGINS=ORIGIN)
    try:
        service.start()
        with gateway(secrets, service.port, key, CORS_ORIGINS=ORIGIN) as before:
            yield Both(service, before)
    finally:
        service.kill()
