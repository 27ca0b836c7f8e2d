"""Where reconstructions are kept for a while: the kinds of store, by the scheme of their URL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from app.stores.contract import Store, StoreError

__all__ = ["Store", "StoreError", "open_store"]


def open_store(
    url: str,
    *,
    ttl_seconds: float,
    max_bytes: int,
    entry_bytes: int,
    password_file: Path | None = None,
    timeout: float = 2.0,
    on_reopened: Callable[[], object] = lambda: None,
) -> Store:
    """Make the store that a URL names; the first use connects.

    Args:
        url: `sqlite:///relative/path`, `sqlite:////absolute/path`, `redis://host:port/database`.
        ttl_seconds: how long an entry lives.
        max_bytes: about the most bytes that are kept; the oldest entries go first. A Redis server has a bound of its
            own (`maxmemory`), shared by all that use it; this one does not apply there.
        entry_bytes: an upper bound of one entry's size.
        password_file: holds the password of the Redis server.
        timeout: seconds for connecting to a Redis server and for each of its answers, or for a lock of a SQLite file.
        on_reopened: called when a SQLite file was deleted or replaced, and has been opened again.

    Raises:
        StoreError: the URL names no kind of store that there is, or is not as that kind has it.
    """
    kind = url.partition("://")[0]
    if kind not in ("sqlite", "redis"):
        raise StoreError("the store's URL begins with neither sqlite:// nor redis://")  # it may hold a password
    if kind == "redis":
        return _open_redis(url, ttl_seconds, password_file, timeout)
    from app.stores.sqlite import SqliteStore

    if password_file is not None:
        raise StoreError("a SQLite file has no password")
    return SqliteStore(
        _sqlite_path(url),
        ttl_seconds=ttl_seconds,
        max_entries=max(1, max_bytes // entry_bytes),
        timeout=timeout,
        on_reopened=on_reopened,
    )


def _sqlite_path(url: str) -> Path:
    rest = url.partition("://")[2]
    if rest and not rest.startswith("/"):
        raise StoreError(
            "the store's URL has two slashes; write three before a relative path, sqlite:///var/reconstructions.db, "
            "and four before an absolute path, sqlite:////var/reconstructions.db"
        )
    if "?" in rest:
        raise StoreError("the store's URL has a query, which a SQLite store does not read; write sqlite:///path alone")
    path = Path(rest.removeprefix("/"))
    if not path.name:
        raise StoreError("the store's URL names no file: sqlite:///path")
    return path


def _open_redis(url: str, ttl_seconds: float, password_file: Path | None, timeout: float) -> Store:
    from app.stores.redis import RedisStore

    return RedisStore(url, ttl_seconds=ttl_seconds, password_file=password_file, timeout=timeout)
