"""Tells a process whether others have the same file of the reconstruction store open."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


class FileUsers:
    """The processes that use a file. Each holds a shared `flock` on `<name>.users`, which ends with the process.

    Args:
        path: the file; its folder exists when a method is called.
    """

    def __init__(self, path: Path) -> None:
        self._lock_path = path.with_name(f"{path.name}.lock")
        self._users_path = path.with_name(f"{path.name}.users")
        self._users: TextIO | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[TextIO]:
        """Exclude other processes, and yield the file `<name>.lock`, open for reading and appending."""
        with self._lock_path.open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock

    @contextlib.contextmanager
    def joined(self) -> Iterator[TextIO]:
        """Count this process until `leave`, as `locked` does for the block; an error in the block undoes it."""
        with self.locked() as lock:
            if self._users is None:
                self._users = self._held()
            try:
                yield lock
            except BaseException:
                self.leave()
                raise

    def leave(self) -> None:
        """Count this process no longer."""
        if self._users is not None:
            self._users.close()
            self._users = None

    def alone(self) -> bool:
        """Return whether this process has joined and no other one has, without waiting.

        If `<name>.users` was deleted, other processes lock a new file, so this one joins again there.
        """
        if self._users is None:
            return False
        with self._lock_path.open("a+") as lock:
            try:
                # A failed conversion of a `flock` loses the lock, so only one process at a time converts its own.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not self._has_name(self._users):
                    deleted, self._users = self._users, self._held()
                    deleted.close()
                fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            finally:
                fcntl.flock(self._users, fcntl.LOCK_SH)
        return True

    def _held(self) -> TextIO:
        users = self._users_path.open("a+")  # for a shared lock, NFS demands that the file can be read
        fcntl.flock(users, fcntl.LOCK_SH)
        return users

    def _has_name(self, users: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(users.fileno()), self._users_path.stat())
        except FileNotFoundError:
            return False
