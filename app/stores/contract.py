"""The interface that every backend of the reconstruction store implements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class StoreError(Exception):
    """The reconstruction store did not answer, or rejected the operation."""


class Store(Protocol):
    """A store of byte strings, each under a random id, each for a limited time.

    `Reconstructions` calls all methods in one thread of the store's own, so they may block. When the backend fails,
    every method raises `StoreError`, and nothing else.
    """

    def put(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """Store all entries, each as (id, content), or none of them."""

    def get(self, id: str) -> bytes | None:
        """Return the content under an id; None if it was never stored or has expired."""

    def ping(self) -> None:
        """Write something: a backend that is full or read-only still answers reads."""

    def close(self) -> None:
        """Release files and connections."""
