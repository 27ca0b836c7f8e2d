"""The reconstruction store in one SQLite file that several worker processes share."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from app.stores import states
from app.stores.contract import StoreError, StoreLimits
from app.stores.sqlite_file import PAGE_BYTES, StoreFile, check_tables, give_way

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    number INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    expires REAL NOT NULL,
    content BLOB NOT NULL
)
"""
_SWEEP_EVERY = 256
"""Number of entries between two sweeps. A sweep deletes at most twice as many, so that no write waits long."""
_MOST_ROWS = 64
"""Maximum number of rows per statement. One statement of each length stays prepared."""

_PING_BYTES = 2 * PAGE_BYTES
_IN_MEMORY = ":memory:"


def open_url(url: str, limits: StoreLimits) -> SqliteStore:
    """Build the store for `sqlite:///relative/path` or `sqlite:////absolute/path`.

    SQLite keeps a store with the path `:memory:` in memory. Such a store belongs to one process.
    """
    if limits.password_file is not None:
        raise StoreError("a SQLite file has no password: unset ANOMALY_STORE_PASSWORD_FILE")
    path = _path_of(url)
    if limits.shared and str(path) == _IN_MEMORY:
        raise StoreError(
            "a SQLite store in memory cannot be shared by workers: name a file in ANOMALY_STORE_URL, or set "
            "ANOMALY_WORKERS=1"
        )
    max_entries = max(1, limits.max_bytes // limits.entry_bytes)
    return SqliteStore(
        path,
        ttl_seconds=limits.ttl_seconds,
        max_entries=max_entries,
        timeout=limits.timeout,
        on_reopened=limits.on_reopened,
        on_damaged=limits.on_damaged,
        shared=limits.shared,
    )


def _path_of(url: str) -> Path:
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
        raise StoreError("the store URL names no file; its form is sqlite:///path")
    return path


def _check_tables(connection: sqlite3.Connection) -> None:
    check_tables(connection, ("entries", "number,key,expires,content"), states.TABLE)


@lru_cache
def _insertion(rows: int) -> str:
    return f"INSERT INTO entries (key, expires, content) VALUES {', '.join(['(?, ?, ?)'] * rows)}"  # noqa: S608


class SqliteStore:
    """Entries in the order of arrival, in a file with a rollback journal.

    When `put` returns, the entries survive `kill -9`. SQLite does not fsync (`synchronous=OFF`), so a crash of the
    machine can lose entries or damage the file. With fsync, every score would stall for milliseconds, several times per
    second, for pictures that expire after an hour. The first process after a boot checks the file. A damaged file is
    renamed to `<name>.damaged`, then or at the access that finds the damage, and a new one is created. Entries are
    numbered in order of arrival and have the same time to live, so both limits, age and number, are ranges of that
    number.

    Args:
        path, timeout, on_reopened, on_damaged, shared: as for `StoreFile`.
        ttl_seconds: time to live of an entry.
        max_entries: maximum number of entries; the oldest are deleted first.
        clock: seconds since the epoch, the same for all processes.

    Raises:
        StoreError: the file is a database of another program. Other errors are raised at the first use.
    """

    def __init__(
        self,
        path: Path,
        *,
        ttl_seconds: float,
        max_entries: int,
        timeout: float = 2.0,
        on_reopened: Callable[[], object] = lambda: None,
        on_damaged: Callable[[], object] = lambda: None,
        shared: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ttl = ttl_seconds
        self._max_entries = max_entries
        self._clock = clock
        self._since_sweep = 0
        self._file = StoreFile(
            path,
            schema=(_SCHEMA, states.SCHEMA),
            check=_check_tables,
            timeout=timeout,
            on_reopened=on_reopened,
            on_damaged=on_damaged,
            shared=shared,
        )
        self._file.refuse_foreign()

    def put(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """Store all entries in one transaction, or none of them."""
        self._file.run(lambda connection: self._put(connection, entries))
        give_way(self._file)

    def get(self, id: str) -> bytes | None:
        """Return the content under an id; None if it was never stored or has expired."""
        return self._file.run(lambda connection: self._get(connection, id))

    def read_state(self, key: str) -> bytes | None:
        """Return the state under a key; None if there is none."""
        return self._file.run(lambda connection: states.read(connection, key))

    def swap_state(self, key: str, old: bytes | None, new: bytes) -> bool:
        """Replace the state under a key if it still is `old`. Return False if it is not."""
        return self._file.run(lambda connection: states.swap(connection, key, old, new))

    def ping(self) -> None:
        """Write an expired entry and delete it. It needs new pages, so it fails on a full disk as `put` does."""
        self._file.run(self._ping)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _put(self, connection: sqlite3.Connection, entries: Sequence[tuple[str, bytes]]) -> None:
        if not entries:
            return
        expires = self._clock() + self._ttl
        since_sweep = self._since_sweep + len(entries)
        if len(entries) <= _MOST_ROWS and since_sweep < _SWEEP_EVERY:
            # A single statement is a transaction. Each further one would release the GIL and wait to reacquire it.
            self._insert(connection, entries, expires)
            self._since_sweep = since_sweep
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            for start in range(0, len(entries), _MOST_ROWS):
                self._insert(connection, entries[start : start + _MOST_ROWS], expires)
            if since_sweep >= _SWEEP_EVERY:
                self._sweep(connection, 2 * since_sweep)
                since_sweep = 0
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # on a full disk, SQLite has rolled back already
                connection.execute("ROLLBACK")
            raise
        self._since_sweep = since_sweep

    @staticmethod
    def _insert(connection: sqlite3.Connection, entries: Sequence[tuple[str, bytes]], expires: float) -> None:
        values = [value for key, content in entries for value in (key, expires, content)]
        connection.execute(_insertion(len(entries)), values)

    def _get(self, connection: sqlite3.Connection, key: str) -> bytes | None:
        row = connection.execute("SELECT content, expires FROM entries WHERE key = ?", (key,)).fetchone()
        return row[0] if row is not None and row[1] > self._clock() else None

    def _ping(self, connection: sqlite3.Connection) -> None:
        key = f"ping/{os.urandom(16).hex()}"
        connection.execute(_insertion(1), (key, 0.0, bytes(_PING_BYTES)))
        connection.execute("DELETE FROM entries WHERE key = ?", (key,))
        self._file.release()  # pings come when nothing else does

    def _sweep(self, connection: sqlite3.Connection, limit: int) -> None:
        (newest,) = connection.execute("SELECT max(number) FROM entries").fetchone()
        connection.execute(
            # The inner selection reads each of the oldest entries once, and usually finds nothing to delete.
            "DELETE FROM entries WHERE number IN (SELECT number FROM"
            " (SELECT number, expires FROM entries ORDER BY number LIMIT ?) WHERE number <= ? OR expires <= ?)",
            (limit, newest - self._max_entries, self._clock()),
        )
