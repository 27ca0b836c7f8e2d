"""Checks the hosts that requests name, against DNS rebinding and against requests of foreign pages.

A service without API keys relies on its address: only programs that can connect to it may use it. A web page can make a
browser on such a machine connect. With DNS rebinding the page's own name resolves to the address of the service, so the
browser treats the replies as the page's own. The header Host then contains the page's name.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Collection, Mapping

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(.+)")
_LONGEST = 300
"""Characters of a host or an origin with scheme and port: a name has 255 or fewer (RFC 1035, 2.3.4)."""
_SAFE = frozenset(("GET", "HEAD", "OPTIONS"))
_LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")


class Hosts:
    """The hosts that requests may name.

    IP addresses need no permission, because a page of a foreign name cannot have an address as its host. Neither do
    `localhost` and its subdomains, which browsers resolve to this machine, and names without a dot, which cannot be
    registered: they are names of containers, for example.

    Args:
        names: further host names; `*` allows all.
        origins: origins that CORS allows; `*` allows all.
    """

    def __init__(self, names: Collection[str], origins: Collection[str] = ()) -> None:
        self._names = frozenset(names)
        self._origins = frozenset(origins)
        self.allows_host = functools.lru_cache(maxsize=256)(self._allows_host)
        self.allows_origin = functools.lru_cache(maxsize=256)(self._allows_origin)

    def allows(self, method: str, headers: Mapping[bytes, bytes]) -> bool:
        """Return whether a request may be answered.

        Args:
            method: of the request. The origin matters only to methods that cause work: a browser does not let a page
                read the reply of another origin.
            headers: names in lower case. A request without Host does not come from a browser.
        """
        host, origin = headers.get(b"host"), headers.get(b"origin")
        if "*" in self._names:
            return True
        if host is not None and (len(host) > _LONGEST or not self.allows_host(host)):
            return False
        if method in _SAFE or origin is None:
            return True
        return len(origin) <= _LONGEST and self.allows_origin(origin, host or b"")

    def _allows_host(self, header: bytes) -> bool:
        found = _HOST.fullmatch(header.decode("latin-1").lower())
        if "*" in self._names or header == b"":
            return True
        return found is not None and self._is_known(found[1])

    def _allows_origin(self, header: bytes, host: bytes) -> bool:
        """Return whether a page of an origin may cause work: a page of this host, of this machine or of a listed name.

        A page of another address or container may not, although such a host is allowed.
        """
        origin = header.decode("latin-1").lower()
        if "*" in self._names or not self._origins.isdisjoint(("*", origin)):
            return True
        found = _ORIGIN.fullmatch(origin)
        its_host = found and _HOST.fullmatch(found[1])
        if not its_host:
            return False
        name, own = its_host[1].removesuffix("."), _HOST.fullmatch(host.decode("latin-1").lower())
        return _is_local(name) or name in self._names or (own is not None and its_host[1] == own[1])

    def _is_known(self, host: str) -> bool:
        name = host.removesuffix(".")
        if host.startswith("[") or _is_address(name):
            return True
        return "." not in name or name.endswith(".localhost") or name in self._names


def _is_local(name: str) -> bool:
    if name in ("localhost", "[::1]") or name.endswith(".localhost"):
        return True
    return _is_address(name) and ipaddress.IPv4Address(name) in _LOOPBACK


def _is_address(name: str) -> bool:
    try:
        ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return True
