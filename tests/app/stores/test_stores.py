"""One contract, every store: SQLite in a file, Redis in a real server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import resource
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis

from app.models.repository import Repository
from app.scoring.validity.monitor import ValidityMonitor
from app.stores import Store, StoreError, open_store
from app.stores.reconstructions import Reconstructions
from app.stores.records import Record, new_ids
from app.stores.redis import RedisStore
from app.stores.sqlite import SqliteStore
from app.telemetry.metrics import Metrics
from tests.conftest import MODEL_STORE, ROOT, Server, free_port
from tests.waiting import until, wait_until

ENTRY = 4096
ENTRIES = 1000
"""How many entries of `ENTRY` bytes a store of this suite is allowed to hold, about."""
WORDS = "correct horse"


class RedisServer:
    """A real redis-server with a password and the bounds of the shipped configuration."""

    def __init__(self, folder: Path, *, cluster: bool = False) -> None:
        self.folder = folder
        self.port = free_port()
        self.options = {"cluster-enabled": "yes", "cluster-node-timeout": "500"} if cluster else {}
        if cluster:
            self.options["cluster-port"] = str(free_port())
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.password_file = folder / "redis_password"
        self.password_file.write_text(WORDS.replace(" ", "-") + "\n")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and return when it has read its log and listens."""
        options = {
            "port": self.port, "bind": "127.0.0.1", "dir": self.folder, "save": "", "appendonly": "yes",
            "maxmemory": f"{ENTRIES * ENTRY // (3 if self.options else 1) + 2_000_000}",
            "maxmemory-policy": "volatile-ttl",
            "requirepass": WORDS.replace(" ", "-"), **self.options,
        }  # fmt: skip
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self.process = subprocess.Popen(["redis-server", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self.process.stdout is not None
        said, until = b"", time.monotonic() + 20
        while b"Ready to accept connections" not in said:
            heard, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
            piece = os.read(self.process.stdout.fileno(), 65536) if heard else b""
            assert piece, f"redis-server did not start: {said.decode()}"
            said += piece  # the little that it says later has room in the pipe

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it, by default with a graceful shutdown."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait(20)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


@contextlib.contextmanager
def running_redis(folder: Path) -> Iterator[RedisServer]:
    """Run a server during a block."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (Debian: apt install redis-server)")
    server = RedisServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Yield one running server for the tests that do not end it."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """Yield a running server of the test's own, to be ended and started again."""
    with running_redis(tmp_path) as server:
        yield server


class Cluster:
    """A Redis Cluster of three nodes, without replicas, with a password and a bound per node."""

    def __init__(self, folder: Path) -> None:
        self.nodes = []
        for number in range(3):
            (folder / str(number)).mkdir()
            self.nodes.append(RedisServer(folder / str(number), cluster=True))
        self.password_file = self.nodes[0].password_file
        self.url = "rediscluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def start(self) -> None:
        """Start the nodes, and distribute the slots."""
        for node in self.nodes:
            node.start()
        addresses = [f"127.0.0.1:{node.port}" for node in self.nodes]
        command = ["redis-cli", "--no-auth-warning", "-a", self.password, "--cluster", "create", *addresses]
        subprocess.run([*command, "--cluster-yes"], check=True, capture_output=True)
        for node in self.nodes:
            with contextlib.closing(self.client(node)) as client:
                wait_until(lambda client=client: client.cluster("info")["cluster_state"] == "ok")

    @property
    def password(self) -> str:
        """The password of all nodes."""
        return self.password_file.read_text().strip()

    def client(self, node: RedisServer) -> Any:
        """Return a client of one node."""
        return redis.Redis(port=node.port, password=self.password)

    def keys(self, node: RedisServer) -> set[bytes]:
        """Return the keys of one node."""
        with contextlib.closing(self.client(node)) as client:
            return set(client.keys())

    def end(self) -> None:
        """End the nodes."""
        for node in self.nodes:
            node.end()


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yield a running cluster."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (Debian: apt install redis-server)")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()


OpenStore = Callable[..., Store]


@pytest.fixture(params=["sqlite", "redis", "rediscluster"])
async def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OpenStore]:
    """Yield a maker of stores that share their entries; all are closed at the end."""
    stores: list[Store] = []
    bounds = {"max_bytes": ENTRIES * ENTRY, "entry_bytes": ENTRY}

    def make(ttl_seconds: float = 60) -> Store:
        if request.param == "sqlite":
            store = open_store(f"sqlite:///{tmp_path}/store.db", ttl_seconds=ttl_seconds, **bounds)
        else:
            shared = "shared_redis" if request.param == "redis" else "shared_cluster"
            server: RedisServer | Cluster = request.getfixturevalue(shared)
            file = server.password_file
            store = open_store(server.url, ttl_seconds=ttl_seconds, password_file=file, **bounds)
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()


def entries(name: str, count: int, size: int = 64) -> list[tuple[str, bytes]]:
    """Return entries with ids and contents that no other call returns."""
    return [(f"{name}-{os.urandom(8).hex()}", os.urandom(size)) for _ in range(count)]


async def test_what_is_put_is_got(make_store: OpenStore) -> None:
    """Every entry of a group is returned unchanged, including empty content."""
    store = make_store()
    group = [*entries("group", 50), ("empty-" + os.urandom(4).hex(), b""), *entries("large", 1, 20_000)]
    store.put(group)
    assert [store.get(key) for key, _ in group] == [content for _, content in group]


async def test_what_was_never_put_is_none(make_store: OpenStore) -> None:
    """An unknown id, and ids that mean something to a database, are None."""
    store = make_store()
    assert [store.get(key) for key in ("unknown", "", "*", "'; --", "a\x00b", "é")] == [None] * 6


async def test_an_expired_entry_is_none(make_store: OpenStore) -> None:
    """An entry is found until its time to live ends; afterwards it counts as unknown."""
    store = make_store(ttl_seconds=0.4)
    (entry,) = entries("brief", 1)
    store.put([entry])
    assert store.get(entry[0]) == entry[1]
    await until(lambda: store.get(entry[0]) is None)


async def test_two_stores_share_their_entries(make_store: OpenStore) -> None:
    """One worker or replica can read the entries of another."""
    one, other = make_store(), make_store()
    (entry,) = entries("shared", 1)
    one.put([entry])
    assert other.get(entry[0]) == entry[1]


async def test_many_at_once(make_store: OpenStore) -> None:
    """Hundreds of alternating writes and reads through two stores on one backend do not mix their entries."""
    stores = (make_store(), make_store())

    for number in range(150):
        group = entries(f"many-{number}", 3)
        stores[number % 2].put(group)
        assert [stores[(number + 1) % 2].get(key) for key, _ in group] == [content for _, content in group]


async def test_the_newest_stay_when_the_bound_is_reached(make_store: OpenStore) -> None:
    """After three times the maximum number of entries, the newest are stored, and most of the oldest are deleted."""
    store = make_store()
    kept = []
    for _ in range(30):
        group = entries("full", ENTRIES // 10, ENTRY)
        store.put(group)
        kept.append(group)
        await asyncio.sleep(0.002)  # Redis orders by the remaining time to live, in milliseconds
    newest = [store.get(key) == content for key, content in kept[-1]]
    assert all(newest)
    there = sum([store.get(key) is not None for group in kept for key, _ in group])
    assert ENTRIES // 2 <= there <= ENTRIES * 3 // 2
    oldest = sum([store.get(key) is not None for group in kept[:5] for key, _ in group])
    assert oldest <= ENTRIES // 10


async def test_a_ping_answers(make_store: OpenStore) -> None:
    """`ping` of an available store raises nothing."""
    make_store().ping()


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:1/0", "rediscluster://127.0.0.1:1", "sqlite:////proc/none/store.db"]
)
async def test_a_store_that_is_not_there_raises_one_kind_of_error(url: str) -> None:
    """Every method of a store that cannot be reached raises StoreError, and does so fast."""
    store = open_store(url, ttl_seconds=60, max_bytes=ENTRY, entry_bytes=ENTRY)
    began = time.monotonic()
    for call in (store.ping, lambda: store.get("a"), lambda: store.put([("a", b"b")])):
        with pytest.raises(StoreError):
            call()
    assert time.monotonic() - began < 2
    store.close()


@pytest.mark.parametrize(
    "url",
    [
        "mysql://host/0",
        "redis://",
        "redis://host:port/0",
        "redis://host/zero",
        "redis://:secret@host/0",
        "file",
        "redis://host/-1",
        "redis://host/+1",
        "redis://host/0?password=secret",
        "redis://host/0#1",
        "sqlite:///",
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str) -> None:
    """The URL is checked when the store is created; a URL with a password is rejected without quoting it."""
    with pytest.raises(StoreError) as refusal:
        open_store(url, ttl_seconds=60, max_bytes=ENTRY, entry_bytes=ENTRY)
    assert "secret" not in str(refusal.value)


WRITER = """
import asyncio, os, sys
from pathlib import Path
from app.stores.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]), ttl_seconds=600, max_entries=100_000)
    while True:
        group = [(os.urandom(8).hex(), b"content") for _ in range(5)]
        store.put(group)
        print(*(key for key, _ in group), flush=True)

asyncio.run(main())
"""


@pytest.mark.process
async def test_sqlite_keeps_what_it_said_it_kept_through_kill_9(tmp_path: Path) -> None:
    """Four processes write into one file and are killed with -9: every entry that was put is there afterwards."""
    path = tmp_path / "store.db"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)  # noqa: ASYNC220
        for _ in range(4)
    ]
    keys: list[str] = []
    for _ in range(30):  # in turn, so that all of them write
        for writer in writers:
            assert writer.stdout is not None
            keys += writer.stdout.readline().decode().split()
    for writer in writers:
        writer.kill()
        assert writer.stdout is not None
        with writer.stdout as output:
            said = output.read()  # `communicate` would skip what `readline` has buffered, and begin within a line
        writer.wait(20)
        keys += [key for line in said.decode().splitlines(keepends=True) if line.endswith("\n") for key in line.split()]
    assert len(keys) > 100
    store = SqliteStore(path, ttl_seconds=600, max_entries=100_000)
    assert [key for key in keys if store.get(key) != b"content"] == []
    store.close()


async def test_redis_comes_back_by_itself(redis_server: RedisServer) -> None:
    """After a restart of the server the same store answers at once, and entries put before it are there."""
    store = RedisStore(redis_server.url, ttl_seconds=60, password_file=redis_server.password_file)
    (entry,) = entries("before", 1)
    store.put([entry])
    redis_server.end()
    with pytest.raises(StoreError):
        store.put(entries("while", 1))
    redis_server.start()
    assert store.get(entry[0]) == entry[1]
    store.close()


def test_a_redis_that_is_killed_costs_ids_only(
    redis_server: RedisServer, make_server: Callable[..., Server], zero: bytes
) -> None:
    """`kill -9` of Redis while the service scores: each score is right, without an id until Redis runs again."""
    service = make_server(
        ANOMALY_DEFAULT_MODEL="zero-article",
        ANOMALY_STORE_URL=redis_server.url,
        ANOMALY_STORE_PASSWORD_FILE=str(redis_server.password_file),
    ).start()
    png = {"content-type": "image/png"}
    with service.client(timeout=30) as client:
        expected = client.post("/score", content=zero, headers=png).json()["mse"]

        def score() -> bool:
            reply = client.post("/score", content=zero, headers=png)
            assert reply.status_code == 200
            assert reply.json()["mse"] == pytest.approx(expected, rel=1e-6)
            return reply.json()["id"] is not None

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            killed = pool.submit(redis_server.end, signal.SIGKILL)
            wait_until(lambda: not score())
            killed.result(20)
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["store"]) == (200, "down")
        redis_server.start()
        wait_until(score)


async def test_a_wrong_password_is_an_error_that_does_not_tell_it(shared_redis: RedisServer, tmp_path: Path) -> None:
    """A wrong, missing or unreadable password is a StoreError without the password in it."""
    wrong = tmp_path / "wrong"
    await asyncio.to_thread(wrong.write_text, "open sesame")
    for file in (wrong, tmp_path / "none", None):
        store = RedisStore(shared_redis.url, ttl_seconds=60, password_file=file)
        with pytest.raises(StoreError) as refusal:
            store.ping()
        assert "sesame" not in str(refusal.value)
        assert str(tmp_path) not in str(refusal.value)
        store.close()


async def test_a_micro_batch_is_in_one_slot_and_batches_are_on_all_nodes(shared_cluster: Cluster) -> None:
    """The ids of a micro-batch share their slot, so it is one transaction; micro-batches use all three nodes."""
    store = open_store(
        shared_cluster.url, ttl_seconds=60, max_bytes=0, entry_bytes=ENTRY, password_file=shared_cluster.password_file
    )
    before = [shared_cluster.keys(node) for node in shared_cluster.nodes]
    used = set()
    for number in range(40):
        ids = [f"{number:012x}" + os.urandom(16).hex() for _ in range(8)]
        owned = [ids[0], *(f"customer/{id}" for id in ids[1:])]
        store.put([(id, id.encode()) for id in owned])
        assert [store.get(id) for id in owned] == [id.encode() for id in owned]
        there = [len(shared_cluster.keys(node) - old) for node, old in zip(shared_cluster.nodes, before, strict=True)]
        assert sorted(there) == [0, 0, 8]
        used.add(there.index(8))
        before = [shared_cluster.keys(node) for node in shared_cluster.nodes]
    assert used == {0, 1, 2}
    store.close()


@pytest.mark.process
async def test_a_cluster_comes_back_by_itself(tmp_path: Path) -> None:
    """While a node is down, writes raise StoreError in bounded time; after its restart the same store works again."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (Debian: apt install redis-server)")
    cluster = Cluster(tmp_path)
    try:
        cluster.start()
        store = open_store(
            cluster.url,
            ttl_seconds=60,
            max_bytes=0,
            entry_bytes=ENTRY,
            password_file=cluster.password_file,
            timeout=0.5,
        )
        (before,) = entries("000000000001", 1)
        store.put([before])

        def write_everywhere() -> bool:
            try:
                for number in range(30):
                    store.put([(f"{number:012x}-{os.urandom(4).hex()}", b"content")])
            except StoreError as error:
                assert "content" not in str(error) and cluster.password not in str(error)
                return False
            return True

        assert write_everywhere()
        cluster.nodes[1].end(signal.SIGKILL)
        began = time.monotonic()
        assert not write_everywhere()
        assert time.monotonic() - began < 10
        cluster.nodes[1].start()
        await until(write_everywhere)
        assert store.get(before[0]) == before[1]
        store.close()
    finally:
        cluster.end()


@pytest.mark.parametrize(
    "url",
    ["rediscluster://", "rediscluster://a:x", "rediscluster://a/0", "rediscluster://u:secret@a", "rediscluster://a,"],
)
def test_a_wrong_url_of_a_cluster_is_an_error_without_the_password(url: str) -> None:
    """A URL of another form raises StoreError, and its message does not contain the URL."""
    with pytest.raises(StoreError) as refusal:
        open_store(url, ttl_seconds=60, max_bytes=ENTRY, entry_bytes=ENTRY)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("damage", "boots", "kept"),
    [
        ("", "another boot", True),
        ("pages", "another boot", False),
        ("pages", "", False),
        ("name", "another boot", False),
    ],
    ids=["sound", "damaged", "damaged, of an older version", "a name that is no text"],
)
async def test_sqlite_begins_anew_after_a_crash_of_the_machine_damaged_it(
    tmp_path: Path, damage: str, boots: str, kept: bool
) -> None:
    """The first to open the file after a start of the machine keeps a sound one; a damaged one is moved aside."""
    path = tmp_path / "r.db"
    store = SqliteStore(path, ttl_seconds=60, max_entries=1000)
    store.put([(f"{number:032x}", bytes([number]) * 3000) for number in range(100)])
    store.close()
    (tmp_path / "r.db.lock").write_text(boots)
    content = path.read_bytes()
    if damage == "pages":
        content = content[:8192] + bytes(19 * 8192) + content[20 * 8192 :]
    elif damage == "name":
        content = content.replace(b"tableentriesentries", b"table\xffntriesentries")
    path.write_bytes(content)
    (tmp_path / "r.db.damaged").write_bytes(b"an older one")
    store = SqliteStore(path, ttl_seconds=60, max_entries=1000)
    assert (store.get(f"{7:032x}") is not None) == kept
    assert (tmp_path / "r.db.damaged").read_bytes() == (b"an older one" if kept else content)
    store.put([("a" * 32, b"new")])
    assert store.get("a" * 32) == b"new"
    store.close()


async def test_what_is_no_database_is_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that is not a database, such as a text at a mistyped path, is kept, and the log contains its new path."""
    path = tmp_path / "notes.txt"
    path.write_text("years of work\n" * 100)
    store = SqliteStore(path, ttl_seconds=60, max_entries=100)
    store.put([("a", b"1")])
    store.close()
    assert (tmp_path / "notes.txt.damaged").read_text() == "years of work\n" * 100
    assert "notes.txt.damaged" in caplog.text
    assert str(tmp_path) not in caplog.text


async def kept_before_a_boot(path: Path, content: bytes) -> None:
    """Make a store with one entry, `a`, as a process left it before the machine was started anew."""
    store = SqliteStore(path, ttl_seconds=60, max_entries=100)
    store.put([("a", content)])
    store.close()
    path.with_name(f"{path.name}.lock").write_text("another start of the machine")


async def test_a_full_disk_is_not_taken_for_a_damaged_file(tmp_path: Path) -> None:
    """The file is checked after a boot; a full disk during the check does not count as damage of the file."""
    path = tmp_path / "store.db"
    await kept_before_a_boot(path, b"1")
    store = SqliteStore(path, ttl_seconds=60, max_entries=100)
    with no_file_larger_than(1000), pytest.raises(StoreError, match="disk I/O error"):
        store.ping()
    assert store.get("a") == b"1"
    store.close()


FOREIGN = {
    "another table": ("CREATE TABLE visits (at TEXT)",),
    "a table of our name": ("CREATE TABLE entries (title TEXT, words TEXT)",),
    "one table too many": ("CREATE TABLE entries (number, key, expires, content)", "CREATE TABLE visits (at TEXT)"),
}


@pytest.mark.parametrize("mode", ["delete", "wal"])
@pytest.mark.parametrize("tables", FOREIGN.values(), ids=FOREIGN)
async def test_a_database_of_something_else_is_refused_and_not_altered(
    tmp_path: Path, tables: tuple[str, ...], mode: str
) -> None:
    """A file with other tables stops the start; one that appears later is a store that is down. Both stay as is."""
    path, later = tmp_path / "other.db", tmp_path / "later.db"
    store = SqliteStore(later, ttl_seconds=60, max_entries=100)
    for file in (path, later):
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute(f"PRAGMA journal_mode={mode}")
            for table in tables:
                connection.execute(table)
    content = path.read_bytes()
    with pytest.raises(StoreError, match="a database of another program"):
        open_store(f"sqlite:///{path}", ttl_seconds=60, max_bytes=ENTRY, entry_bytes=ENTRY)
    for call in (store.ping, lambda: store.put([("a", b"1")])):
        with pytest.raises(StoreError, match="a database of another program"):
            call()
    store.close()
    assert (path.read_bytes(), later.read_bytes()) == (content, content)


async def test_sqlite_checks_once_after_a_start_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process does not check a file again that the first process has open."""
    path, checked = tmp_path / "r.db", []
    monkeypatch.setattr("app.stores.sqlite_file._is_sound", lambda path, _: checked.append(path) or True)
    path.touch()
    for _ in range(3):
        store = SqliteStore(path, ttl_seconds=60, max_entries=1000)
        store.ping()
        store.close()
    assert checked == [path]


async def test_sqlite_lets_entries_go_that_lie_behind_longer_lived_ones(tmp_path: Path) -> None:
    """After a restart with a shorter time to live, expired entries are deleted although older entries remain valid."""
    path, clock = tmp_path / "r.db", [1000.0]
    before = SqliteStore(path, ttl_seconds=86_400, max_entries=10_000, clock=lambda: clock[0])
    before.put([("long-lived", b"old")])
    before.close()
    store = SqliteStore(path, ttl_seconds=60, max_entries=10_000, clock=lambda: clock[0])
    store.put([(f"short-lived-{number}", b"new") for number in range(200)])
    clock[0] += 61
    store.put([(f"fresh-{number}", b"new") for number in range(300)])
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = {key for (key,) in connection.execute("SELECT key FROM entries")}
    assert found == {"long-lived", *(f"fresh-{number}" for number in range(300))}


async def test_the_journal_of_sqlite_stays_small(tmp_path: Path) -> None:
    """The rollback journal is kept between transactions, and does not grow with the number of entries."""
    store = SqliteStore(tmp_path / "entries.db", ttl_seconds=60, max_entries=500)
    for group in range(150):
        store.put([(f"{group:06}{number:02}", bytes(2700)) for number in range(20)])
    assert 0 < (tmp_path / "entries.db-journal").stat().st_size <= 4 * 1024 * 1024
    store.close()


async def test_a_hanging_redis_costs_no_more_than_the_time_out(redis_server: RedisServer) -> None:
    """While Redis hangs, a write first times out, later writes fail at once, and writes work again after it resumes."""
    assert redis_server.process is not None
    store = RedisStore(redis_server.url, ttl_seconds=60, password_file=redis_server.password_file)
    kept = Reconstructions(store, Metrics(), timeout=1.5, max_waiting=64)
    record = Record(b"{}", bytes(3 * 784), 1.0)
    assert await kept.drop_cause([record._replace(id="a" * 32)]) is None
    redis_server.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert await kept.drop_cause([record._replace(id="b" * 32)]) == "store_slow"
    assert 1.0 < time.monotonic() - began < 5.0
    assert not kept.up
    began = time.monotonic()
    assert await kept.drop_cause([record._replace(id="c" * 32)]) == "store_down"
    assert time.monotonic() - began < 0.5
    redis_server.process.send_signal(signal.SIGCONT)

    async def up_again() -> bool:
        await kept.check_when_quiet()
        return kept.up

    await until(up_again, seconds=5)
    assert await kept.drop_cause([record._replace(id="d" * 32)]) is None
    assert await kept.find("d" * 32) == record
    await kept.aclose()


async def test_a_damaged_record_is_never_returned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A changed byte that SQLite does not notice makes the id unknown; the event is logged and counted."""
    store, metrics = SqliteStore(tmp_path / "store.db", ttl_seconds=60, max_entries=100), Metrics()
    kept = Reconstructions(store, metrics, timeout=5, max_waiting=64)
    pixels = b"the pixels of an image".ljust(3 * 784)
    damaged, other = (Record(b"{}", pixels, 1.0, letter * 44) for letter in "ab")
    await kept.check()
    assert await kept.drop_cause([damaged, other]) is None
    await kept.aclose()
    content = (tmp_path / "store.db").read_bytes()
    assert content.count(b"pixels of an image") == 2
    (tmp_path / "store.db").write_bytes(content.replace(b"pixels of an image", b"Pixels of an image", 1))
    store = SqliteStore(tmp_path / "store.db", ttl_seconds=60, max_entries=100)
    kept = Reconstructions(store, metrics, timeout=5, max_waiting=64)
    await kept.check()
    found = [await kept.find(record.id) for record in (damaged, other)]
    assert found.count(None) == 1
    assert {None, other._replace(id="")} == set(found)
    assert caplog.text.count("a damaged record was found") == 1
    assert b"anomaly_reconstruction_store_damaged_total 1.0" in metrics.exposition()
    await kept.aclose()


async def test_a_pause_of_the_event_loop_is_no_fault_of_the_store(tmp_path: Path) -> None:
    """A read whose time limit passes while the event loop is paused returns what the store has answered meanwhile."""
    store = SqliteStore(tmp_path / "store.db", ttl_seconds=60, max_entries=100)
    kept = Reconstructions(store, Metrics(), timeout=0.2, max_waiting=64)
    await kept.check()
    record = Record(b"{}", bytes(3 * 784), 1.0, "a" * 44)
    assert await kept.drop_cause([record]) is None
    for _ in range(5):
        reading = asyncio.create_task(kept.find(record.id))
        await asyncio.sleep(0)
        time.sleep(0.3)  # noqa: ASYNC251 - the pause
        assert await reading == record._replace(id="")
        assert kept.up
    await kept.aclose()


async def test_a_locked_file_costs_no_more_than_the_time_out(tmp_path: Path) -> None:
    """While another program locks the file, each write fails after the timeout; afterwards writes work again."""
    store = SqliteStore(tmp_path / "store.db", ttl_seconds=60, max_entries=100)
    kept = Reconstructions(store, Metrics(), timeout=0.2, max_waiting=64)
    await kept.check()
    record, said = Record(b"{}", bytes(3 * 784), 1.0), list[tuple[str, str | None]]()
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        for key in "ab":
            await asyncio.to_thread(
                kept.put, [record._replace(id=key)], lambda cause, key=key: said.append((key, cause))
            )
        await until(lambda: len(said) == 2)
        assert 0.1 < time.monotonic() - began < 1.5
        assert not kept.up
        other.execute("COMMIT")
    assert await kept.find("a") == record  # it was begun
    assert await kept.find("b") is None  # now the store's thread has finished both
    assert said == [("a", "store_slow"), ("b", "store_slow")]
    await kept.check()
    assert kept.up
    assert await kept.drop_cause([record._replace(id="c")]) is None
    assert (kept._breaker.waiting, len(kept._puts)) == (0, 0)
    await kept.aclose()


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """A disk that is full, as far as this process can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def _full_and_then_not(kept: Reconstructions, fill: Callable[[], object], empty: Callable[[], object]) -> None:
    """A full store counts as down until it has room, although it still returns entries."""
    record = Record(b"{}", bytes(3 * 784), 1.0)
    assert await kept.drop_cause([record._replace(id="before")]) is None
    fill()
    while await kept.drop_cause([record._replace(id=new_ids(1)[0])]) is None:
        pass
    for _ in range(8):  # the rest of its room is smaller than a record
        await kept.check()
    for _ in range(2):
        assert not kept.up
        assert await kept.find("before") == record
        assert not kept.up
        await kept.check()
    empty()
    await kept.check()
    assert kept.up
    assert await kept.drop_cause([record._replace(id="after")]) is None
    await kept.aclose()


async def test_a_full_disk_is_seen_although_the_file_can_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While writes fail, the store stays down, and the log does not report once per second that it is up."""
    store = SqliteStore(tmp_path / "store.db", ttl_seconds=60, max_entries=1000)
    kept = Reconstructions(store, Metrics(), timeout=2, max_waiting=64)
    await kept.check()
    with contextlib.ExitStack() as full:
        await _full_and_then_not(kept, lambda: full.enter_context(no_file_larger_than(100_000)), full.close)
    assert caplog.messages[-2:] == [
        "reconstruction store down: SQLite: disk I/O error",
        "reconstruction store up again",
    ]


async def test_a_disk_that_is_full_when_a_transaction_ends_is_named(tmp_path: Path) -> None:
    """If a disk is full at the end of a transaction, the error names the cause, not the failed rollback."""
    store = SqliteStore(tmp_path / "store.db", ttl_seconds=60, max_entries=1000)
    store.ping()
    with no_file_larger_than(100_000), pytest.raises(StoreError, match="disk I/O error"):
        store.put([(str(number), bytes(2700)) for number in range(100)])
    store.put([("after", b"1")])
    assert store.get("99") is None
    store.close()


async def test_reads_do_not_replace_the_check(tmp_path: Path) -> None:
    """If nothing was written for a while, a periodic probe detects a full disk, although reads succeed."""
    now, store = [0.0], SqliteStore(tmp_path / "store.db", ttl_seconds=60, max_entries=1000)
    kept = Reconstructions(store, Metrics(), timeout=2, max_waiting=64, clock=lambda: now[0])
    await kept.check()
    with no_file_larger_than(10_000):
        await kept.find("a")
        await kept.check_when_quiet()
        assert kept.up
        now[0] += 5
        await kept.find("a")
        await kept.check_when_quiet()
        assert not kept.up
    await kept.aclose()


async def test_redis_says_why_it_refuses_without_the_id(redis_server: RedisServer) -> None:
    """The log contains only the error code of a rejected Redis command, not the rest of the message."""
    store = RedisStore(redis_server.url, ttl_seconds=60, password_file=redis_server.password_file)
    store.ping()
    password = redis_server.password_file.read_text().strip()
    with contextlib.closing(redis.Redis.from_url(redis_server.url, password=password)) as other:
        other.config_set("min-replicas-to-write", 1)
    for call in (store.ping, lambda: store.put([("a" * 44, b"1")])):
        with pytest.raises(StoreError) as refusal:
            call()
        assert str(refusal.value) == "Redis: ResponseError NOREPLICAS"
    store.close()


async def test_a_full_redis_is_seen_although_it_answers(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Above its memory limit, Redis rejects writes but serves reads; the log line of this error contains no id."""
    store = RedisStore(redis_server.url, ttl_seconds=60, password_file=redis_server.password_file)
    kept = Reconstructions(store, Metrics(), timeout=2, max_waiting=64)
    await kept.check()
    password = redis_server.password_file.read_text().strip()
    with contextlib.closing(redis.Redis.from_url(redis_server.url, password=password)) as other:
        other.config_set("maxmemory-policy", "noeviction")
        await _full_and_then_not(
            kept, lambda: other.config_set("maxmemory", 1), lambda: other.config_set("maxmemory", 0)
        )
    assert caplog.messages == ["reconstruction store down: Redis: OutOfMemoryError", "reconstruction store up again"]


async def test_a_read_only_replica_is_seen_although_it_answers(
    redis_server: RedisServer, shared_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A replica rejects writes but serves reads: the store is down until the replica is promoted."""
    store = RedisStore(redis_server.url, ttl_seconds=60, password_file=redis_server.password_file)
    kept = Reconstructions(store, Metrics(), timeout=2, max_waiting=64)
    await kept.check()
    password = redis_server.password_file.read_text().strip()
    with contextlib.closing(redis.Redis.from_url(redis_server.url, password=password)) as replica:
        replica.config_set("masterauth", password)
        replica.config_set("appendonly", "no")  # Redis does not end while it writes its first file after a sync

        def follow() -> None:
            with contextlib.closing(redis.Redis.from_url(shared_redis.url, password=password)) as primary:
                (key,) = replica.keys("*before*")
                primary.restore(key, 60_000, replica.dump(key))
            replica.replicaof("127.0.0.1", shared_redis.port)
            wait_until(lambda: replica.info("replication")["master_link_status"] == "up")

        await _full_and_then_not(kept, follow, lambda: replica.replicaof("NO", "ONE"))
    assert caplog.messages == ["reconstruction store down: Redis: ReadOnlyError", "reconstruction store up again"]


async def test_a_locked_file_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    """The file is checked after a boot; a lock during the check does not count as damage of the file."""
    path = tmp_path / "store.db"
    await kept_before_a_boot(path, b"1")
    store = SqliteStore(path, ttl_seconds=60, max_entries=100, timeout=0.1)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="locked"):
            store.ping()
        other.execute("COMMIT")
    assert store.get("a") == b"1"
    store.close()


async def test_closing_waits_for_a_locked_file_no_longer_than_for_a_write(tmp_path: Path) -> None:
    """If another program locks the file permanently, the service still ends."""
    store = SqliteStore(tmp_path / "store.db", ttl_seconds=60, max_entries=100, timeout=0.2)
    store.ping()
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="locked"):
            store.put([("a", b"1")])
        store.close()


async def test_a_record_that_cannot_be_packed_is_dropped(tmp_path: Path) -> None:
    """An error before the backend is called is reported once, and the store works on."""
    store = SqliteStore(tmp_path / "store.db", ttl_seconds=60, max_entries=100)
    kept = Reconstructions(store, Metrics(), timeout=5, max_waiting=64)
    await kept.check()
    unpackable: Any = None
    assert await kept.drop_cause([Record(b"{}", unpackable, 1.0, "a")]) is not None
    assert (kept._breaker.waiting, len(kept._puts)) == (0, 0)
    await kept.check()
    assert await kept.drop_cause([Record(b"{}", bytes(3 * 784), 1.0, "b")]) is None
    await kept.aclose()


async def test_a_dead_disk_does_not_block_the_shutdown(tmp_path: Path) -> None:
    """A backend that never returns is abandoned after the timeout, and `aclose` returns False."""
    gate = threading.Event()

    class Dead(SqliteStore):
        def put(self, _: Sequence[tuple[str, bytes]]) -> None:
            gate.wait(60)

    kept = Reconstructions(
        Dead(tmp_path / "store.db", ttl_seconds=60, max_entries=100), Metrics(), timeout=0.1, max_waiting=64
    )
    await kept.check()
    assert await kept.drop_cause([Record(b"{}", bytes(3 * 784), 1.0, "a")]) is not None
    assert not await kept.aclose(timeout=0.1)
    gate.set()


class Hanging:
    """A backend whose methods return when the test opens the gate."""

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)

    def put(self, _: Sequence[tuple[str, bytes]]) -> None:
        """Wait."""
        self.entered.release()
        assert self.gate.wait(30)

    def get(self, _: str) -> bytes | None:
        """Wait, and find nothing."""
        assert self.gate.wait(30)
        return None

    def ping(self) -> None:
        """Wait."""
        self.put([])

    def close(self) -> None:
        """Do nothing."""


class Group(list[Record]):
    """Records to which a weak reference can be made."""


async def test_a_hanging_store_keeps_no_records() -> None:
    """Records that expire are freed although the store's thread hangs, and no probe begins until it returns."""
    store, now = Hanging(), [0.0]
    kept = Reconstructions(store, Metrics(), timeout=0.01, max_waiting=8, clock=lambda: now[0])
    kept._loop = asyncio.get_running_loop()
    causes: list[str | None] = []
    groups: list[weakref.ref[Group]] = []
    for number in range(8):
        group = Group([Record(b"{}", bytes(3 * 784), 1.0, str(number))])
        groups.append(weakref.ref(group))
        kept.put(group, lambda cause, _=group: causes.append(cause))  # type: ignore[misc]
        del group
    assert await asyncio.to_thread(store.entered.acquire, timeout=30)
    now[0] += 0.02
    await until(lambda: len(causes) == 8)
    assert causes == ["store_slow"] * 8
    assert [number for number, group in enumerate(groups) if group() is not None] == [0]  # it is being written
    for _ in range(20):
        now[0] += 2
        assert await kept.drop_cause([Record(b"{}", b"", 1.0, "a")]) == "store_down"
        await kept.check_when_quiet()
    assert kept._worker.waiting == 7
    assert not await asyncio.to_thread(store.entered.acquire, blocking=False)
    store.gate.set()
    await until(lambda: kept._breaker.writes == 0)
    await until(lambda: groups[0]() is None)
    assert await kept.drop_cause([Record(b"{}", b"", 1.0, "a")]) is None
    assert kept.up
    assert await kept.aclose()


async def test_reads_that_wait_for_a_hanging_store_are_bounded() -> None:
    """While the store hangs, at most `max_waiting` reads wait; further ones fail at once. Afterwards reads work."""
    store = Hanging()
    kept = Reconstructions(store, Metrics(), timeout=0.01, max_waiting=8)
    await kept.check()  # it does not return in time
    assert not kept.up
    for _ in range(20):
        with pytest.raises(StoreError):
            await kept.find("a")
    assert kept._worker.waiting == 8
    store.gate.set()
    await until(lambda: kept._worker.waiting == 0)
    kept._timeout = 30
    assert await kept.find("a") is None
    await kept.check()
    assert kept.up
    assert await kept.aclose()


async def test_any_thread_stores_records(tmp_path: Path) -> None:
    """The inference thread and other threads store records at once, and each gets the result of its own records."""
    store = SqliteStore(tmp_path / "store.db", ttl_seconds=60, max_entries=1000)
    kept = Reconstructions(store, Metrics(), timeout=30, max_waiting=1000)
    await kept.check()
    groups = [[Record(b"{}", bytes(3 * 784), 1.0, f"{thread}-{n}") for n in range(3)] for thread in range(20)]
    told: list[str | None] = []
    heard = threading.Semaphore(0)

    def on_done(cause: str | None) -> None:
        told.append(cause)
        heard.release()

    await asyncio.gather(*(asyncio.to_thread(kept.put, group, on_done) for group in groups))
    for _ in groups:
        assert await asyncio.to_thread(heard.acquire, timeout=30)
    assert told == [None] * 20
    assert all([await kept.find(record.id) is not None for group in groups for record in group])
    await kept.aclose()


async def test_a_group_larger_than_the_bound_is_kept_when_none_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A chunk of a batch request may be larger than the queue of single images; a second one must wait its turn."""
    store = SqliteStore(tmp_path / "store.db", ttl_seconds=60, max_entries=1000)
    kept = Reconstructions(store, Metrics(), timeout=30, max_waiting=4)
    groups = [[Record(b"{}", bytes(3 * 784), 1.0, f"{group}-{n}") for n in range(8)] for group in range(2)]
    assert await asyncio.gather(*(kept.drop_cause(group) for group in groups)) == [None, "store_full"]
    assert caplog.text.count("wait for the store") == 1
    assert await kept.drop_cause(groups[1]) is None
    await kept.aclose()


async def test_states_are_swapped_atomically(make_store: OpenStore) -> None:
    """A state is replaced only by the caller that has read the latest one, and does not expire."""
    one, other = make_store(ttl_seconds=0.001), make_store()
    key = f"test/{os.urandom(8).hex()}"
    assert one.read_state(key) is None
    assert one.swap_state(key, None, b"first")
    assert not other.swap_state(key, None, b"second")
    assert other.read_state(key) == b"first"
    assert other.swap_state(key, b"first", b"second")
    assert not one.swap_state(key, b"first", b"third")
    assert one.read_state(key) == b"second"
    assert one.get(key) is None


async def test_concurrent_swaps_lose_nothing(make_store: OpenStore) -> None:
    """Two processes that add to one state at the same time lose no addition."""
    key = f"test/{os.urandom(8).hex()}"

    def add(store: Store) -> None:
        for _ in range(100):
            while True:
                old = store.read_state(key)
                with contextlib.suppress(StoreError):
                    count = int((old or b"0").partition(b" ")[0]) + 1
                    if store.swap_state(key, old, f"{count} {os.urandom(8).hex()}".encode()):
                        break
        store.close()

    threads = [threading.Thread(target=add, args=[make_store()]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (make_store().read_state(key) or b"").startswith(b"200 ")


def version_with_a_stream_of_its_own() -> Any:
    """Return what `ValidityMonitor` reads of a version, with a calibration that no other stream has."""
    repository = Repository(MODEL_STORE)
    manifest = repository.manifest("zero-article", 1)
    calibration = repository.calibration(manifest)
    manifest = manifest.model_copy(update={"files": {**manifest.files, "calibration.npy": os.urandom(8).hex()}})
    return SimpleNamespace(manifest=manifest, calibration=calibration)


async def test_replicas_continue_one_stream(make_store: OpenStore) -> None:
    """Two replicas with one store add their images to one stream, at the same time, and none counts twice."""
    version = version_with_a_stream_of_its_own()
    kept = [Reconstructions(make_store(), Metrics(), timeout=20, max_waiting=100) for _ in range(2)]
    replicas = [ValidityMonitor(each, Metrics(), 100) for each in kept]
    for each in kept:
        await each.check()
    scores = np.asarray(version.calibration.scores)
    for _ in range(20):
        for replica in replicas:
            replica.add(version, scores[::10])
        await asyncio.gather(*(replica.flush() for replica in replicas))
    reports = [await replica.report(version) for replica in replicas]
    assert [each.images for each in reports] == [40 * len(scores[::10])] * 2
    assert reports[0] == reports[1]
    for each in kept:
        await each.aclose()


async def test_a_redis_user_without_the_states_costs_no_ids(
    redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If the user may not use the keys of the states, records are stored; only the validity fails, with one line."""
    words, version = tmp_path / "words", version_with_a_stream_of_its_own()
    words.write_text("of-the-user")
    administrator = redis.Redis(port=redis_server.port, password=redis_server.password_file.read_text().strip())

    def allow(*keys: str) -> None:
        administrator.acl_setuser(
            "service", enabled=True, reset=True, passwords=["+of-the-user"], keys=keys,
            commands=["+set", "+get", "+multi", "+exec", "+eval", "+client"],
        )  # fmt: skip

    allow("reconstruction:*")
    url = redis_server.url.replace("redis://", "redis://service@")
    kept = Reconstructions(RedisStore(url, ttl_seconds=60, password_file=words), Metrics(), timeout=5, max_waiting=64)
    await kept.check()
    monitor, record = ValidityMonitor(kept, Metrics(), 100), Record(b"{}", bytes(3 * 784), 1.0)
    monitor.add(version, np.asarray(version.calibration.scores)[:7])
    for letter in "abc":
        await monitor.flush()
        with pytest.raises(StoreError):
            await monitor.report(version)
        assert await kept.drop_cause([record._replace(id=letter * 32)]) is None
        assert await kept.find(letter * 32) == record
    assert kept.up
    assert caplog.text.count("streams of scores cannot be stored: Redis: NoPermissionError") == 1
    allow("reconstruction:*", "state:*")
    assert (await monitor.report(version)).images == 7
    administrator.close()
    await kept.aclose()
