"""A SQLite file that is deleted or replaced under a running service, and URLs that name no file."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.main import check
from app.settings import Settings
from app.stores import StoreError, open_store
from app.stores.file_users import FileUsers
from app.stores.sqlite import SqliteStore
from app.stores.sqlite_file import PAGE_BYTES
from tests.conftest import ROOT, running
from tests.waiting import wait_until

PNG = {"content-type": "image/png"}
ENDINGS = ("", "-journal")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqliteStore]:
    """Return a store that compares its file with each access, with one entry."""
    monkeypatch.setattr("app.stores.sqlite_file._COMPARE_SECONDS", 0.0)
    store = SqliteStore(tmp_path / "a.db", ttl_seconds=60, max_entries=1000)
    store.put([("first", b"1")])
    yield store
    store.close()


@pytest.mark.parametrize("endings", [ENDINGS, ("",)], ids=["with its journal", "alone"])
def test_a_deleted_file_is_made_again(
    store: SqliteStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, endings: tuple[str, ...]
) -> None:
    """After a deletion, new entries are in a new file, which other processes read; the log has one line."""
    for ending in endings:
        (tmp_path / f"a.db{ending}").unlink()
    for number in range(3):
        store.put([(f"second-{number}", b"2")])
    assert store.get("first") is None
    with contextlib.closing(SqliteStore(tmp_path / "a.db", ttl_seconds=60, max_entries=1000)) as other:
        assert other.get("second-0") == other.get("second-2") == b"2"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "deleted or replaced" in caplog.text


def test_a_replaced_file_is_read(store: SqliteStore, tmp_path: Path) -> None:
    """A file of another store that takes the name, such as a backup, is used from then on."""
    other = SqliteStore(tmp_path / "b.db", ttl_seconds=60, max_entries=1000)
    other.put([("other", b"3")])
    other.close()
    for ending in ENDINGS[1:]:
        (tmp_path / f"a.db{ending}").unlink()
    (tmp_path / "b.db").replace(tmp_path / "a.db")
    assert store.get("other") == b"3"
    assert store.get("first") is None


def test_two_processes_meet_in_the_new_file(store: SqliteStore, tmp_path: Path) -> None:
    """Each process notices by itself, and none removes the journal of the other."""
    second = SqliteStore(tmp_path / "a.db", ttl_seconds=60, max_entries=1000)
    assert second.get("first") == b"1"
    for ending in ENDINGS:
        (tmp_path / f"a.db{ending}").unlink()
    store.put([("from-one", b"1")])
    second.put([("from-two", b"2")])
    assert store.get("from-two") == b"2"
    assert second.get("from-one") == b"1"
    second.close()


def test_a_damaged_file_in_its_place_is_moved_aside(store: SqliteStore, tmp_path: Path) -> None:
    """The store works although its file is not a database."""
    for ending in ENDINGS:
        (tmp_path / f"a.db{ending}").unlink()
    (tmp_path / "a.db").write_bytes(b"no database" * 100)
    store.put([("second", b"2")])
    assert store.get("second") == b"2"
    assert (tmp_path / "a.db.damaged").exists()


def test_a_database_of_something_else_in_its_place_is_not_altered(store: SqliteStore, tmp_path: Path) -> None:
    """The store is down as long as another program's database has its name."""
    for ending in ENDINGS:
        (tmp_path / f"a.db{ending}").unlink()
    foreign = sqlite3.connect(tmp_path / "a.db")
    foreign.execute("CREATE TABLE theirs (x)")
    foreign.commit()
    foreign.close()
    for _ in range(2):
        with pytest.raises(StoreError, match="another program"):
            store.put([("second", b"2")])
    (tmp_path / "a.db").unlink()
    store.put([("second", b"2")])
    assert store.get("second") == b"2"


async def test_the_service_notices_and_counts(
    make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: bytes
) -> None:
    """After a deletion, scores have ids that can be fetched, and a metric counts."""
    monkeypatch.setattr("app.stores.sqlite_file._COMPARE_SECONDS", 0.0)
    async with running(make_settings()) as client:
        before = (await client.post("/score", content=zero, headers=PNG)).json()["reconstruction"]
        for ending in ENDINGS:
            (tmp_path / f"reconstructions.db{ending}").unlink()
        after = (await client.post("/score", content=zero, headers=PNG)).json()["reconstruction"]
        assert (await client.get(after)).status_code == 200
        assert (await client.get(before)).status_code == 404
        assert "anomaly_reconstruction_store_reopened_total 1.0" in (await client.get("/metrics")).text


def test_the_file_is_compared_several_times_per_second() -> None:
    """A deletion, and another process that waits, are noticed within half of the time that a store may take."""
    from app.stores import sqlite_file

    assert Settings().store_timeout_ms / 1000 / 2 >= sqlite_file._COMPARE_SECONDS


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite://var/reconstructions.db", "two slashes"),
        ("sqlite://reconstructions.db", "sqlite:////var"),
        ("sqlite:///var/reconstructions.db?timeout=5", "query"),
        ("sqlite:////var/reconstructions.db?mode=ro", "query"),
    ],
)
def test_urls_that_would_name_another_file_are_refused(url: str, words: str) -> None:
    """The message contains the form of the URL."""
    with pytest.raises(StoreError, match=words):
        open_store(url, ttl_seconds=60, max_bytes=1 << 20, entry_bytes=4096)


def test_a_store_in_memory_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several workers, each would have its own store: the service does not start, and names both settings."""
    limits = {"ttl_seconds": 60.0, "max_bytes": 1 << 20, "entry_bytes": 4096}
    monkeypatch.chdir(tmp_path)  # the store creates the files of its lock
    stores = [open_store("sqlite:///:memory:", **limits) for _ in range(2)]
    stores[0].put([("id", b"content")])
    assert [store.get("id") for store in stores] == [b"content", None]
    for store in stores:
        store.close()
    check(Settings(store_url="sqlite:///:memory:", workers=1))
    for url in ("sqlite:///:memory:", "sqlite:///./:memory:"):
        with pytest.raises(StoreError, match=r"ANOMALY_STORE_URL.* ANOMALY_WORKERS=1"):
            check(Settings(store_url=url, workers=2))


def test_a_folder_that_is_deleted_while_the_file_cannot_be_opened(store: SqliteStore, tmp_path: Path) -> None:
    """The folder of a store that is down, for a database of another program, is deleted: the next access works."""
    folder = tmp_path / "folder"
    with contextlib.closing(SqliteStore(folder / "a.db", ttl_seconds=60, max_entries=1000)) as other:
        other.put([("first", b"1")])
        (folder / "a.db").unlink()
        with contextlib.closing(sqlite3.connect(folder / "a.db")) as foreign:
            foreign.execute("CREATE TABLE theirs (x)")
        for _ in range(2):
            with pytest.raises(StoreError, match="another program"):
                other.ping()
        shutil.rmtree(folder)
        other.put([("second", b"2")])
        assert other.get("second") == b"2"


INDEX_DAMAGE = """
import os, sys
from pathlib import Path
from app.stores.sqlite import SqliteStore

path = Path(sys.argv[1])
store = SqliteStore(path, ttl_seconds=60, max_entries=1000)
store.put([("first", b"1")])
for ending in ("-shm", "-wal", "-journal"):
    beside = path.with_name(path.name + ending)
    if sys.argv[2] == "overwritten":
        beside.write_bytes(os.urandom(100_000))
    elif beside.exists():
        os.truncate(beside, 0)
for number in range(200):
    store.put([(f"later-{number}", bytes(3000))])
assert store.get("later-199") == bytes(3000)
"""


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_no_file_beside_the_database_can_end_the_process(tmp_path: Path, damage: str) -> None:
    """A truncated `-shm` file kills each process that has mapped it (SIGBUS); the store maps no file."""
    command = [sys.executable, "-c", INDEX_DAMAGE, str(tmp_path / "a.db"), damage]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_with_a_write_ahead_log_is_converted(tmp_path: Path) -> None:
    """A file of an earlier release keeps its entries, those in its log included, and is no longer mapped."""
    path = tmp_path / "a.db"
    with contextlib.closing(SqliteStore(path, ttl_seconds=60, max_entries=1000)) as first:
        first.ping()
    earlier = sqlite3.connect(path, isolation_level=None)
    earlier.execute("PRAGMA journal_mode=WAL")
    earlier.execute("INSERT INTO entries (key, expires, content) VALUES ('before', 1e12, x'31')")
    for ending in ("", "-wal"):  # like the files of a killed process
        shutil.copy(f"{path}{ending}", tmp_path / f"b.db{ending}")
    (tmp_path / "b.db-shm").write_bytes(b"not an index")
    earlier.close()
    store = SqliteStore(tmp_path / "b.db", ttl_seconds=60, max_entries=1000)
    assert store.get("before") == b"1"
    store.put([("after", b"2")])
    assert "b.db" not in Path("/proc/self/maps").read_text()
    other = SqliteStore(tmp_path / "b.db", ttl_seconds=60, max_entries=1000)
    assert other.get("after") == b"2"
    store.close()
    other.close()


def overwrite(path: Path, damage: str) -> None:
    """Damage the open file without replacing it: the inode stays the same."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        if damage == "pages":
            file.seek(8192)
            file.write(os.urandom(size - 8192))
        elif damage == "header":
            file.write(b"no database" * 100)
        elif damage == "cut":
            file.truncate(8192 * 3 + 100)
        elif damage == "empty":
            file.truncate(0)


@pytest.mark.parametrize("first", ["put", "get"])
@pytest.mark.parametrize("damage", ["pages", "header", "cut", "empty"])
def test_damage_at_run_time_costs_the_entries_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, first: str
) -> None:
    """The access that finds the damage moves the file aside, once, and uses a new file; two processes agree on it."""
    damaged: list[None] = []
    make = functools.partial(SqliteStore, tmp_path / "a.db", ttl_seconds=60, max_entries=1000)
    stores = [make(on_damaged=lambda: damaged.append(None)) for _ in range(2)]
    for store in stores:
        store.put([(os.urandom(16).hex(), bytes(3000)) for _ in range(50)])
    overwrite(tmp_path / "a.db", damage)
    if first == "get":
        assert stores[0].get("unknown") is None
    for number in range(60):
        stores[number % 2].put([(f"after-{number}", bytes([number]) * 3000)])
    for store in stores:
        assert [store.get(f"after-{number}") for number in range(60)] == [bytes([n]) * 3000 for n in range(60)]
    moved = damage != "empty"
    assert (tmp_path / "a.db.damaged").exists() == moved
    assert len(damaged) == [record.levelno for record in caplog.records].count(logging.ERROR) == int(moved)
    for store in stores:
        store.close()


def test_a_disk_that_damages_each_file_is_not_written_forever(store: SqliteStore, tmp_path: Path) -> None:
    """A second damaged file within a minute is an error: the store is down, and probed once per second."""
    overwrite(tmp_path / "a.db", "header")
    store.put([("second", b"2")])
    overwrite(tmp_path / "a.db", "header")
    for _ in range(2):
        with pytest.raises(StoreError, match="damaged again"):
            store.put([("third", b"3")])


async def test_the_service_goes_on_with_ids_after_damage(
    make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: bytes
) -> None:
    """The score that finds the damage has an id that can be fetched, and a metric counts."""
    monkeypatch.setattr("app.stores.sqlite_file._COMPARE_SECONDS", 0.0)
    async with running(make_settings()) as client:
        assert (await client.post("/score", content=zero, headers=PNG)).json()["id"]
        overwrite(tmp_path / "reconstructions.db", "header")
        after = (await client.post("/score", content=zero, headers=PNG)).json()["reconstruction"]
        assert (await client.get(after)).status_code == 200
        assert "anomaly_reconstruction_store_damaged_total 1.0" in (await client.get("/metrics")).text


def is_locked(path: Path) -> bool:
    """Return whether another program has to wait for the file."""
    with contextlib.closing(sqlite3.connect(path, timeout=0)) as other:
        try:
            other.execute("SELECT count(*) FROM entries").fetchall()
        except sqlite3.OperationalError as error:
            return "locked" in str(error)
    return False


def test_a_process_that_is_alone_keeps_the_lock(store: SqliteStore, tmp_path: Path) -> None:
    """Other programs have to wait while entries arrive, and no longer once the store is only probed."""
    store.put([("second", b"2")])
    assert is_locked(tmp_path / "a.db")
    store.ping()
    assert not is_locked(tmp_path / "a.db")


def test_a_lock_beside_the_file_lets_programs_in(store: SqliteStore, tmp_path: Path) -> None:
    """`flock --shared <name>.users` in front of a program keeps the file open for it, as docs/deployment.md says."""
    store.put([("second", b"2")])
    command = ["flock", "--shared", str(tmp_path / "a.db.users"), "cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin
        assert program.stdout
        program.stdin.write(b"locked\n")
        program.stdin.flush()
        program.stdout.readline()
        store.put([("third", b"3")])
        assert not is_locked(tmp_path / "a.db")
    store.put([("fourth", b"4")])
    assert is_locked(tmp_path / "a.db")


def test_damage_under_the_kept_lock_is_found_at_the_next_look(store: SqliteStore, tmp_path: Path) -> None:
    """A process that keeps the lock reads all pages again when it looks for other processes."""
    store.put([(f"{number:044d}", bytes(3000)) for number in range(600)])
    assert is_locked(tmp_path / "a.db")
    store._file._compare_at = time.monotonic() + 60
    with (tmp_path / "a.db").open("r+b") as file:
        file.seek(2 * PAGE_BYTES)  # the root of the index, which is in the cache
        file.write(os.urandom(PAGE_BYTES))
    store.put([("unnoticed", b"1")])
    assert store.get("unnoticed") == b"1"
    store._file._compare_at = 0.0
    store.put([("noticed", b"2")])
    assert (tmp_path / "a.db.damaged").exists()
    assert store.get("noticed") == b"2"


WRITER = """
import itertools
import sys
import time
from pathlib import Path
from app.stores.sqlite import SqliteStore

store = SqliteStore(Path(sys.argv[1]), ttl_seconds=600, max_entries=1_000_000)
for number in itertools.count():
    store.put([(f"{sys.argv[2]}-{number}", bytes(2000))])
    print(number, flush=True)
"""


def test_a_second_process_gets_in_and_outlives_the_first(tmp_path: Path) -> None:
    """While a process writes without a pause and keeps the lock, another one opens the file. Both store each entry."""
    path = tmp_path / "a.db"
    command = [sys.executable, "-c", WRITER, str(path), "other"]
    own = SqliteStore(path, ttl_seconds=600, max_entries=1_000_000)
    output = tmp_path / "written"
    with output.open("w") as file, subprocess.Popen(command, cwd=ROOT, stdout=file) as other:
        try:
            wait_until(lambda: all(is_locked(path) for _ in range(500)))
            for number in range(200):
                own.put([(f"own-{number}", bytes(2000))])
            before = len(output.read_text().split())
            wait_until(lambda: len(output.read_text().split()) > before)
        finally:
            other.kill()
    written = output.read_text().split()
    assert own.get(f"other-{written[-1]}") == own.get("other-0") == own.get("own-0") == bytes(2000)
    own._file._compare_at = 0.0
    own.put([("last", b"1")])
    assert is_locked(path)
    own.close()


def delete_locks(path: Path) -> None:
    """Delete the files by which processes find each other, as a program that deletes old files does."""
    for ending in (".users", ".lock"):
        path.with_name(path.name + ending).unlink()


def test_a_second_process_gets_in_after_the_locks_were_deleted(store: SqliteStore, tmp_path: Path) -> None:
    """A process that keeps the lock finds others although `.users` and `.lock` were deleted. Both store each entry."""
    path = tmp_path / "a.db"
    store.put([("kept", b"1")])
    assert is_locked(path)
    delete_locks(path)
    users = FileUsers(path)
    with users.joined():  # as each process that opens the file
        pass
    store.put([("given back", b"2")])
    assert not is_locked(path)
    with contextlib.closing(SqliteStore(path, ttl_seconds=60, max_entries=1000)) as second:
        for number in range(10):
            second.put([(f"second-{number}", b"3")])
            store.put([(f"first-{number}", b"4")])
        assert store.get("second-9") == b"3"
        assert second.get("first-9") == b"4"
    users.leave()
    store.put([("alone", b"5")])
    assert is_locked(path)


def test_a_worker_is_found_after_the_locks_were_deleted(store: SqliteStore, tmp_path: Path) -> None:
    """A process that never keeps the lock joins again too, so a process that keeps it gives it back."""
    store.close()
    with contextlib.closing(SqliteStore(tmp_path / "a.db", ttl_seconds=60, max_entries=1000, shared=True)) as worker:
        worker.put([("worker", b"1")])
        delete_locks(tmp_path / "a.db")
        store.put([("alone", b"2")])
        assert worker.get("alone") == b"2"
        store.put([("found", b"3")])
        assert not is_locked(tmp_path / "a.db")
