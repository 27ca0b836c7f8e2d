"""Where reconstructions are kept for a while. Knows: ids, bytes, time to live. Does not know: what the bytes mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol


class StoreError(Exception):
    """The store did not answer, or refused."""


class Store(Protocol):
    """A store of blocks of bytes, each under a random id, each for a limited time.

    Every method raises `StoreError` when the store does not answer; nothing else.
    """

    async def put(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """Keep all entries, each as (id, content), or none of them."""

    async def get(self, key: str) -> bytes | None:
        """Return what is kept under an id; None when it never was, or has expired."""

    async def ping(self) -> None:
        """Return when the store answers."""

    async def close(self) -> None:
        """Let go of connections. Nothing may be called afterwards."""


Opener = Callable[[str, float, int], Store]
"""Makes a store from what follows `://`, the time to live in seconds and the most entries."""


def open_store(url: str, *, ttl_seconds: float, max_bytes: int, entry_bytes: int) -> Store:
    """Make the store that a URL names; the first use connects.

    Args:
        url: `sqlite:///relative/path`, `sqlite:////absolute/path`.
        ttl_seconds: how long an entry lives.
        max_bytes: about the most bytes that are kept; the oldest entries go first.
        entry_bytes: an upper bound of one entry's size.

    Raises:
        StoreError: the URL names no kind of store that there is.
    """
    return opener(url)(url.partition("://")[2], ttl_seconds, max(1, max_bytes // entry_bytes))


def opener(url: str) -> Opener:
    """Return the function that makes the kind of store that a URL names.

    Raises:
        StoreError: the URL names no kind of store that there is.
    """
    kind = url.partition("://")[0]
    if kind not in _OPENERS:
        raise StoreError(f"store URL {kind}://… is none of {', '.join(f'{name}://' for name in _OPENERS)}")
    return _OPENERS[kind]


def _open_sqlite(rest: str, ttl_seconds: float, max_entries: int) -> Store:
    from app.stores.sqlite import SqliteStore

    return SqliteStore(Path(rest.removeprefix("/")), ttl_seconds=ttl_seconds, max_entries=max_entries)


_OPENERS: dict[str, Opener] = {"sqlite": _open_sqlite}
