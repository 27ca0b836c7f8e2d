"""Deadlines of many things, and the time that a request body may take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping
from typing import Any

import pytest
import uvloop

from app.concurrency.deadlines import Deadlines
from app.http.bodies import BodyReader
from app.problems import BodyTimeout


async def test_what_takes_too_long_is_named_once_and_in_order() -> None:
    """Of many things, those that ended are not named, and the others when their own time is over."""
    late: list[tuple[str, float]] = []
    deadlines = Deadlines[str](0.05, lambda key: late.append((key, time.monotonic())))
    began: dict[str, float] = {}
    for key in ("a", "b", "c", "d"):
        began[key] = time.monotonic()
        deadlines.begin(key)
        if key in "ab":
            await asyncio.sleep(0.02)
    deadlines.end("c")  # before the event loop can be late
    deadlines.end("never begun")
    while deadlines:
        await asyncio.sleep(0.01)
    assert [key for key, _ in late] == ["a", "b", "d"]
    assert all(when - began[key] >= 0.045 for key, when in late)


async def test_deadlines_go_on_after_a_pause() -> None:
    """When all have ended before their time, what begins later still has its deadline; who missed it may begin anew."""
    late = asyncio.Event()
    deadlines = Deadlines[int](0.02, lambda _: late.set())
    deadlines.begin(1)
    deadlines.end(1)
    await asyncio.sleep(0.05)
    assert not late.is_set()
    for _ in range(2):
        deadlines.begin(1)
        await asyncio.wait_for(late.wait(), 5)
        late.clear()


def test_a_deadline_takes_no_more_than_a_few_looks() -> None:
    """uvloop's timers go off early; what is due in less than a millisecond is waited for, not asked about at once."""

    class Counted(Deadlines[int]):
        looks = 0

        def _look(self, loop: asyncio.AbstractEventLoop) -> None:
            self.looks += 1
            super()._look(loop)

    async def scenario() -> int:
        deadlines = Counted(0.02, lambda _: None)
        for key in range(200):
            deadlines.begin(key)
            await asyncio.sleep(0.0005 * (key % 8))
        while deadlines:
            await asyncio.sleep(0.005)
        return deadlines.looks

    assert uvloop.run(scenario()) <= 3 * 200


async def test_what_cannot_begin_holds_up_nothing_else() -> None:
    """A thread that forgets to say whose event loop it is gets an error, and later deadlines are kept all the same."""
    late: list[str] = []
    deadlines = Deadlines[str](0.02, late.append)
    with pytest.raises(RuntimeError):
        await asyncio.to_thread(deadlines.begin, "a")
    deadlines.begin("b")
    async with asyncio.timeout(5):
        while deadlines:
            await asyncio.sleep(0.01)
    assert late == ["b"]


async def test_threads_begin_and_end_things() -> None:
    """What other threads begin is either ended by them or named on the event loop, never both and never neither."""
    named: list[tuple[int, int]] = []
    ended: list[tuple[int, int]] = []
    deadlines = Deadlines[tuple[int, int]](0.003, named.append)
    loop = asyncio.get_running_loop()

    def work(thread: int) -> None:
        for number in range(300):
            deadlines.begin((thread, number), loop)
            time.sleep(0.0007 * (number % 8))  # the work itself: some of it within its 3 ms, some not
            if deadlines.end((thread, number)):
                ended.append((thread, number))

    await asyncio.gather(*(asyncio.to_thread(work, thread) for thread in range(3)))
    assert not deadlines
    assert named
    assert ended
    assert sorted(named + ended) == [(thread, number) for thread in range(3) for number in range(300)]


def pieces(*bodies: bytes) -> Any:
    """Return an ASGI channel that gives these pieces of a body that has another one, which never comes."""
    left = list(bodies)

    async def receive() -> MutableMapping[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": True}

    return receive


async def test_a_slow_body_is_given_up_and_its_task_goes_on() -> None:
    """A body that is not whole in time is a `BodyTimeout`; the task that read it can await other things afterwards."""
    reader = BodyReader(0.05)
    began = time.monotonic()
    with pytest.raises(BodyTimeout, match=r"0\.05 s"):
        await reader.read(pieces(b"a", b"b"), declared=None, limit=10)
    assert time.monotonic() - began >= 0.045
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_each_body_has_its_own_time() -> None:
    """Two tasks that read at once are given up one after the other, and a third that is whole is not."""
    reader, ends = BodyReader(0.05), []

    async def read(name: str, wait: float) -> None:
        await asyncio.sleep(wait)
        try:
            await reader.read(pieces(b"a"), declared=None, limit=10)
        except BodyTimeout:
            ends.append(name)

    async def whole() -> bytes:
        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": b"abc", "more_body": False}

        body = await reader.read(receive, declared=b"3", limit=10)
        await asyncio.sleep(0.1)
        return body

    *_, body = await asyncio.gather(read("second", 0.02), read("first", 0.0), whole())
    assert ends == ["first", "second"]
    assert body == b"abc"


async def test_a_cancelled_reader_is_cancelled() -> None:
    """Who cancels the task that reads is not told of a time-out, and nothing is left behind."""
    reader = BodyReader(0.03)
    task = asyncio.create_task(reader.read(pieces(), declared=None, limit=10))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not reader._deadlines


async def test_cancelled_and_too_late_at_once() -> None:
    """When the time is over in the same moment, the cancellation counts."""
    reader = BodyReader(0.03)
    task = asyncio.create_task(reader.read(pieces(), declared=None, limit=10))
    await asyncio.sleep(0)
    reader._interrupt(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
