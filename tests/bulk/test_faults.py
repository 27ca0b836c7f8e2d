"""Faults of `anomaly bulk`: damaged files of rows, and folders and files that cannot be read while they are listed."""

from __future__ import annotations

import errno
import os
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import anomaly.bulk
from anomaly.bulk import inputs, outputs
from anomaly.bulk.locations import BulkError, Location, locate
from anomaly.bulk.runs import Request, Summary, execute
from tests import model_stores
from tests.conftest import MODEL_STORE
from tests.pngs import gradient, plain


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score on the CPU, as the other tests of bulk scoring do."""
    monkeypatch.setenv("ANOMALY_DEVICE", "cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder with an image and an array of 9 images."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.png").write_bytes(plain(gradient(28)))
    np.save(folder / "many.npy", np.stack([gradient(28)] * 9))
    return folder


def run(source: Path, output: Path, **options: Any) -> Summary:
    """Score an input with one thread."""
    return execute(Request(str(source), str(output), MODEL_STORE, "zero-article", workers=1, **options))


def errors(output: Path) -> dict[str, tuple[str | None, str | None]]:
    """Return error and detail of each row by id."""
    rows = [row for path in outputs.parts(locate(str(output))) for row in pq.read_table(path).to_pylist()]
    return {row["id"]: (row["error"], row["detail"]) for row in rows}


def empty(path: Path) -> None:
    """Remove the content of a file, as a power failure may do."""
    path.write_bytes(b"")


def cut(path: Path) -> None:
    """Remove the second half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite_pages(path: Path) -> None:
    """Overwrite the pages of the first column."""
    first = pq.ParquetFile(path).metadata.row_group(0).column(0)
    with path.open("r+b") as stream:
        stream.seek(first.dictionary_page_offset or first.data_page_offset)
        stream.write(b"\xff" * first.total_compressed_size)


def change_an_id(path: Path) -> None:
    """Change one letter of an id in a page, which no decoder of the format notices without a checksum."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b"good.png", b"food.png", 1))


@pytest.mark.parametrize("damage", [empty, cut, overwrite_pages, change_an_id])
def test_a_damaged_file_of_rows_is_named(source: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """A resumed run names the damaged file; after it is deleted, the next run scores its images again."""
    output = tmp_path / "out"
    assert run(source, output, q_values=True).new == 10
    [part] = output.glob("*.parquet")
    damage(part)
    with pytest.raises(BulkError) as raised:
        run(source, output, q_values=True)
    assert str(raised.value).startswith(f"{part} is damaged: ")
    assert str(raised.value).endswith("; delete this file and run the command again, which scores its images again")
    part.unlink()
    assert run(source, output, q_values=True).new == 10


def test_damaged_files_of_rows_of_ray(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray replaces the files of a killed run; a file that stays damaged can only be scored again without checkpoint."""
    output = tmp_path / "out"
    replaced = [True, False]

    def resume(*_: object, **__: object) -> None:
        for path in output.glob("*.parquet"):
            path.unlink() if replaced.pop(0) else None

    stub = types.SimpleNamespace(run=lambda *_, **__: None)
    monkeypatch.setattr(anomaly.bulk, "cluster", stub, raising=False)
    assert run(source, output, address="auto").new == 0
    monkeypatch.setattr(stub, "run", resume)
    (output / "killed.parquet").write_bytes(b"PAR1")
    assert run(source, output, address="auto").new == 0
    (output / "damaged.parquet").write_bytes(b"PAR1")
    with pytest.raises(BulkError, match=r"damaged\.parquet is damaged: .*; delete .*/out and .*/out\.checkpoint,"):
        run(source, output, address="auto")


def test_a_failure_of_the_file_system_is_not_damage(tmp_path: Path) -> None:
    """A file of rows that cannot be opened is an `OSError`, and the message does not recommend to delete the file."""
    model_stores.link(tmp_path / "part-a.parquet", model_stores.UNREADABLE)
    with (
        pytest.raises(OSError, match="File name too long"),
        outputs.opened(locate(str(tmp_path)), str(tmp_path / "part-a.parquet")),
    ):
        pass


def make_deep_folder(root: Path) -> None:
    """Make a folder whose path is longer than the system allows: it cannot be listed, by root too."""
    name, length = "d" * 200, len(str(root))
    folder = os.open(root, os.O_RDONLY)
    while length < 4100:
        os.mkdir(name, dir_fd=folder)
        inside = os.open(name, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder, length = inside, length + 1 + len(name)
    os.close(folder)


def test_a_subfolder_that_cannot_be_listed_becomes_a_row(source: Path, tmp_path: Path) -> None:
    """A subfolder that cannot be listed is one row with the reason, once; all other images are scored."""
    make_deep_folder(source)
    (source / "link.png").symlink_to(model_stores.UNREADABLE)
    summary = run(source, tmp_path / "out")
    assert (summary.new, summary.not_scored) == (12, 2)
    assert run(source, tmp_path / "out").new == 0
    found = {id: why for id, why in errors(tmp_path / "out").items() if why != (None, None)}
    [folder] = (id for id in found if id.startswith("ddd"))
    assert found == dict.fromkeys((folder, "link.png"), ("unreadable-file", "File name too long"))


OnListing = Callable[[str, Callable[[], None]], None]


@pytest.fixture
def on_listing(monkeypatch: pytest.MonkeyPatch) -> OnListing:
    """Return a function that sets what happens between the listing of a folder and the use of its entries."""

    def set_event(name: str, event: Callable[[], None]) -> None:
        def scan(folder: str) -> AbstractContextManager[list[os.DirEntry[str]]]:
            with os.scandir(folder) as found:
                entries = list(found)
            if Path(folder).name == name:
                event()
            return nullcontext(entries)

        monkeypatch.setattr(inputs, "os", types.SimpleNamespace(scandir=scan))

    return set_event


def fail(number: int) -> None:
    """Fail as a system call does."""
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT])
def test_a_subfolder_that_fails_once_is_scored_later(
    source: Path, tmp_path: Path, on_listing: OnListing, number: int
) -> None:
    """A subfolder that cannot be listed does not end the run, and a later run scores its images."""
    (source / "sub").mkdir()
    (source / "sub" / "a.png").write_bytes(plain(gradient(28)))
    on_listing("sub", lambda: fail(number))
    assert run(source, tmp_path / "out").not_scored == 1
    assert errors(tmp_path / "out")["sub"][0] == "unreadable-file"
    on_listing("sub", lambda: None)
    assert run(source, tmp_path / "out").new == 1
    assert errors(tmp_path / "out")["sub/a.png"] == (None, None)


@pytest.mark.parametrize(("name", "number"), [("in", errno.EACCES), ("sub", errno.EIO)])
def test_a_listing_that_fails_ends_the_run(
    source: Path, tmp_path: Path, on_listing: OnListing, name: str, number: int
) -> None:
    """If the input itself cannot be listed, or the disk fails, the run ends: a later run may read the images."""
    (source / "sub").mkdir()
    on_listing(name, lambda: fail(number))
    with pytest.raises(BulkError, match=f"the folder .*{name} cannot be listed: .*{os.strerror(number)}"):
        run(source, tmp_path / "out")


def test_a_file_that_is_removed_while_its_folder_is_listed_becomes_a_row(
    source: Path, tmp_path: Path, on_listing: OnListing
) -> None:
    """An archive, an array, a Parquet file or an image that is removed is a row; all other images are scored."""
    files = [source / name for name in ("a.tar", "b.zip", "c.npy", "d.parquet", "e.png")]
    for path in files:
        path.touch()
    on_listing("in", lambda: [path.unlink() for path in files] and None)
    summary = run(source, tmp_path / "out")
    assert (summary.normal + summary.anomalous, summary.not_scored) == (10, 5)
    found = errors(tmp_path / "out")
    for path in files:
        assert found[path.name][0] == "unreadable-file"


def test_two_runs_that_begin_together_have_one_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another run begins in the moment between the check and the description, this one is compared with it."""
    output = locate(str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    read, seen = Location.read, list[bytes | None]()

    def read_before_the_other(where: Location, name: str) -> bytes | None:
        seen.append(read(where, name))
        if len(seen) == 1:
            assert outputs.begin(output, {"alpha": 0.05}) is False
            return None
        return seen[-1]

    monkeypatch.setattr(Location, "read", read_before_the_other)
    with pytest.raises(BulkError, match=r"a run with alpha 0\.05, and this run has 0\.01"):
        outputs.begin(output, {"alpha": 0.01})


def test_a_signal_ends_a_run_that_skips_images(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run whose images all have rows ends at once, not after it has listed and read all units."""
    for number in range(6):
        np.save(source / f"{number}.npy", np.stack([gradient(28)] * 5))
    monkeypatch.setattr(inputs, "UNIT_IMAGES", 5)
    monkeypatch.setattr(inputs, "_UNIT_BYTES", 1)
    run(source, tmp_path / "out")
    wanted, asked = outputs.Done.wanted, list[int]()

    def interrupted(done: outputs.Done, ids: list[str]) -> list[bool]:
        asked.append(len(ids))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return wanted(done, ids)

    monkeypatch.setattr(outputs.Done, "wanted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(Request(str(source), str(tmp_path / "out"), MODEL_STORE, "zero-article", workers=2))
    assert len(asked) < 5
