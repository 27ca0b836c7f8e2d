"""The micro-batcher, with integers: no model, no clock but the loop's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.batcher import MicroBatcher
from app.problems import DeadlineExceeded, InternalError, ModelUnavailable, Overloaded

Finish = Callable[[list[int], Sequence[int]], Awaitable[Sequence[int | Exception]]]


class Squares:
    """Squares lists of integers, one after the other, remembers them, and can be made to wait."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.turn = asyncio.Lock()
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, items: list[int]) -> Sequence[int]:
        """Square each item, when the gate is open."""
        async with self.turn:
            self.batches.append(items)
            await self.gate.wait()
        return [item * item for item in items]


async def unchanged(_: list[int], made: Sequence[int]) -> Sequence[int]:
    """Finish by changing nothing."""
    return made


def batcher_of(run: Squares, finish: Finish = unchanged, **options: float) -> MicroBatcher[int, int, int]:
    return MicroBatcher(run, finish, **{"max_size": 4, "max_waiting": 100, "deadline": 60.0, **options})


@given(
    items=st.lists(st.integers(), max_size=60),
    max_size=st.integers(1, 9),
    yields=st.lists(st.integers(0, 3), min_size=60, max_size=60),
    leaving=st.sets(st.integers(0, 59)),
)
@settings(max_examples=150, deadline=None)
def test_no_caller_ever_gets_anothers_answer(
    items: list[int], max_size: int, yields: list[int], leaving: set[int]
) -> None:
    """Whatever the batch size, the arrival times and who leaves early, each caller gets its own square."""

    async def scenario() -> None:
        run = Squares()
        batcher = batcher_of(run, max_size=max_size)

        async def call(place: int, item: int) -> int:
            for _ in range(yields[place]):
                await asyncio.sleep(0)
            return await batcher.submit(item)

        tasks = [asyncio.create_task(call(place, item)) for place, item in enumerate(items)]
        await asyncio.sleep(0)
        for place in leaving & set(range(len(tasks))):
            tasks[place].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for place, (item, answer) in enumerate(zip(items, answers, strict=True)):
            if place in leaving:
                assert isinstance(answer, asyncio.CancelledError) or answer == item * item
            else:
                assert answer == item * item
        assert all(1 <= len(batch) <= max_size for batch in run.batches)
        assert batcher.waiting == 0

    asyncio.run(scenario())


async def test_what_waits_goes_together() -> None:
    """Items that arrive while a batch runs form the next batch, in order of arrival."""
    run = Squares()
    run.gate.clear()
    batcher = batcher_of(run)
    tasks = [asyncio.create_task(batcher.submit(item)) for item in range(6)]
    await asyncio.sleep(0.01)
    assert run.batches == [[0, 1, 2, 3]]
    run.gate.set()
    assert await asyncio.gather(*tasks) == [0, 1, 4, 9, 16, 25]
    assert run.batches == [[0, 1, 2, 3], [4, 5]]


async def test_several_batches_are_handed_over_at_once() -> None:
    """What is too much for one batch waits for no turn of the event loop, and counts as waiting all the same."""
    calls: list[list[int]] = []
    turns = asyncio.Semaphore(0)

    async def run(items: list[int]) -> Sequence[int]:
        calls.append(items)
        await turns.acquire()
        return items

    batcher = MicroBatcher(run, unchanged, max_size=2, max_waiting=3, deadline=60.0)

    async def submitted(*items: int) -> list[asyncio.Task[int]]:
        tasks = [asyncio.create_task(batcher.submit(item)) for item in items]
        await asyncio.sleep(0.01)
        return tasks

    tasks = await submitted(0)
    tasks += await submitted(1, 2, 3)
    assert (calls, batcher.waiting) == ([[0]], 3)
    turns.release()
    await tasks[0]
    tasks += await submitted(4)
    assert (calls, batcher.waiting) == ([[0], [1, 2], [3]], 2)
    turns.release()
    await tasks[1]
    assert batcher.waiting == 1
    tasks += await submitted(5, 6)
    with pytest.raises(Overloaded):
        await batcher.submit(7)
    for _ in range(3):
        turns.release()
    assert await asyncio.gather(*tasks) == [0, 1, 2, 3, 4, 5, 6]
    assert (calls[3:], batcher.waiting) == ([[4, 5], [6]], 0)


async def test_full_queue_refuses_at_once() -> None:
    """One item more than may wait is refused, and those accepted are answered."""
    run = Squares()
    run.gate.clear()
    batcher = batcher_of(run, max_size=1, max_waiting=2)
    tasks = [asyncio.create_task(batcher.submit(0))]
    await asyncio.sleep(0.01)
    tasks += [asyncio.create_task(batcher.submit(item)) for item in (1, 2)]
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded):
        await batcher.submit(3)
    run.gate.set()
    assert await asyncio.gather(*tasks) == [0, 1, 4]


async def test_deadline_is_kept_while_waiting_and_while_running() -> None:
    """A caller hears of its deadline when it passes, and an item nobody waits for is never run."""
    run = Squares()
    run.gate.clear()
    batcher = batcher_of(run, max_size=1, deadline=0.02)
    first = asyncio.create_task(batcher.submit(1))
    await asyncio.sleep(0.005)
    second = asyncio.create_task(batcher.submit(2))
    for task in (first, second):
        with pytest.raises(DeadlineExceeded):
            await task
    run.gate.set()
    assert await batcher.submit(3) == 9
    assert run.batches == [[1], [3]]


async def test_failure_reaches_every_waiter_and_only_them() -> None:
    """When a batch fails, each of its callers gets an error, and the next batch is served."""

    async def run(items: list[int]) -> Sequence[int]:
        if 13 in items:
            raise ZeroDivisionError
        return items

    batcher = MicroBatcher(run, unchanged, max_size=3, max_waiting=10, deadline=60.0)
    answers = await asyncio.gather(*(batcher.submit(item) for item in (12, 13, 14, 15)), return_exceptions=True)
    assert [type(answer) for answer in answers[:3]] == [InternalError] * 3
    assert answers[3] == 15
    assert isinstance(answers[0].__cause__, ZeroDivisionError)


async def test_wrong_number_of_results_is_an_error() -> None:
    """Results that cannot be matched to their callers are given to nobody."""

    async def run(items: list[int]) -> Sequence[int]:
        return items[1:]

    batcher = MicroBatcher(run, unchanged, max_size=3, max_waiting=10, deadline=60.0)
    with pytest.raises(InternalError):
        await batcher.submit(1)


async def test_closing_answers_what_was_accepted() -> None:
    """`aclose` returns after the accepted items have their answers; later ones are refused."""
    run = Squares()
    run.gate.clear()
    batcher = batcher_of(run, max_size=1)
    tasks = [asyncio.create_task(batcher.submit(item)) for item in range(3)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(batcher.aclose())
    await asyncio.sleep(0.01)
    assert not closing.done()
    with pytest.raises(ModelUnavailable):
        await batcher.submit(9)
    run.gate.set()
    await closing
    assert [task.result() for task in tasks] == [0, 1, 4]


async def test_ten_thousand_callers_who_leave_hold_nothing() -> None:
    """Callers that are cancelled while waiting leave nothing behind."""
    run = Squares()
    run.gate.clear()
    batcher = batcher_of(run, max_size=64, max_waiting=20_000)
    first = asyncio.create_task(batcher.submit(3))
    await asyncio.sleep(0.01)
    tasks = [asyncio.create_task(batcher.submit(item)) for item in range(10_000)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    run.gate.set()
    assert await asyncio.gather(first, batcher.submit(7)) == [9, 49]
    assert batcher.waiting == 0
    assert run.batches == [[3], [7]]
    assert not batcher._deadlines


async def test_a_delay_gathers_company() -> None:
    """With `max_delay` the first item of a batch waits for those that follow soon after."""
    run = Squares()
    batcher = MicroBatcher(run, unchanged, max_size=8, max_waiting=10, deadline=60.0, max_delay=0.05)
    first = asyncio.create_task(batcher.submit(1))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(batcher.submit(2))
    assert await asyncio.gather(first, second) == [1, 4]
    assert run.batches == [[1, 2]]


async def test_the_next_batch_runs_while_the_one_before_is_finished() -> None:
    """A slow `finish` holds up its own callers and nobody else's; `aclose` waits for it."""
    run, gate = Squares(), asyncio.Event()

    async def finish(items: list[int], made: Sequence[int]) -> Sequence[int]:
        if 1 in items:
            await gate.wait()
        return made

    batcher = batcher_of(run, finish, max_size=1)
    slow = asyncio.create_task(batcher.submit(1))
    assert await batcher.submit(2) == 4
    assert not slow.done()
    closing = asyncio.create_task(batcher.aclose())
    await asyncio.sleep(0.01)
    assert not closing.done()
    gate.set()
    await closing
    assert await slow == 1


async def test_an_exception_among_the_results_is_for_its_caller_alone() -> None:
    """`finish` may refuse one item of a batch; the others have their results, and nothing waits any longer."""

    async def finish(_: list[int], made: Sequence[int]) -> Sequence[int | Exception]:
        return [Overloaded("nine") if square == 9 else square for square in made]

    batcher = batcher_of(Squares(), finish)
    answers = await asyncio.gather(*(batcher.submit(n) for n in (2, 3, 4)), return_exceptions=True)
    assert [answers[0], answers[2]] == [4, 16]
    assert isinstance(answers[1], Overloaded)
    assert not batcher._deadlines


@pytest.mark.parametrize("broken", [[], ZeroDivisionError()], ids=["too few results", "an error"])
async def test_a_batch_that_cannot_be_finished_fails_its_own_callers(broken: list[int] | Exception) -> None:
    """When `finish` fails or loses results, each of the batch's callers gets an error, and the next is served."""

    async def finish(items: list[int], made: Sequence[int]) -> Sequence[int]:
        if 13 not in items:
            return made
        if isinstance(broken, Exception):
            raise broken
        return broken

    batcher = batcher_of(Squares(), finish, max_size=2)
    answers = await asyncio.gather(*(batcher.submit(n) for n in (12, 13, 14)), return_exceptions=True)
    assert [type(answer) for answer in answers[:2]] == [InternalError] * 2
    assert answers[2] == 196
