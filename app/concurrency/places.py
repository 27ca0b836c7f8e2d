"""A limited number of places for concurrent requests, shared fairly between clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from app.problems import Overloaded, Problem


@dataclass(eq=False, slots=True)
class _Place:
    task: asyncio.Task[object]
    loss: Problem | None = None
    """Why the place was lost, if it was."""


class FairPlaces:
    """Places for requests that take long. All are available to one client while no other client needs one.

    If all places are taken, a client with fewer places than another one takes the newest place of the client that has
    most. The request in that place fails with `Overloaded`.

    Args:
        limit: number of places.
        purpose: what the places are for, as the problem says it: "images are being fitted".
    """

    def __init__(self, limit: int, purpose: str) -> None:
        self._limit = limit
        self._purpose = purpose
        self._places: dict[Hashable, list[_Place]] = {}

    @property
    def taken(self) -> int:
        """Number of places that are taken."""
        return sum(map(len, self._places.values()))

    @contextmanager
    def take(self, client: Hashable) -> Iterator[None]:
        """Hold a place inside the block, in the current task.

        Raises:
            Overloaded: there is no place, or another client has taken it.
        """
        if self.taken >= self._limit:
            self._make_room(client)
        task = asyncio.current_task()
        assert task is not None
        place = _Place(task)
        self._places.setdefault(client, []).append(place)
        try:
            yield
        except asyncio.CancelledError:
            # A cancellation by another caller takes precedence.
            if place.loss is not None and task.uncancel() == 0:
                raise place.loss from None
            raise
        finally:
            if place.loss is None:
                self._remove(client, place)

    def end_all(self, make_problem: Callable[[], Problem]) -> None:
        """End the requests in all places with a problem each."""
        for client, places in list(self._places.items()):
            for place in list(places):
                self._end(client, place, make_problem())

    def _end(self, client: Hashable, place: _Place, loss: Problem) -> None:
        place.loss = loss
        self._remove(client, place)
        place.task.cancel()

    def _make_room(self, client: Hashable) -> None:
        largest = max(self._places, key=lambda other: len(self._places[other]))
        if len(self._places[largest]) <= len(self._places.get(client, ())) + 1:
            raise Overloaded(f"{self._limit} {self._purpose} already")
        loss = Overloaded(f"{self._limit} {self._purpose}, and another client had fewer of them")
        self._end(largest, self._places[largest][-1], loss)

    def _remove(self, client: Hashable, place: _Place) -> None:
        self._places[client].remove(place)
        if not self._places[client]:
            del self._places[client]
