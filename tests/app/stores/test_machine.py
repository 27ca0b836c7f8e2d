"""State machines: the SQLite and the Redis store of two processes under faults, and the micro-batcher under load."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import signal
import tempfile
import threading
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from app.concurrency.batcher import MicroBatcher
from app.concurrency.lanes import LaneWorker
from app.problems import InternalError, Overloaded
from app.stores import Store, StoreError
from app.stores.redis import PREFIX, RedisStore
from app.stores.sqlite import SqliteStore
from tests.app.concurrency.test_batcher import Item
from tests.app.stores.test_stores import RedisServer, running_redis

MAX_CONTENT = 9000
"""Maximum size of an entry."""
STATE = "machine"


class StoreMachine(RuleBasedStateMachine):
    """Two processes with one store. A fault may lose entries, never change them, and each put after it is found."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = 1000.0
        self.stores: list[Any] = [self.opened(), self.opened()]
        self.living: dict[str, tuple[bytes, float]] = {}
        self.lost: dict[str, bytes] = {}
        self.states: set[bytes | None] = {None}
        """The contents that the state may have: several after a fault."""
        self.number = 0

    @abstractmethod
    def opened(self) -> Store:
        """Return a store of another worker process."""

    def _prepare(self) -> None:
        """Make the stores notice a fault with the next access."""

    def _lose(self) -> None:
        self.lost |= {key: content for key, (content, _) in self.living.items()}
        self.living.clear()
        self.states.add(None)
        self._prepare()

    @rule(place=st.integers(0, 1), sizes=st.lists(st.integers(0, MAX_CONTENT), max_size=70))
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

    @rule(place=st.integers(0, 1), is_latest=st.booleans())
    def swap(self, place: int, is_latest: bool) -> None:
        """Replace the state, as the process that has read the latest one, or as one that has not."""
        self._prepare()
        latest = self.stores[place].read_state(STATE)
        assert latest in self.states
        self.number += 1
        fresh = b"%d" % self.number
        assert self.stores[place].swap_state(STATE, latest if is_latest else b"outdated", fresh) == is_latest
        self.states = {fresh if is_latest else latest}

    @invariant()
    def entries_are_right(self) -> None:
        """Both processes can read each valid entry; an entry that a fault removed is missing or unchanged."""
        keys = [*list(self.living)[-3:], *list(self.living)[:2]]
        for store in self.stores:
            for key in keys:
                content, expires = self.living[key]
                if expires > self.clock:
                    assert store.get(key) == content
            for key in list(self.lost)[-2:]:
                assert store.get(key) in (None, self.lost[key])

    @invariant()
    def both_read_one_state(self) -> None:
        """Both processes read the same state; a fault may have removed it."""
        found = {store.read_state(STATE) for store in self.stores}
        assert len(found) == 1
        assert found <= self.states

    def teardown(self) -> None:
        """Close the stores."""
        for store in self.stores:
            store.close()


class SqliteMachine(StoreMachine):
    """Two processes with one file, which is deleted, damaged and replaced while the wall clock jumps."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        super().__init__()

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

    def teardown(self) -> None:
        """Close the file."""
        super().teardown()
        shutil.rmtree(self.folder)


class RedisMachine(StoreMachine):
    """Two processes with one server, which is restarted, killed, emptied, and disconnects them.

    Args:
        server: running; the machine empties it first.
    """

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        with self._client() as client:
            client.flushall()
        super().__init__()

    def opened(self) -> RedisStore:
        """Return a store of another worker process."""
        return RedisStore(self.server.url, ttl_seconds=600, password_file=self.server.password_file, timeout=10)

    @contextlib.contextmanager
    def _client(self) -> Iterator[redis.Redis]:
        password = self.server.password_file.read_text().strip()
        with contextlib.closing(redis.Redis.from_url(self.server.url, password=password)) as client:
            yield client

    @rule()
    def disconnect(self) -> None:
        """Close the connections of both processes: the next call connects again."""
        with self._client() as client:
            client.client_kill_filter(_type="normal", skipme=True)

    @rule()
    def expire(self) -> None:
        """Let the newest entry expire."""
        if self.living:
            key, _ = self.living.popitem()
            with self._client() as client:
                assert client.pexpire(PREFIX + key, 0)
            assert [store.get(key) for store in self.stores] == [None, None]

    @rule()
    def empty(self) -> None:
        """Delete all entries."""
        with self._client() as client:
            client.flushall()
        self._lose()
        self.states = {None}

    @rule(number=st.sampled_from([signal.SIGTERM, signal.SIGKILL]))
    def restart(self, number: int) -> None:
        """Restart the server. It reads its log, so a graceful shutdown loses nothing, and a kill at most a second."""
        self.server.end(number)
        for store in self.stores:
            with pytest.raises(StoreError):
                store.get("any")
        self.server.start()
        if number == signal.SIGKILL:
            self._lose()


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


TestSqliteMachine = SqliteMachine.TestCase
TestSqliteMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.mark.process
def test_redis_machine(tmp_path: Path) -> None:
    """No sequence of faults of a Redis server changes an entry, or loses one that was stored after the faults."""
    with running_redis(tmp_path) as server:
        chosen = settings(max_examples=20, stateful_step_count=20, deadline=None)
        run_state_machine_as_test(functools.partial(RedisMachine, server), settings=chosen)
