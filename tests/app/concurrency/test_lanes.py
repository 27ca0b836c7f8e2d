"""The thread that works for the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import weakref

import pytest

from app.concurrency.lanes import LaneWorker
from app.problems import Overloaded
from tests.waiting import until


@pytest.fixture
def worker():
    """Yield a worker that notes in which thread it began."""
    began: list[str] = []
    worker = LaneWorker("tested", lambda: began.append(threading.current_thread().name))
    worker.began = began
    yield worker
    worker.close()


def test_a_thread_that_cannot_be_started_is_tried_again(monkeypatch):
    """Its work gets the error, the worker can be closed, and the next work starts the thread."""

    def refuse(_):
        raise RuntimeError("can't start new thread")

    workers, done = [LaneWorker("closed"), LaneWorker("used")], threading.Event()
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", refuse)
        for worker in workers:
            with pytest.raises(Overloaded, match="could not be started"):
                worker.submit(done.set)
    assert workers[0].close(10)
    workers[1].submit(lambda: None)
    assert workers[1].close(10)
    assert not done.is_set()


async def test_work_is_done_in_order_in_one_thread(worker):
    """Pieces are done in the order of submission, all in one thread, which is started once."""
    done: list[tuple[int, str]] = []

    def piece(number: int) -> int:
        done.append((number, threading.current_thread().name))
        return number * number

    answers = await asyncio.gather(*(worker.run(lambda n=n: piece(n)) for n in range(50)))
    assert answers == [n * n for n in range(50)]
    assert done == [(n, "tested") for n in range(50)]
    assert worker.began == ["tested"]


async def test_lanes_take_turns(worker):
    """Lanes take turns with one piece each, in order; a new lane comes before the lane that was just served."""
    begun, gate, done = threading.Event(), threading.Event(), []

    def block() -> None:
        begun.set()
        gate.wait(60)

    def given(lane: str, count: int) -> list[asyncio.Task[None]]:
        pieces = [lambda n=n: done.append(f"{lane}{n}") for n in range(count)]
        return [asyncio.create_task(worker.run(piece, lane)) for piece in pieces]

    first = asyncio.create_task(worker.run(block, "a"))
    await until(begun.is_set)
    tasks = given("a", 4)
    await asyncio.sleep(0)
    tasks += given("b", 2) + given("c", 1)
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, *tasks)
    assert done == ["b0", "c0", "a0", "b1", "a1", "a2", "a3"]


async def test_long_work_can_see_that_others_wait(worker):
    """The byte `others` is 1 exactly while work is done and another lane waits."""
    gates, seen = [threading.Event() for _ in range(3)], []

    def piece(gate: threading.Event) -> None:
        seen.append(worker.others_waiting[0])
        gate.wait(60)
        seen.append(worker.others_waiting[0])

    long = asyncio.create_task(worker.run(lambda: piece(gates[0]), "a"))
    await until(lambda: seen)
    same = asyncio.create_task(worker.run(lambda: piece(gates[1]), "a"))
    await asyncio.sleep(0)
    assert worker.others_waiting[0] == 0
    other = asyncio.create_task(worker.run(lambda: piece(gates[2]), "b"))
    await asyncio.sleep(0)
    for gate in gates:
        gate.set()
    await asyncio.gather(long, same, other)
    # In the order of execution: the long piece, then the other lane, while the first lane waits.
    assert seen == [0, 1, 1, 1, 0, 0]


async def test_what_nobody_waits_for_is_not_begun(worker):
    """Cancelled work is done only if it had begun."""
    gate, done = threading.Event(), []
    first = asyncio.create_task(worker.run(lambda: gate.wait(60)))
    second = asyncio.create_task(worker.run(lambda: done.append("second")))
    await asyncio.sleep(0)
    second.cancel()
    third = asyncio.create_task(worker.run(lambda: done.append("third")))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, third)
    assert done == ["third"]


async def test_an_error_reaches_its_waiter_alone(worker):
    """An exception in the work is raised where the work is awaited, and the next piece is done."""
    broken, fine = await asyncio.gather(worker.run(lambda: 1 // 0), worker.run(lambda: 1), return_exceptions=True)
    assert isinstance(broken, ZeroDivisionError)
    assert fine == 1


async def test_a_waiter_that_left_disturbs_nobody(worker):
    """Work whose waiting task was cancelled is finished, and the thread continues."""
    begun, gate, finished = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        gate.wait(60)
        finished.set()

    task = asyncio.create_task(worker.run(slow))
    await until(begun.is_set)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    gate.set()
    assert await worker.run(lambda: 7) == 7
    assert finished.is_set()


async def test_closing_finishes_what_was_accepted():
    """`close` returns when all work is done; later work is rejected."""
    worker, done = LaneWorker("tested"), []
    tasks = [asyncio.create_task(worker.run(lambda n=n: done.append(n))) for n in range(5)]
    await asyncio.sleep(0)
    await asyncio.to_thread(worker.close)
    assert done == list(range(5))
    await asyncio.gather(*tasks)
    with pytest.raises(RuntimeError, match="closed"):
        await worker.run(lambda: None)


async def test_an_idle_thread_holds_nothing(worker):
    """The thread keeps no reference to a result, so the result is freed after the waiting task has released it."""

    class Large: ...

    found = weakref.ref(await worker.run(Large))

    def gone() -> bool:
        gc.collect()
        return found() is None

    await until(gone)


async def test_any_thread_gives_work(worker):
    """Work from any thread is done in order, including work from the thread that submits first."""
    done: list[int] = []
    threads = [threading.Thread(target=worker.submit, args=(lambda n=n: done.append(n),)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    await worker.run(lambda: None)
    assert sorted(done) == list(range(20))
    assert worker.began == ["tested"]


def test_what_is_accepted_while_it_closes_is_done():
    """All work that other threads submit during `close` is done, unless it is rejected."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            worker, done, accepted = LaneWorker("tested"), [], []

            def give(worker: LaneWorker = worker, done: list[int] = done, accepted: list[int] = accepted) -> None:
                with contextlib.suppress(RuntimeError):
                    for number in range(50):
                        worker.submit(lambda number=number: done.append(number))
                        accepted.append(number)

            thread = threading.Thread(target=give)
            thread.start()
            worker.close()
            thread.join()
            assert len(done) == len(accepted)
    finally:
        sys.setswitchinterval(interval)


async def test_work_that_fails_ends_no_thread(worker, caplog):
    """An error in work without a waiting task is logged, and the next piece is done."""
    worker.submit(lambda: 1 // 0)
    assert await worker.run(lambda: 7) == 7
    assert [line.message for line in caplog.records] == ["work failed"]
