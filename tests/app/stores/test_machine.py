"""State machines: the SQLite store of two processes under faults, and the micro-batcher under load."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.concurrency.batcher import MicroBatcher
from app.concurrency.lanes import LaneWorker
from app.problems import InternalError, Overloaded
from app.stores.sqlite import SqliteStore
from tests.app.concurrency.test_batcher import Item


class StoreMachine(RuleBasedStateMachine):
    """Two processes with one file. A fault may lose entries, never change them, and each put after it is found."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = 1000.0
        self.stores = [self.opened(), self.opened()]
        self.living: dict[str, tuple[bytes, float]] = {}
        self.lost: dict[str, bytes] = {}
        self.number = 0

    def opened(self) -> SqliteStore:
        """Return a store of another worker process, which compares its file with each access."""
        store = SqliteStore(
            self.folder / "a.db", ttl_seconds=60, max_entries=100_000, shared=True, clock=lambda: self.clock
        )
        store._file._compare_at = 0.0
        store._file._moved_aside_at = -1e9
        return store

    def _prepare(self) -> None:
        for store in self.stores:
            store._file._compare_at = 0.0
            store._file._moved_aside_at = -1e9

    def _lose(self) -> None:
        self.lost |= {key: content for key, (content, _) in self.living.items()}
        self.living.clear()
        self._prepare()

    @rule(place=st.integers(0, 1), sizes=st.lists(st.integers(0, 9000), max_size=70))
    def put(self, place: int, sizes: list[int]) -> None:
        """Store a group."""
        self._prepare()
        group = []
        for size in sizes:
            self.number += 1
            group.append((f"key-{self.number}", bytes([self.number % 251]) * size))
        self.stores[place].put(group)
        self.living |= {key: (content, self.clock + 60) for key, content in group}

    @rule(place=st.integers(0, 1))
    def ping(self, place: int) -> None:
        """Probe."""
        self._prepare()
        self.stores[place].ping()

    @rule(place=st.integers(0, 1))
    def reopen(self, place: int) -> None:
        """End a process and start another one."""
        self.stores[place].close()
        self.stores[place] = self.opened()

    @rule(seconds=st.sampled_from([-500.0, 1.0, 30.0, 61.0]))
    def pass_time(self, seconds: float) -> None:
        """Let the wall clock jump."""
        self.clock += seconds

    @rule(with_journal=st.booleans())
    def delete(self, with_journal: bool) -> None:
        """Delete the file."""
        for ending in ("", "-journal")[: 1 + with_journal]:
            (self.folder / f"a.db{ending}").unlink(missing_ok=True)
        self._lose()

    @precondition(lambda self: (self.folder / "a.db").exists())
    @rule(kind=st.sampled_from(["header", "cut", "empty"]))
    def damage(self, kind: str) -> None:
        """Damage the file in its place."""
        with (self.folder / "a.db").open("r+b") as file:
            if kind == "header":
                file.write(b"no database" * 100)
            else:
                file.truncate(0 if kind == "empty" else 9000)
        self._lose()

    @precondition(lambda self: (self.folder / "a.db").exists())
    @rule()
    def replace(self) -> None:
        """Replace the file by a copy of itself."""
        shutil.copy(self.folder / "a.db", self.folder / "copy")
        (self.folder / "copy").replace(self.folder / "a.db")
        self._prepare()

    @invariant()
    def entries_are_right(self) -> None:
        """Both processes can read each valid entry; an entry of a damaged file is missing or unchanged."""
        keys = [*list(self.living)[-3:], *list(self.living)[:2]]
        for store in self.stores:
            for key in keys:
                content, expires = self.living[key]
                if expires > self.clock:
                    assert store.get(key) == content
            for key in list(self.lost)[-2:]:
                assert store.get(key) in (None, self.lost[key])

    def teardown(self) -> None:
        """Close the files."""
        for store in self.stores:
            store.close()
        shutil.rmtree(self.folder)


class BatcherMachine(RuleBasedStateMachine):
    """Items that arrive, are cancelled, and fail, in any order; each has its own result, once."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.worker = LaneWorker("machine")
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False
        self.batcher: MicroBatcher[Item] = MicroBatcher(
            self.square, self.worker, prepare=lambda _: None, max_size=3, max_waiting=8, deadline=60
        )
        self.futures: dict[int, asyncio.Future[int]] = {}

    def square(self, items: list[Item], resolve: object) -> None:
        """Square items when the gate is open, or fail."""
        assert self.gate.wait(30)
        if self.fails:
            raise RuntimeError("injected")
        assert callable(resolve)
        resolve(lambda: [item * item for item in items])

    def _turn(self) -> None:
        self.loop.run_until_complete(asyncio.wait_for(asyncio.sleep(0), 30))

    @rule(value=st.integers(0, 10**6))
    def submit(self, value: int) -> None:
        """Queue an item."""

        async def enqueue() -> None:
            future: asyncio.Future[int] = self.loop.create_future()
            try:
                self.batcher.enqueue(Item(value, future))
            except Overloaded:
                assert self.batcher.waiting >= 8
            else:
                self.futures[value] = future

        if value not in self.futures:
            self.loop.run_until_complete(enqueue())

    @rule(place=st.integers(0, 7))
    def cancel(self, place: int) -> None:
        """Cancel an item. How many were accepted depends on the worker's thread, so no strategy may depend on it."""
        if self.futures:
            self.futures.pop(sorted(self.futures)[place % len(self.futures)]).cancel()
        self._turn()

    @rule()
    def hold(self) -> None:
        """Let the model hang."""
        self.gate.clear()

    @rule(fails=st.booleans())
    def let_go(self, fails: bool) -> None:
        """Let the model continue, or fail, and wait for all results."""
        self.fails = fails
        self.gate.set()

        async def finish() -> list[object]:
            async with asyncio.timeout(30):
                return list(await asyncio.gather(*self.futures.values(), return_exceptions=True))

        if self.futures:
            for value, result in zip(list(self.futures), self.loop.run_until_complete(finish()), strict=True):
                assert result == value * value or isinstance(result, InternalError)
        self.futures.clear()

    @invariant()
    def queue_is_bounded(self) -> None:
        """No more items wait than may."""
        assert self.batcher.waiting <= 8

    def teardown(self) -> None:
        """Finish the accepted items, and check that nothing remains."""
        self.gate.set()
        self.loop.run_until_complete(asyncio.wait_for(self.batcher.aclose(), 30))
        assert (self.batcher.waiting, self.batcher._unfinished, len(self.batcher._deadlines)) == (0, 0, 0)
        for value, future in self.futures.items():
            assert isinstance(future.exception(), InternalError) or future.result() == value * value
        assert self.worker.close(10)
        self.loop.close()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
