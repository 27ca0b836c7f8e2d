"""A SQLite file that is deleted or replaced under a running service, and URLs that name no file."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from app.settings import Settings
from app.stores import StoreError, open_store
from app.stores.sqlite import SqliteStore
from tests.conftest import running

PNG = {"content-type": "image/png"}
ENDINGS = ("", "-wal", "-shm")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SqliteStore:
    """Return a store that compares its file with each access, with one entry."""
    monkeypatch.setattr("app.stores.sqlite._COMPARE_SECONDS", 0.0)
    store = SqliteStore(tmp_path / "a.db", ttl_seconds=60, max_entries=1000)
    store.put([("first", b"1")])
    return store


@pytest.mark.parametrize("endings", [ENDINGS, ("",)], ids=["with its log", "alone"])
def test_a_deleted_file_is_made_again(
    store: SqliteStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, endings: tuple[str, ...]
) -> None:
    """After a deletion, new entries are in a new file, which other processes read; the log has one line."""
    for ending in endings:
        (tmp_path / f"a.db{ending}").unlink()
    for number in range(3):
        store.put([(f"second-{number}", b"2")])
    assert store.get("first") is None
    other = SqliteStore(tmp_path / "a.db", ttl_seconds=60, max_entries=1000)
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
    """Each process notices by itself, and none removes the log of the other."""
    second = SqliteStore(tmp_path / "a.db", ttl_seconds=60, max_entries=1000)
    assert second.get("first") == b"1"
    for ending in ENDINGS:
        (tmp_path / f"a.db{ending}").unlink()
    store.put([("from-one", b"1")])
    second.put([("from-two", b"2")])
    assert store.get("from-two") == b"2"
    assert second.get("from-one") == b"1"


def test_a_damaged_file_in_its_place_is_moved_aside(store: SqliteStore, tmp_path: Path) -> None:
    """A file that is no database does not stop the store."""
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
    monkeypatch.setattr("app.stores.sqlite._COMPARE_SECONDS", 0.0)
    async with running(make_settings()) as client:
        before = (await client.post("/score", content=zero, headers=PNG)).json()["reconstruction"]
        for ending in ENDINGS:
            (tmp_path / f"reconstructions.db{ending}").unlink()
        after = (await client.post("/score", content=zero, headers=PNG)).json()["reconstruction"]
        assert (await client.get(after)).status_code == 200
        assert (await client.get(before)).status_code == 404
        assert "anomaly_reconstruction_store_reopened_total 1.0" in (await client.get("/metrics")).text


def test_the_file_is_compared_once_per_second() -> None:
    """A deletion is noticed within a second."""
    from app.stores import sqlite

    assert sqlite._COMPARE_SECONDS <= 1.0


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
    """The message says how to write the URL."""
    with pytest.raises(StoreError, match=words):
        open_store(url, ttl_seconds=60, max_bytes=1 << 20, entry_bytes=4096)
