"""Opens the backend of the reconstruction store that a URL names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from app.stores.contract import Store, StoreError, StoreLimits

__all__ = ["BACKENDS", "Store", "StoreError", "open_store"]

BACKENDS = {
    "sqlite": "app.stores.sqlite",
    "redis": "app.stores.redis",
    "rediscluster": "app.stores.redis_cluster",
}
"""Module of each backend, by URL scheme. A module is imported when its backend is opened, and has a function `open_url`
that takes the URL and the limits."""


def open_store(
    url: str,
    *,
    ttl_seconds: float,
    max_bytes: int,
    entry_bytes: int,
    password_file: Path | None = None,
    timeout: float = 2.0,
    on_reopened: Callable[[], object] = lambda: None,
    on_damaged: Callable[[], object] = lambda: None,
    shared: bool = False,
) -> Store:
    """Build the backend that a URL names; its first use connects.

    Args:
        url: begins with the scheme of a backend.
        ttl_seconds, max_bytes, entry_bytes, password_file, timeout, on_reopened, on_damaged, shared: as for
            `StoreLimits`.

    Raises:
        StoreError: no backend has this scheme, or the URL does not have the form of its backend.
    """
    module = BACKENDS.get(url.partition("://")[0])
    if module is None:
        known = " or ".join(f"{scheme}://" for scheme in BACKENDS)
        raise StoreError(f"the store URL does not begin with {known}")  # the URL may contain a password
    open_url: Callable[[str, StoreLimits], Store] = importlib.import_module(module).open_url
    limits = StoreLimits(ttl_seconds, max_bytes, entry_bytes, password_file, timeout, on_reopened, on_damaged, shared)
    return open_url(url, limits)
