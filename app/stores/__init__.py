"""Where reconstructions are kept for a while: the kinds of store, by the scheme of their URL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from app.stores.contract import Store, StoreError

__all__ = ["Store", "StoreError", "open_store"]


def open_store(
    url: str, *, ttl_seconds: float, max_bytes: int, entry_bytes: int, password_file: Path | None = None
) -> Store:
    """Make the store that a URL names; the first use connects.

    Args:
        url: `sqlite:///relative/path`, `sqlite:////absolute/path`, `redis://host:port/database`.
        ttl_seconds: how long an entry lives.
        max_bytes: about the most bytes that are kept; the oldest entries go first. A Redis server has a bound of its
            own (`maxmemory`), shared by all that use it; this one does not apply there.
        entry_bytes: an upper bound of one entry's size.
        password_file: holds the password of the Redis server.

    Raises:
        StoreError: the URL names no kind of store that there is, or is not as that kind has it.
    """
    kind = url.partition("://")[0]
    if kind not in _OPENERS:
        raise StoreError(f"store URL {kind}://… is none of {', '.join(f'{name}://' for name in _OPENERS)}")
    return _OPENERS[kind](url, ttl_seconds, max(1, max_bytes // entry_bytes), password_file)


def _open_sqlite(url: str, ttl_seconds: float, max_entries: int, password_file: Path | None) -> Store:
    from app.stores.sqlite import SqliteStore

    if password_file is not None:
        raise StoreError("a SQLite file has no password")
    path = Path(url.partition("://")[2].removeprefix("/"))
    return SqliteStore(path, ttl_seconds=ttl_seconds, max_entries=max_entries)


def _open_redis(url: str, ttl_seconds: float, _max_entries: int, password_file: Path | None) -> Store:
    from app.stores.redis import RedisStore

    return RedisStore(url, ttl_seconds=ttl_seconds, password_file=password_file)


_OPENERS: dict[str, Callable[[str, float, int, Path | None], Store]] = {"sqlite": _open_sqlite, "redis": _open_redis}
