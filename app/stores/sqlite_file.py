"""Opens the SQLite file of the reconstruction store, and opens it again when it was deleted, replaced or damaged."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

from app.stores.contract import StoreError
from app.stores.file_users import FileUsers

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

PAGE_BYTES = 8192
"""A page contains three entries if their replies have at most 300 bytes."""
_MAX_JOURNAL_BYTES = 4 * 1024 * 1024
_COMPARE_SECONDS = 0.25
"""Time between two checks that the open file is still the one under its name, and that no other process uses it."""
_TURN_SECONDS = 0.0002
"""Pause after a write while other processes use the file."""
_REPAIR_SECONDS = 10.0
"""Minimum time between two damaged files that are moved aside: a disk that damages each file is not written forever."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Changes with each boot of the machine. Exists on Linux only."""
_CACHED_STATEMENTS = 80
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SUSPECT = (*_DAMAGE, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_READONLY_DBMOVED, sqlite3.SQLITE_ERROR)
"""Errors of a file that was damaged or changed. The statements of the store are fixed, so `SQLITE_ERROR` means that a
table is missing."""


def check_tables(connection: sqlite3.Connection, *known: tuple[str, str]) -> None:
    """Raise StoreError if the database has other tables. Only reads.

    Args:
        connection: to the database.
        known: name and columns of each table of the store.
    """
    tables = connection.execute(
        "SELECT name, (SELECT group_concat(name) FROM pragma_table_info(tables.name)) FROM sqlite_master AS tables"
        " WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    ).fetchall()
    if not set(tables) <= set(known):
        raise StoreError("SQLite: the file is a database of another program")


class StoreFile:
    """One SQLite file with a rollback journal, shared by processes.

    A process that uses the file alone keeps SQLite's lock between transactions, which halves the time of a commit. It
    looks for other processes every quarter of a second, and gives the lock back if it finds one.

    A write-ahead log would need an index in shared memory, the file `-shm`. If another program truncates that file,
    the kernel kills every process that has mapped it (SIGBUS). A rollback journal is never mapped, and neither is the
    database.

    Args:
        path: the file; its folder is created.
        schema: statements that create the tables if they do not exist.
        check: raises StoreError if the database belongs to another program.
        timeout: seconds that each access waits for a lock of another connection. A process that checks the file is
            awaited without a limit.
        on_reopened: called when the file was deleted or replaced, and has been opened again.
        on_damaged: called when the file was damaged, and has been moved aside.
        shared: whether other processes are known to use the file; then this one never keeps the lock.
    """

    def __init__(
        self,
        path: Path,
        *,
        schema: Sequence[str],
        check: Callable[[sqlite3.Connection], None],
        timeout: float,
        on_reopened: Callable[[], object],
        on_damaged: Callable[[], object],
        shared: bool,
    ) -> None:
        self._path = path
        self._schema = schema
        self._check = check
        self._timeout = timeout
        self._on_reopened = on_reopened
        self._on_damaged = on_damaged
        self._shared = shared
        self._connection: sqlite3.Connection | None = None
        self._exclusive = False
        self._users = FileUsers(path)
        self._opened: tuple[int, int] | None = None
        """Device and inode of the file that is open."""
        self._compare_at = 0.0
        self._moved_aside_at = -_REPAIR_SECONDS

    def refuse_foreign(self) -> None:
        """Raise StoreError if the file is a database of another program. It is not created."""
        with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):  # missing, locked or damaged
            address = f"{self._path.absolute().as_uri()}?mode=ro"
            with contextlib.closing(sqlite3.connect(address, uri=True, timeout=self._timeout)) as connection:
                self._check(connection)

    def run(self, work: Callable[[sqlite3.Connection], Answer]) -> Answer:
        """Return the result of `work`, which may be called again with another file if the first one is not usable.

        Raises:
            StoreError: the file cannot be used.
        """
        try:
            try:
                return work(self._open())
            except (sqlite3.Error, UnicodeDecodeError) as error:
                if not _is_suspect(error):
                    raise
                self._reopen(move_aside=False)
            try:
                return work(self._open())
            except (sqlite3.Error, UnicodeDecodeError) as error:  # the check of the whole file has not found it
                if not _is_damage(error):
                    raise
                self._reopen(move_aside=True)
            return work(self._open())
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise StoreError(f"SQLite: {error}") from error
        except OSError as error:  # its message contains the path
            raise StoreError(f"SQLite: {error.strerror}") from error

    def release(self) -> None:
        """Give SQLite's lock back until the next access that looks for other processes. `run` translates the errors."""
        self._hold(exclusive=False)

    def close(self) -> None:
        """Close the file."""
        self._exclusive = False
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._users.leave()

    def _open(self) -> sqlite3.Connection:
        now = time.monotonic()
        if now >= self._compare_at:  # not with each access: a system call releases the GIL
            self._compare_at = now + _COMPARE_SECONDS
            if self._connection is not None and self._identity() != self._opened:
                # SQLite itself reads on from a file that no longer has a name, and all entries would be lost.
                self.close()
            self._hold(exclusive=False)
            self._hold(exclusive=self._users.alone() and not self._shared)  # `alone` may join again, so it comes first
        if self._connection is None:
            replaced = self._opened is not None and self._identity() != self._opened
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._users.joined() as lock:
                self._check_after_boot(lock, again=replaced)
                self._connection = self._connect()
            self._opened = self._identity()
            if replaced:
                _log.warning("the file of the reconstruction store was deleted or replaced, and has been opened again")
                self._on_reopened()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=self._timeout, isolation_level=None, cached_statements=_CACHED_STATEMENTS
        )
        try:
            # With exclusive locking, SQLite converts a file that has a write-ahead log without mapping the log's index.
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._check(connection)
            connection.execute("PRAGMA mmap_size=0")
            connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
            connection.execute("PRAGMA journal_mode=PERSIST")
            connection.execute(f"PRAGMA journal_size_limit={_MAX_JOURNAL_BYTES}")
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute("PRAGMA locking_mode=NORMAL")
            for statement in self._schema:
                connection.execute(statement)
            connection.execute("SELECT count(*) FROM sqlite_master").fetchall()  # releases the exclusive lock
        except BaseException:
            connection.close()
            raise
        return connection

    def _hold(self, *, exclusive: bool) -> None:
        if self._connection is None or exclusive == self._exclusive:
            return
        self._connection.execute(f"PRAGMA locking_mode={'EXCLUSIVE' if exclusive else 'NORMAL'}")
        if not exclusive:
            self._connection.execute("SELECT count(*) FROM sqlite_master").fetchall()  # only an access unlocks
            # Own writes have hidden changes of others: read every page again.
            self._connection.execute("PRAGMA shrink_memory")
        self._exclusive = exclusive

    def _reopen(self, *, move_aside: bool) -> None:
        """Close the file and check it, so that the next access opens a sound one.

        Args:
            move_aside: whether to move the file aside although its check finds nothing.
        """
        self.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._users.locked():
            if self._opened is not None and self._identity() != self._opened:
                return  # another process has moved the damaged file aside, or the file was replaced
            if self._path.exists() and (move_aside or not _is_sound(self._path, self._timeout)):
                self._move_aside()

    def _move_aside(self) -> None:
        if time.monotonic() - self._moved_aside_at < _REPAIR_SECONDS:
            raise StoreError("SQLite: the file is damaged again, a moment after it was created")
        self._moved_aside_at = time.monotonic()
        for ending in ("-journal", "-wal", "-shm", ""):  # a journal must not outlive its file
            self._beside(".damaged" + ending).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._beside(ending).rename(self._beside(".damaged" + ending))
        self._opened = None
        name = self._beside(".damaged").name
        _log.error("the file of the store is damaged and was renamed to %s; a new file is created", name)
        self._on_damaged()

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
            self._move_aside()
        lock.truncate(0)
        lock.write(boot)


def _is_suspect(error: Exception) -> bool:
    if isinstance(error, UnicodeDecodeError):  # SQLite's message quotes the damaged bytes
        return True
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is not None and (code in _SUSPECT or code & 0xFF in _DAMAGE)


def _is_damage(error: Exception) -> bool:
    return isinstance(error, UnicodeDecodeError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


def give_way(file: StoreFile) -> None:
    """Let other processes write. SQLite's lock is not fair: a process that writes without a pause would keep it."""
    if not file._exclusive:
        time.sleep(_TURN_SECONDS)


def _is_sound(path: Path, timeout: float) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=timeout)) as connection:
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")  # as in `StoreFile._connect`
            connection.execute("PRAGMA mmap_size=0")
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except UnicodeDecodeError:
        return False
    except sqlite3.Error as error:
        if _is_damage(error):
            return False
        raise  # a file that is locked, not reachable or on a full disk is not damaged
    return bool(verdict == "ok")
