"""The reconstruction store in one SQLite file that several worker processes share."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TextIO, TypeVar

from app.stores.contract import StoreError, StoreLimits

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

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
_PAGE_BYTES = 8192
"""A page contains three entries if their replies have at most 300 bytes."""
_PAGES_LOGGED = 200
"""Number of pages in the write-ahead log per checkpoint. A checkpoint takes 3 ms; with the default of 1,000, 7 ms."""
_COMPARE_SECONDS = 1.0
"""Time between two checks that the open file is still the one under its name."""
_MOST_ROWS = 64
"""Maximum number of rows per statement. One statement of each length stays prepared."""


_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Changes with each boot of the machine. Exists on Linux only."""


_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def open_url(url: str, limits: StoreLimits) -> SqliteStore:
    """Build the store for `sqlite:///relative/path` or `sqlite:////absolute/path`."""
    if limits.password_file is not None:
        raise StoreError("a SQLite file has no password: unset ANOMALY_STORE_PASSWORD_FILE")
    max_entries = max(1, limits.max_bytes // limits.entry_bytes)
    return SqliteStore(
        _path_of(url),
        ttl_seconds=limits.ttl_seconds,
        max_entries=max_entries,
        timeout=limits.timeout,
        on_reopened=limits.on_reopened,
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


def _is_sound(path: Path, timeout: float) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=timeout)) as connection:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except UnicodeDecodeError:  # SQLite's message quotes the damaged bytes
        return False
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF in _DAMAGE:
            return False
        raise  # a file that is locked, not reachable or on a full disk is not damaged
    return bool(verdict == "ok")


def _refuse_foreign(connection: sqlite3.Connection) -> None:
    """Raise StoreError if the database has tables other than those of a store. Only reads."""
    tables = connection.execute(
        "SELECT name, (SELECT group_concat(name) FROM pragma_table_info(tables.name)) FROM sqlite_master AS tables"
        " WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    ).fetchall()
    if tables not in ([], [("entries", "number,key,expires,content")]):
        raise StoreError("SQLite: the file is a database of another program")


@lru_cache
def _insertion(rows: int) -> str:
    return f"INSERT INTO entries (key, expires, content) VALUES {', '.join(['(?, ?, ?)'] * rows)}"  # noqa: S608


class SqliteStore:
    """Entries in the order of arrival, in a file in write-ahead-log mode.

    When `put` returns, the entries survive `kill -9`. SQLite does not fsync (`synchronous=OFF`), so a crash of the
    machine can lose entries or damage the file. With fsync, every score would stall for milliseconds, several times per
    second, for pictures that expire after an hour. The first process after a boot checks the file. It renames a damaged
    file to `<name>.damaged` and creates a new one. Entries are numbered in order of arrival and have the same time to
    live, so both limits, age and number, are ranges of that number.

    Args:
        path: the file; its folder is created.
        ttl_seconds: time to live of an entry.
        max_entries: maximum number of entries; the oldest are deleted first.
        timeout: seconds that each access waits for a lock of another connection. A process that checks the file after
            a boot is awaited without a limit.
        on_reopened: called when the file was deleted or replaced, and has been opened again.
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
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._ttl = ttl_seconds
        self._max_entries = max_entries
        self._timeout = timeout
        self._clock = clock
        self._since_sweep = 0
        self._connection: sqlite3.Connection | None = None
        self._on_reopened = on_reopened
        self._opened: tuple[int, int] | None = None
        """Device and inode of the file that is open."""
        self._compare_at = 0.0
        self._refuse_foreign_file()

    def put(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """Store all entries in one transaction, or none of them."""
        self._answer(lambda connection: self._put(connection, entries))

    def get(self, id: str) -> bytes | None:
        """Return the content under an id; None if it was never stored or has expired."""
        return self._answer(lambda connection: self._get(connection, id))

    def ping(self) -> None:
        """Write a number into the header of the file that SQLite does not use."""
        self._answer(lambda connection: connection.execute("PRAGMA user_version=1"))

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _answer(self, work: Callable[[sqlite3.Connection], Answer]) -> Answer:
        try:
            return work(self._open())
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise StoreError(f"SQLite: {error}") from error
        except OSError as error:  # its message contains the path
            raise StoreError(f"SQLite: {error.strerror}") from error

    def _refuse_foreign_file(self) -> None:
        with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):  # missing, locked or damaged
            address = f"{self._path.absolute().as_uri()}?mode=ro"
            with contextlib.closing(sqlite3.connect(address, uri=True, timeout=self._timeout)) as connection:
                _refuse_foreign(connection)

    def _open(self) -> sqlite3.Connection:
        now = time.monotonic()
        if now >= self._compare_at:  # not with each access: a system call releases the GIL
            self._compare_at = now + _COMPARE_SECONDS
            if self._connection is not None and self._identity() != self._opened:
                # SQLite itself goes on with a file that no longer has a name, and all entries would be lost.
                self.close()
        if self._connection is None:
            replaced = self._opened is not None and self._identity() != self._opened
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # If two processes switch a new file to WAL at the same time, one of them fails without waiting.
            with self._beside(".lock").open("a+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._check_after_boot(lock, again=replaced)
                connection = sqlite3.connect(
                    self._path, timeout=self._timeout, isolation_level=None, cached_statements=_MOST_ROWS + 16
                )
                _refuse_foreign(connection)
                connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=OFF")
                connection.execute(f"PRAGMA wal_autocheckpoint={_PAGES_LOGGED}")
                connection.execute(_SCHEMA)
            self._connection, self._opened = connection, self._identity()
            if replaced:
                _log.warning("the file of the reconstruction store was deleted or replaced, and has been opened again")
                self._on_reopened()
        return self._connection

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _beside(self, ending: str) -> Path:
        return self._path.with_name(self._path.name + ending)

    def _check_after_boot(self, lock: TextIO, *, again: bool) -> None:
        """Move a damaged file aside.

        Args:
            lock: contains the id of the boot in which a process last checked the file.
            again: whether to check the file even if this was in the current boot.
        """
        try:
            boot = _BOOT_ID.read_text()
        except OSError:
            boot = ""  # without a boot id, the first process to open the file checks it
        lock.seek(0)
        if boot and lock.read() == boot and not again:
            return
        if self._path.exists() and not _is_sound(self._path, self._timeout):
            for ending in ("-wal", "-shm", ""):  # the log must not outlive its file
                self._beside(".damaged" + ending).unlink(missing_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    self._beside(ending).rename(self._beside(".damaged" + ending))
            name = self._beside(".damaged").name
            _log.error("the file of the store is damaged and was renamed to %s; a new file is created", name)
        lock.truncate(0)
        lock.write(boot)

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

    def _sweep(self, connection: sqlite3.Connection, limit: int) -> None:
        (newest,) = connection.execute("SELECT max(number) FROM entries").fetchone()
        connection.execute(
            # The inner selection reads each of the oldest entries once, and usually finds nothing to delete.
            "DELETE FROM entries WHERE number IN (SELECT number FROM"
            " (SELECT number, expires FROM entries ORDER BY number LIMIT ?) WHERE number <= ? OR expires <= ?)",
            (limit, newest - self._max_entries, self._clock()),
        )
