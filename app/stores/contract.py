"""What every store does. Knows: ids, bytes. Does not know: what the bytes mean."""

from __future__ import annotations

from collections.abc import Sequence
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
