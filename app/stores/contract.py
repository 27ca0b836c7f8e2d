"""The interface that every backend of the reconstruction store implements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class StoreError(Exception):
    """The reconstruction store did not answer, or rejected the operation."""


@dataclass(frozen=True)
class StoreLimits:
    """The settings of a backend.

    Attributes:
        ttl_seconds: time to live of an entry.
        max_bytes: approximate maximum number of bytes of all entries; the oldest entries are deleted first. A Redis
            server has its own limit, `maxmemory`.
        entry_bytes: maximum number of bytes of an entry.
        password_file: file that contains the password of the server.
        timeout: seconds for connecting to a server and for each of its replies, or for a lock of a file.
        on_reopened: called when a file was deleted or replaced, and has been opened again.
        on_damaged: called when a file was damaged, and has been moved aside.
        shared: whether several processes of the service use the store.
    """

    ttl_seconds: float
    max_bytes: int
    entry_bytes: int
    password_file: Path | None
    timeout: float
    on_reopened: Callable[[], object] = lambda: None
    on_damaged: Callable[[], object] = lambda: None
    shared: bool = False


class Store(Protocol):
    """A store of byte strings, each under a random id, each for a limited time.

    `Reconstructions` calls all methods in one thread of the store's own, so they may block. When the backend fails,
    every method raises `StoreError`, and nothing else.
    """

    def put(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """Store all entries, each as (id, content), or none of them."""

    def get(self, id: str) -> bytes | None:
        """Return the content under an id; None if it was never stored or has expired."""

    def read_state(self, key: str) -> bytes | None:
        """Return the state under a key; None if there is none. States do not expire."""

    def swap_state(self, key: str, old: bytes | None, new: bytes) -> bool:
        """Replace the state under a key if it still is `old`, in one atomic step. Return False if it is not.

        Args:
            key: names the state.
            old: what `read_state` returned.
            new: different from every other state that any process writes under the key.
        """

    def ping(self) -> None:
        """Write an entry as a test, because a backend that is full or read-only can still be read."""

    def close(self) -> None:
        """Release files and connections."""
