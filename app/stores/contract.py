"""What every store does. Knows: ids, bytes. Does not know: what the bytes mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class StoreError(Exception):
    """The store did not answer, or refused."""


Then = Callable[[Exception | None], object]
"""Is called once, in any thread: with None when all is done, or with what went wrong."""


class Store(Protocol):
    """A store of blocks of bytes, each under a random id, each for a limited time.

    When the store does not answer, `put` says so to `then`, and every other method raises `StoreError`; nothing else.
    """

    def put(self, entries: Sequence[tuple[str, bytes]], then: Then, wanted: Callable[[], bool]) -> None:
        """Keep all entries, or none of them, and call `then`.

        Any thread may call it, once the event loop has called a method: it waits for nothing, so that a score gets from
        the model to the store without the event loop.

        Args:
            entries: each as (id, content).
            then: hears what became of it.
            wanted: is asked before anything is done; if it says no, nothing is, and `then` is not called. So a store
                that was slow does not work off what nobody waits for.
        """

    async def get(self, key: str) -> bytes | None:
        """Return what is kept under an id; None when it never was, or has expired."""

    async def ping(self) -> None:
        """Return when the store has written something: one that is full, or may only be read, still gives answers."""

    async def close(self) -> None:
        """Finish what was begun and let go of connections. Nothing may be called afterwards."""
