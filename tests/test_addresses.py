"""The service on IPv4 and IPv6."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from tests.conftest import Server


def has_ipv6() -> bool:
    """Return whether this machine has the address ::1."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def reached(server: Server) -> set[str]:
    """Return the loopback addresses at which a server replies."""
    found = set()
    for host in ("127.0.0.1", "::1"):
        try:
            with socket.create_connection((host, server.port), timeout=5) as connection:
                connection.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
                if b" 200 " in connection.recv(64):
                    found.add(host)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("host", "workers"), [("::", "1"), ("::", "2"), ("localhost", "1")], ids=lambda value: value.replace("::", "any")
)
def test_both_families_are_served(make_server: Callable[..., Server], host: str, workers: str) -> None:
    """`::` listens on IPv6 and IPv4 with any number of workers, and the service stops normally."""
    server = make_server(ANOMALY_HOST=host, ANOMALY_WORKERS=workers).start()
    addresses = {entry[4][0] for entry in socket.getaddrinfo("localhost", server.port)}
    assert reached(server) == ({"127.0.0.1", "::1"} if host == "::" else addresses & {"127.0.0.1", "::1"})
    server.stop()
    assert reached(server) == set()


def test_a_port_in_use_is_named(make_server: Callable[..., Server]) -> None:
    """The start ends with code 2 and one line."""
    server = make_server(ANOMALY_HOST="::")
    with socket.create_server(("::1", server.port), family=socket.AF_INET6):
        server.start(wait=False)
        assert server.process is not None
        assert server.process.wait(60) == 2
    assert f"cannot start: port {server.port} is in use" in server.log()
