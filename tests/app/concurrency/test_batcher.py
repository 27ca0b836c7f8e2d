"""The micro-batcher, with integers instead of images, without a model, and with the clock of the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.concurrency.batcher import MicroBatcher, Resolve
from app.concurrency.lanes import LaneWorker
from app.problems import DeadlineExceeded, InternalError, ModelUnavailable, Overloaded
from tests.waiting import until

pytestmark = pytest.mark.timeout(60)
"""A broken batcher fails a test instead of blocking the test run."""


class Item(int):
    """An integer with the future of its result."""

    future: asyncio.Future[int]

    def __new__(cls, value: int, future: asyncio.Future[int]) -> Item:
        """Make an item."""
        item = super().__new__(cls, value)
        item.future = future
        return item


async def submit(batcher: MicroBatcher[Item], value: int) -> int:
    """Return the result of one item."""
    future = asyncio.get_running_loop().create_future()
    batcher.enqueue(Item(value, future))
    return await future


class Squares:
    """Squares lists of integers, records them and the calling threads, and can be blocked."""

    def __init__(self) -> None:
        self.batches: list[list[Item]] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: list[Item], done: Resolve) -> None:
        """Square each item, when the gate is open."""
        self.batches.append(items)
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(30)
        done(lambda: [item * item for item in items])


@pytest.fixture
def worker() -> Iterator[LaneWorker]:
    """Yield a thread."""
    worker = LaneWorker("squares")
    yield worker
    worker.close()


def batcher_of(work: Callable[[list[Item], Resolve], object], worker: LaneWorker, **options: Any) -> MicroBatcher[Item]:
    return MicroBatcher(work, worker, **{"max_size": 4, "max_waiting": 100, "deadline": 60.0, **options})


async def begun(squares: Squares, count: int) -> None:
    """Wait until so many micro-batches have begun."""
    await until(lambda: len(squares.batches) >= count)


@given(
    items=st.lists(st.integers(), max_size=60),
    max_size=st.integers(1, 9),
    yields=st.lists(st.integers(0, 3), min_size=60, max_size=60),
    leaving=st.sets(st.integers(0, 59)),
)
@settings(max_examples=150)
def test_no_caller_ever_gets_anothers_answer(
    items: list[int], max_size: int, yields: list[int], leaving: set[int]
) -> None:
    """Each caller gets its own square, for any batch size, arrival times and cancelled callers."""

    async def scenario() -> None:
        run, worker = Squares(), LaneWorker("squares")
        batcher = batcher_of(run, worker, max_size=max_size)

        async def call(place: int, item: int) -> int:
            for _ in range(yields[place]):
                await asyncio.sleep(0)
            return await submit(batcher, item)

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
        await batcher.aclose()
        assert batcher.waiting == 0
        assert not batcher._deadlines
        worker.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


async def test_what_waits_goes_together(worker: LaneWorker) -> None:
    """Items that arrive in one event-loop iteration, or while a batch runs, form a batch, in order of arrival."""
    run = Squares()
    run.gate.clear()
    batcher = batcher_of(run, worker)
    tasks = [asyncio.create_task(submit(batcher, item)) for item in range(6)]
    await begun(run, 1)
    assert (run.batches, batcher.waiting) == ([[0, 1, 2, 3]], 2)
    tasks += [asyncio.create_task(submit(batcher, 6))]
    while batcher.waiting < 3 or batcher._arrivals:
        await asyncio.sleep(0)
    run.gate.set()
    assert await asyncio.gather(*tasks) == [0, 1, 4, 9, 16, 25, 36]
    assert run.batches == [[0, 1, 2, 3], [4, 5, 6]]
    assert run.threads == {"squares"}


async def test_a_busy_loop_holds_up_no_batch(worker: LaneWorker) -> None:
    """The thread runs one batch after the other while the event loop is busy."""
    run = Squares()
    batcher = batcher_of(run, worker, max_size=2)
    futures = [asyncio.get_running_loop().create_future() for _ in range(7)]
    for item, future in enumerate(futures):
        batcher.enqueue(Item(item, future))
    await asyncio.sleep(0)
    while len(run.batches) < 4:
        pass  # the event loop is busy
    assert not any(future.done() for future in futures)
    assert await asyncio.gather(*futures) == [0, 1, 4, 9, 16, 25, 36]
    assert run.batches == [[0, 1], [2, 3], [4, 5], [6]]


async def test_slow_preparation_lets_others_run(worker: LaneWorker) -> None:
    """Items that arrived together and take long to prepare are prepared in several event-loop iterations, in order."""
    run, now = Squares(), 0.0
    prepared: list[int] = []

    def prepare(item: Item) -> None:
        nonlocal now
        now += 0.002
        prepared.append(item)

    batcher = batcher_of(run, worker, max_waiting=100, prepare=prepare, clock=lambda: now, deadline=1e6)
    futures = [asyncio.get_running_loop().create_future() for _ in range(20)]
    for item, future in enumerate(futures):
        batcher.enqueue(Item(item, future))
    counts = []
    while not counts or counts[-1] < 20:
        await asyncio.sleep(0)
        counts.append(len(prepared))
    assert counts[0] == 3
    assert len(counts) >= 7
    assert await asyncio.gather(*futures) == [item * item for item in range(20)]
    assert prepared == list(range(20))


async def test_batchers_of_one_thread_take_turns(worker: LaneWorker) -> None:
    """The second batch of a batcher runs after the first batches of all others."""
    order: list[str] = []
    gate = threading.Event()

    def work_of(name: str) -> Callable[[list[Item], Resolve], None]:
        def work(items: list[Item], done: Resolve) -> None:
            order.append(name)
            assert gate.wait(30)
            done(lambda: items)

        return work

    batchers = [batcher_of(work_of(name), worker, max_size=1) for name in "ab"]
    tasks = [asyncio.create_task(submit(batcher, n)) for batcher in batchers for n in range(3)]
    await until(lambda: order and [batcher.waiting for batcher in batchers] == [2, 3])
    gate.set()
    await asyncio.gather(*tasks)
    assert order == ["a", "b", "a", "b", "a", "b"]


async def test_a_long_queue_has_a_limit_too(worker: LaneWorker) -> None:
    """The limit of a queue may be any number of items."""
    run = Squares()
    run.gate.clear()
    batcher = batcher_of(run, worker, max_size=1, max_waiting=1000)
    tasks = [asyncio.create_task(submit(batcher, item)) for item in range(1100)]
    await until(lambda: sum(task.done() for task in tasks) >= 99)
    run.gate.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(each, Overloaded) for each in found) == 100


async def test_full_queue_refuses_at_once(worker: LaneWorker) -> None:
    """An item above the limit of the queue is rejected, and the accepted items get their results."""
    run = Squares()
    run.gate.clear()
    batcher = batcher_of(run, worker, max_size=1, max_waiting=2)
    tasks = [asyncio.create_task(submit(batcher, 0))]
    await begun(run, 1)
    tasks += [asyncio.create_task(submit(batcher, 1))]
    await until(lambda: batcher.waiting == 1 and not batcher._arrivals)
    last = asyncio.get_running_loop().create_future()
    batcher.enqueue(Item(2, last))  # it counts before the event loop has admitted it
    with pytest.raises(Overloaded):
        await submit(batcher, 3)
    run.gate.set()
    assert await asyncio.gather(*tasks, last) == [0, 1, 4]


async def test_deadline_is_kept_while_waiting_and_while_running(worker: LaneWorker) -> None:
    """A caller gets `DeadlineExceeded` when its deadline passes, and an item without a waiting caller is never run."""
    run = Squares()
    run.gate.clear()
    batcher = batcher_of(run, worker, max_size=1, deadline=0.05)
    while not run.batches:  # if the thread begins late, the first caller has already timed out
        first = asyncio.create_task(submit(batcher, 1))
        await until(lambda first=first: run.batches or first.done())
        first.add_done_callback(asyncio.Task.exception)
    second = asyncio.create_task(submit(batcher, 2))
    for task in (first, second):
        with pytest.raises(DeadlineExceeded):
            await task
    run.gate.set()
    await batcher.aclose()
    assert run.batches == [[1]]


async def test_busy_seconds_say_how_long_the_thread_has_not_answered(worker: LaneWorker) -> None:
    """They grow while a batch hangs, also for items that arrived later, and are 0 if the batcher is idle."""
    run, now = Squares(), [100.0]
    batcher = MicroBatcher(run, worker, max_size=1, max_waiting=9, deadline=60.0, clock=lambda: now[0])
    assert batcher.busy_seconds == 0.0
    run.gate.clear()
    tasks = [asyncio.create_task(submit(batcher, 1))]
    await begun(run, 1)
    now[0] = 250.0
    tasks += [asyncio.create_task(submit(batcher, 2))]
    await until(lambda: batcher.waiting == 1)
    assert batcher.busy_seconds == 150.0
    run.gate.set()
    await asyncio.gather(*tasks)
    now[0] = 260.0
    await until(lambda: batcher.busy_seconds == 0.0)  # the thread resets it after it has resolved the results


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit()], ids=["an error", "what ends a program"])
async def test_failure_reaches_every_waiter_and_only_them(worker: LaneWorker, error: BaseException) -> None:
    """When a batch fails, each of its callers gets an error, and the next batch is served."""

    def work(items: list[Item], done: Resolve) -> None:
        if 13 in items:
            raise error
        done(lambda: items)

    batcher = batcher_of(work, worker, max_size=3)
    answers = await asyncio.gather(*(submit(batcher, item) for item in (12, 13, 14, 15)), return_exceptions=True)
    assert [type(answer) for answer in answers[:3]] == [InternalError] * 3
    assert len({id(answer) for answer in answers[:3]}) == 3
    assert answers[3] == 15
    assert isinstance(answers[0], InternalError)
    assert answers[0].__cause__ is error


@pytest.mark.parametrize("max_delay", [0.0, 0.01], ids=["at once", "after the delay"])
async def test_a_thread_that_cannot_be_started_costs_the_waiting_items_only(
    worker: LaneWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, max_delay: float
) -> None:
    """Each waiting item gets an error at once, one log line contains the cause, and the next item is scored."""
    refused: list[RuntimeError] = []
    start = threading.Thread.start

    def refuse_once(thread: threading.Thread) -> None:
        if thread.name != "squares" or refused:
            return start(thread)
        refused.append(RuntimeError("can't start new thread"))
        raise refused[0]

    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    batcher = batcher_of(Squares(), worker, max_delay=max_delay)
    async with asyncio.timeout(30):
        answers = await asyncio.gather(*(submit(batcher, item) for item in range(3)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [Overloaded] * 3
        assert len({id(answer) for answer in answers}) == 3
        assert (batcher.waiting, batcher._unfinished, batcher.busy_seconds) == (0, 0, 0.0)
        assert not batcher._turn_scheduled
        assert not batcher._deadlines
        (line,) = caplog.records
        assert (line.levelname, line.message) == ("ERROR", "a thread could not be started")
        assert line.exc_info is not None
        assert line.exc_info[1] is refused[0]
        assert await asyncio.gather(*(submit(batcher, item) for item in range(6))) == [0, 1, 4, 9, 16, 25]
        await batcher.aclose()
    assert len(caplog.records) == 1


async def test_closing_answers_what_was_accepted(worker: LaneWorker) -> None:
    """`aclose` returns after the accepted items have their results; later items are rejected."""
    run = Squares()
    run.gate.clear()
    batcher = batcher_of(run, worker, max_size=1)
    tasks = [asyncio.create_task(submit(batcher, item)) for item in range(3)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(batcher.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    with pytest.raises(ModelUnavailable):
        await submit(batcher, 9)
    run.gate.set()
    await closing
    assert await asyncio.gather(*tasks) == [0, 1, 4]
    await batcher.aclose()


async def test_a_batcher_that_had_nothing_to_do_closes_at_once(worker: LaneWorker) -> None:
    """Nothing is waited for."""
    await batcher_of(Squares(), worker).aclose()


async def test_ten_thousand_callers_who_leave_hold_nothing(
    worker: LaneWorker, caplog: pytest.LogCaptureFixture
) -> None:
    """Items of callers that are cancelled while they wait are removed from the queue, and nothing is logged."""
    run = Squares()
    run.gate.clear()
    batcher = batcher_of(run, worker, max_size=64, max_waiting=20_000)
    first = asyncio.create_task(submit(batcher, 3))
    await begun(run, 1)
    tasks = [asyncio.create_task(submit(batcher, item)) for item in range(10_000)]
    await until(lambda: batcher.waiting == 10_000)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    run.gate.set()
    assert await asyncio.gather(first, submit(batcher, 7)) == [9, 49]
    await batcher.aclose()
    assert batcher.waiting == 0
    assert run.batches == [[3], [7]]
    assert not batcher._deadlines
    assert not caplog.records


async def test_a_delay_gathers_company(worker: LaneWorker) -> None:
    """With `max_delay`, the first item of a batch waits for further items, unless the batch is full."""
    run = Squares()
    batcher = batcher_of(run, worker, max_delay=0.05)
    first = asyncio.create_task(submit(batcher, 1))
    for _ in range(3):  # the first item is queued, and its delay has begun
        await asyncio.sleep(0)
    second = asyncio.create_task(submit(batcher, 2))
    assert await asyncio.gather(first, second) == [1, 4]
    assert run.batches == [[1, 2]]
    run.gate.clear()
    tasks = [asyncio.create_task(submit(batcher, item)) for item in range(6)]
    await begun(run, 2)
    run.gate.set()
    await tasks[0]
    tasks += [asyncio.create_task(submit(batcher, 6))]
    await asyncio.gather(*tasks)
    assert run.batches[1:] == [[0, 1, 2, 3], [4, 5, 6]]


async def test_further_items_do_not_end_a_delay(worker: LaneWorker) -> None:
    """Until a batch is full, an item that arrives during the delay waits for its end as well."""
    run, queued = Squares(), list[Item]()
    batcher = MicroBatcher(run, worker, prepare=queued.append, max_size=3, max_waiting=9, deadline=60.0, max_delay=300)
    tasks = []
    for count in (1, 2):  # each item arrives in another event-loop iteration
        tasks.append(asyncio.create_task(submit(batcher, count - 1)))
        await until(lambda count=count: len(queued) == count)
    assert await worker.run(lambda: len(run.batches)) == 0
    async with asyncio.timeout(30):
        assert await asyncio.gather(*tasks, submit(batcher, 2)) == [0, 1, 4]


async def test_a_full_batch_waits_for_nobody(worker: LaneWorker) -> None:
    """With `max_delay`, a full batch runs at once, whether it fills in one event-loop iteration or in several."""
    batcher = batcher_of(Squares(), worker, max_delay=300)
    async with asyncio.timeout(30):
        assert await asyncio.gather(*(submit(batcher, item) for item in range(4))) == [0, 1, 4, 9]
        early = asyncio.create_task(submit(batcher, 4))
        for _ in range(3):  # the item is queued, and its delay has begun
            await asyncio.sleep(0)
        assert await asyncio.gather(early, *(submit(batcher, item) for item in range(5, 8))) == [16, 25, 36, 49]


async def test_more_than_a_batch_waits_for_nobody(worker: LaneWorker) -> None:
    """With `max_delay`, a queue of more than one batch begins at once, and its last items wait for a full batch."""
    batcher = batcher_of(Squares(), worker, max_delay=300)
    async with asyncio.timeout(30):
        tasks = [asyncio.create_task(submit(batcher, item)) for item in range(6)]
        assert await asyncio.gather(*tasks[:4]) == [0, 1, 4, 9]
        tasks += [asyncio.create_task(submit(batcher, item)) for item in range(6, 8)]
        assert await asyncio.gather(*tasks[4:]) == [16, 25, 36, 49]


async def test_a_caller_who_leaves_during_the_batch_takes_no_answer_from_others(worker: LaneWorker) -> None:
    """The caller of the first item is cancelled while its batch runs; the others get their results."""
    squares = Squares()
    squares.gate.clear()
    batcher = batcher_of(squares, worker)
    tasks = [asyncio.create_task(submit(batcher, item)) for item in range(4)]
    await begun(squares, 1)
    tasks[0].cancel()
    squares.gate.set()
    async with asyncio.timeout(30):
        assert await asyncio.gather(*tasks[1:]) == [1, 4, 9]


async def test_a_batch_has_its_results_once(worker: LaneWorker) -> None:
    """If `work` fails after it has passed a batch on, the first outcome counts, and nothing is counted twice."""
    dones: list[Resolve] = []

    def work(items: list[Item], done: Resolve) -> None:
        dones.append(done)
        raise ZeroDivisionError

    batcher = batcher_of(work, worker)
    with pytest.raises(InternalError):
        await submit(batcher, 1)
    dones[0](lambda: [1])
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await batcher.aclose()


async def test_the_next_batch_runs_while_the_one_before_is_passed_on(worker: LaneWorker) -> None:
    """A batch that `work` passed on delays only its own callers, and `aclose` waits for it."""
    passed_on: list[Callable[[], object]] = []

    def work(items: list[Item], done: Resolve) -> None:
        if 1 in items:
            passed_on.append(lambda: done(lambda: items))
        else:
            done(lambda: items)

    batcher = batcher_of(work, worker, max_size=1)
    slow = asyncio.create_task(submit(batcher, 1))
    await until(lambda: passed_on)
    assert await submit(batcher, 2) == 2
    assert not slow.done()
    closing = asyncio.create_task(batcher.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    threading.Thread(target=passed_on[0]).start()
    await closing
    assert await slow == 1


async def test_an_exception_among_the_results_is_for_its_caller_alone(worker: LaneWorker) -> None:
    """If one item of a batch is rejected, the others get their results, and the queue is empty."""

    def work(items: list[Item], done: Resolve) -> None:
        done(lambda: [Overloaded("nine") if item == 9 else item for item in items])

    batcher = batcher_of(work, worker)
    answers = await asyncio.gather(*(submit(batcher, n) for n in (2, 9, 4)), return_exceptions=True)
    assert [answers[0], answers[2]] == [2, 4]
    assert isinstance(answers[1], Overloaded)
    assert not batcher._deadlines


def _failing() -> Sequence[int]:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "make", [list, lambda: [1, 2, 3], _failing], ids=["too few results", "too many results", "an error"]
)
async def test_results_that_cannot_be_made_fail_their_own_callers(
    worker: LaneWorker, make: Callable[[], Sequence[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """Each caller gets an error if results fail or do not match the items. It is logged. The next batch is served."""

    def work(items: list[Item], done: Resolve) -> None:
        done(make if 13 in items else lambda: items)

    batcher = batcher_of(work, worker, max_size=2)
    answers = await asyncio.gather(*(submit(batcher, n) for n in (12, 13, 14)), return_exceptions=True)
    assert [type(answer) for answer in answers[:2]] == [InternalError] * 2
    assert answers[2] == 14
    assert [(line.message, line.exc_info is not None) for line in caplog.records] == [
        ("results of a micro-batch failed", True)
    ]
    await batcher.aclose()
