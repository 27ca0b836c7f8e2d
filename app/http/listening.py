"""The sockets that the server listens on, and the address that a browser on this machine can open."""

from __future__ import annotations

import errno
import socket

_WILDCARDS = frozenset(("0.0.0.0", "::"))  # noqa: S104 - for comparison only
_ABSENT = frozenset((errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT))


class ListenError(Exception):
    """The address or the port cannot be used."""


def bind(host: str, port: int, *, setting: str = "ANOMALY_PORT") -> list[socket.socket]:
    """Bind one socket for each address of `host`, all to the same port. `::` accepts IPv4 too.

    The sockets do not listen yet, so connections are refused until the server has started.

    Args:
        host: address or name.
        port: port; 0 lets the system choose one.
        setting: name of the variable that contains the port.

    Raises:
        ListenError: an address or the port cannot be used.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ListenError(f"the address {host!r} is unknown; set ANOMALY_HOST to an address of this machine") from error
    sockets: list[socket.socket] = []
    failed: OSError | None = None
    for family, address in dict.fromkeys((family, address[0]) for family, _, _, _, address in found):
        try:
            sockets.append(_bind(family, str(address), sockets[0].getsockname()[1] if sockets else port))
        except OSError as error:
            # `localhost` has an IPv6 address in /etc/hosts also where IPv6 is off.
            if error.errno not in _ABSENT:
                raise explain(error, host, port, setting) from error
            failed = error
    if not sockets:
        assert failed is not None
        raise explain(failed, host, port, setting) from failed
    return sockets


def _bind(family: int, address: str, port: int) -> socket.socket:
    created = socket.socket(family, socket.SOCK_STREAM)
    try:
        created.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            created.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address != "::")
        created.bind((address, port))
    except OSError:
        created.close()
        raise
    return created


def accepts(bound: socket.socket) -> bool:
    """Return whether a socket listens."""
    try:
        return bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0
    except OSError:
        return False


def explain(error: OSError, host: str, port: int, setting: str = "ANOMALY_PORT") -> ListenError:
    """Return an error of binding or listening in words that say what to change."""
    if error.errno == errno.EADDRINUSE:
        others = ", `make serve PORT=` or `anomaly serve --port`" if setting == "ANOMALY_PORT" else ""
        return ListenError(f"port {port} is in use; choose another with {setting}{others}")
    if error.errno == errno.EACCES:
        return ListenError(f"this user must not listen on port {port}; set {setting} to a port from 1024")
    if error.errno in _ABSENT:
        return ListenError(f"this machine does not have the address {host!r}; set ANOMALY_HOST to one that it has")
    return ListenError(f"the service cannot listen on {host!r}, port {port}: {error.strerror}")


def url(host: str, port: int) -> str:
    """Return the address of the service for a browser on this machine."""
    name = "127.0.0.1" if host in _WILDCARDS else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"
