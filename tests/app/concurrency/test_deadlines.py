"""`Deadlines`: many operations with one timer."""

from __future__ import annotations

import asyncio
import time

import pytest
import uvloop

from app.concurrency.deadlines import Deadlines
from tests.waiting import advance, until, virtual_time


@virtual_time
async def test_each_late_operation_is_reported_once_and_in_order() -> None:
    """Operations that end in time are not reported; each other operation is reported at its own deadline."""
    clock = asyncio.get_running_loop().time
    late: list[tuple[str, float]] = []
    deadlines = Deadlines[str](0.05, lambda key: late.append((key, clock())), clock)
    for key, pause in (("a", 0.02), ("b", 0.02), ("c", 0.0), ("d", 0.0)):
        deadlines.begin(key)
        await advance(pause)
    deadlines.end("c")
    deadlines.end("never begun")
    await advance(1)
    assert [key for key, _ in late] == ["a", "b", "d"]
    assert [when for _, when in late] == pytest.approx([0.05, 0.07, 0.09], abs=0.0015)
    assert not deadlines


@virtual_time
async def test_deadlines_go_on_after_a_pause() -> None:
    """After all operations have ended, later ones still have a deadline; a key that missed one may begin again."""
    clock = asyncio.get_running_loop().time
    late: list[float] = []
    deadlines = Deadlines[int](0.02, lambda _: late.append(clock()), clock)
    deadlines.begin(1)
    deadlines.end(1)
    await advance(0.05)
    assert late == []
    for began in (1, 2):
        deadlines.begin(1)
        await advance(0.05)
        assert len(late) == began


def test_a_deadline_takes_few_timers() -> None:
    """Although uvloop's timers fire early, a deadline does not set many timers until its time is reached."""

    async def scenario() -> int:
        reads = 0

        def clock() -> float:
            nonlocal reads
            reads += 1
            return time.monotonic()

        deadlines = Deadlines[int](0.02, lambda _: None, clock)
        for key in range(200):
            deadlines.begin(key)
            await asyncio.sleep(0.0005 * (key % 8))  # this test is about uvloop's own timers
        await until(lambda: not deadlines)
        return reads - 200  # each timer reads the clock once, and so does each `begin`

    assert 0 < uvloop.run(scenario()) <= 3 * 200


async def test_a_failed_begin_stops_no_other_deadline() -> None:
    """A thread that does not pass the event loop gets an error, and later operations still have their deadline."""
    late: list[str] = []
    deadlines = Deadlines[str](0.02, late.append)
    with pytest.raises(RuntimeError):
        await asyncio.to_thread(deadlines.begin, "a")
    deadlines.begin("b")
    await until(lambda: not deadlines)
    assert late == ["b"]


async def test_threads_begin_and_end_operations() -> None:
    """An operation of another thread is either ended by it or reported on the event loop, and never both."""
    reported: list[tuple[int, int]] = []
    ended: list[tuple[int, int]] = []
    deadlines = Deadlines[tuple[int, int]](0.003, reported.append)
    loop = asyncio.get_running_loop()

    def work(thread: int) -> None:
        for number in range(300):
            deadlines.begin((thread, number), loop=loop)
            time.sleep(0.0007 * (number % 8))  # the operation: some take less than the 3 ms, some more
            if deadlines.end((thread, number)):
                ended.append((thread, number))

    await asyncio.gather(*(asyncio.to_thread(work, thread) for thread in range(3)))
    await until(lambda: len(reported) + len(ended) >= 900)
    assert not deadlines
    assert reported
    assert ended
    assert sorted(reported + ended) == [(thread, number) for thread in range(3) for number in range(300)]
