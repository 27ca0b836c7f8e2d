"""Places for concurrent requests: all for one client, or a fair share for each of several."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from app.concurrency.places import FairPlaces
from app.problems import Overloaded
from tests.waiting import until


class Crowd:
    """Tasks that hold places until they are released."""

    def __init__(self, limit: int) -> None:
        self.places = FairPlaces(limit, "images are being fitted", cause="fit_places")
        self.released = asyncio.Event()

    async def hold(self, client: str) -> str:
        """Hold a place of a client until it is released."""
        with self.places.take(client):
            await self.released.wait()
        return client

    async def enter(self, *clients: str) -> list[asyncio.Task[str]]:
        """Start one task per client, in order."""
        tasks = [asyncio.create_task(self.hold(client)) for client in clients]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return tasks


@pytest.fixture
def make_crowd() -> Callable[[int], Crowd]:
    return Crowd


async def test_one_client_may_have_all_places(make_crowd: Callable[[int], Crowd]) -> None:
    """Without another client, no place is reserved; one more request is rejected."""
    crowd = make_crowd(4)
    held = await crowd.enter(*"aaaa")
    (rejected,) = await crowd.enter("a")
    with pytest.raises(Overloaded, match="4 images are being fitted already"):
        await rejected
    crowd.released.set()
    assert await asyncio.gather(*held) == ["a"] * 4
    assert crowd.places.taken == 0


async def test_another_client_takes_the_newest_place(make_crowd: Callable[[int], Crowd]) -> None:
    """A client without a place gets one of the client with most, until both have about the same number."""
    crowd = make_crowd(4)
    flood = await crowd.enter(*"aaaa")
    late = await crowd.enter(*"bbb")
    await until(lambda: flood[3].done() and flood[2].done() and late[2].done())
    for lost in (*flood[2:], late[2]):
        with pytest.raises(Overloaded):
            await lost
    assert crowd.places.taken == 4
    crowd.released.set()
    assert await asyncio.gather(*flood[:2], *late[:2]) == ["a", "a", "b", "b"]
    assert crowd.places.taken == 0


async def test_a_cancelled_request_is_not_an_overload(make_crowd: Callable[[int], Crowd]) -> None:
    """A request that is cancelled by its client frees its place, also if another client takes it at that moment."""
    crowd = make_crowd(1)
    (task,) = await crowd.enter("a")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert crowd.places.taken == 0
    crowd = make_crowd(2)
    held = await crowd.enter("a", "a")
    held[1].cancel()
    with crowd.places.take("b"):
        with pytest.raises(asyncio.CancelledError):
            await held[1]
        assert crowd.places.taken == 2
    crowd.released.set()
    assert await held[0] == "a"


async def test_a_result_that_is_ready_is_lost_with_its_place(make_crowd: Callable[[int], Crowd]) -> None:
    """If a request loses its place when its result is just ready, the request ends inside its block."""
    crowd = make_crowd(2)
    held = await crowd.enter("a", "a")
    crowd.released.set()
    with crowd.places.take("b"):
        assert crowd.places.taken == 2
    assert await held[0] == "a"
    with pytest.raises(Overloaded):
        await held[1]
    assert crowd.places.taken == 0
