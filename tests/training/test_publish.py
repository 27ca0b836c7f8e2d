"""The model store: atomic, concurrent and checked publishing."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from app.models.repository import Repository
from tests.training.conftest import ROOT, small_files
from training.publishing import publish
from training.publishing.files import PublishError, check_writable


@pytest.fixture
def store(tmp_path, draft) -> Path:
    """Return a model store with version 1, current."""
    draft.publish(tmp_path / "store", promote=True)
    return tmp_path / "store"


@pytest.fixture
def folder(tmp_path, draft) -> Path:
    """Return a folder with a finished version's files, less the pictures, for publishers in other processes."""
    for name in ("model.pt", "calibration.npy", "golden.npz", "report/model-card.md"):
        path, content = tmp_path / "finished" / name, draft.files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "finished" / "draft.json").write_text(draft.manifest.model_dump_json())
    return tmp_path / "finished"


def publisher(mode: str, store: Path, folder: Path) -> subprocess.Popen[str]:
    """Start a publisher in a separate process."""
    command = [sys.executable, "-m", "tests.training.publisher", mode, str(store), str(folder)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def listing(root: Path) -> list[str]:
    """Return everything below `root`, hidden things too."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_a_published_version_is_whole_and_waits(tmp_path, draft):
    """Publishing writes version 1 with every file and nothing else; it is current only after promotion."""
    manifest = draft.publish(tmp_path, promote=False)
    assert manifest.version == 1
    files = {path for path in listing(tmp_path / "small" / "1") if path != "report"}
    assert files == {*draft.files, "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert Repository(tmp_path).current("small") is None
    publish.promote(tmp_path, "small", 1)
    assert Repository(tmp_path).current("small") == 1


def test_numbers_go_up_and_are_never_used_twice(store, draft):
    """The next number is above every folder, even without a manifest, and above a deleted current version."""
    assert draft.publish(store, promote=False).version == 2
    (store / "small" / "7").mkdir()
    assert draft.publish(store, promote=False).version == 8
    assert Repository(store).current("small") == 1
    publish.promote(store, "small", 8)
    shutil.rmtree(store / "small" / "8")
    assert draft.publish(store, promote=False).version == 9
    (store / "small" / "CURRENT").write_text("none")
    assert draft.publish(store, promote=False).version == 10


def test_what_the_service_would_refuse_is_not_published(store, draft):
    """A version with wrong golden scores is rejected, and the store is unchanged."""
    before = listing(store)
    golden = draft.files["golden.npz"]
    with np.load(io.BytesIO(golden)) as arrays:
        wrong = {**arrays, "mse": arrays["mse"] * 1.01}
    buffer = io.BytesIO()
    np.savez(buffer, **wrong)
    with pytest.raises(PublishError, match="golden scores differ"):
        publish.publish(store, draft.manifest, {**draft.files, "golden.npz": buffer.getvalue()}, promote=True)
    assert listing(store) == before


@pytest.mark.parametrize("missing", ["model.pt", "calibration.npy", "golden.npz"])
def test_an_incomplete_version_is_not_published(store, draft, missing):
    """A version without a needed file is rejected, and the store is unchanged."""
    before = listing(store)
    files = {path: content for path, content in draft.files.items() if path != missing}
    with pytest.raises(PublishError, match=missing):
        publish.publish(store, draft.manifest, files, promote=True)
    assert listing(store) == before


def test_a_disk_without_room_leaves_the_store_as_it_was(store, draft):
    """The error for a full disk contains a path in the store, and no file of the version is left."""
    before = listing(store)
    with small_files(), pytest.raises(OSError, match="too large") as failed:
        draft.publish(store, promote=True)
    assert str(failed.value.filename).startswith(str(store))
    assert listing(store) == before


def test_a_store_that_cannot_be_written_is_found_out(store, tmp_path):
    """A writable or missing folder passes and is unchanged; a file in its place or a full disk is an error."""
    before = listing(tmp_path)
    check_writable(store, store / "other" / "deep", store / "small")
    assert listing(tmp_path) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match="file cannot be written: Not a directory"):
        check_writable(tmp_path / "file" / "store")
    with small_files(), pytest.raises(PublishError, match="store cannot be written: File too large"):
        check_writable(store)


def test_promotion_checks_first(store, draft):
    """Promoting a damaged or missing version fails, and the current version does not change."""
    draft.publish(store, promote=False)
    model = store / "small" / "2" / "model.pt"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(PublishError, match="SHA-256 differs"):
        publish.promote(store, "small", 2)
    with pytest.raises(PublishError, match="small has no version 3"):
        publish.promote(store, "small", 3)
    assert Repository(store).current("small") == 1


def test_rolling_back(store, draft):
    """Rollback chooses the highest version below the current one, or the named one if it is older."""
    for _ in range(2):
        draft.publish(store, promote=True)
    assert publish.rollback(store, "small") == 2
    publish.promote(store, "small", 3)
    assert publish.rollback(store, "small", to=1) == 1
    for to in (None, 3):
        with pytest.raises(PublishError, match="no version below"):
            publish.rollback(store, "small", to)
    publish.promote(store, "small", 2)
    with pytest.raises(PublishError, match="version 3 is not below"):
        publish.rollback(store, "small", to=3)
    assert Repository(store).current("small") == 2


def test_what_is_not_there_cannot_be_rolled_back(store, tmp_path):
    """An unknown model and a missing store are errors, and no folder is created."""
    with pytest.raises(PublishError, match="no version below"):
        publish.rollback(store, "other")
    with pytest.raises(PublishError, match="no model store"):
        publish.promote(tmp_path / "nowhere", "small", 1)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("file", ["report/model-card.md", "report/roc.png", "model.pt", "calibration.npy"])
def test_verify_reads_every_file(store, file):
    """A changed byte in any file of the manifest, also in the report, is an error."""
    path = store / "small" / "1" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(PublishError, match="small@1"):
        publish.verify(store, "small", 1)


def test_publishers_at_once_get_numbers_of_their_own(store, folder):
    """Two processes that publish at the same time make two valid versions."""
    running = [publisher("once", store, folder) for _ in range(2)]
    ended = [(process.communicate(timeout=120), process.returncode) for process in running]
    assert [code for _, code in ended] == [0, 0], ended
    assert sorted(int(out) for (out, _), _ in ended) == [2, 3]
    for version in (1, 2, 3):
        publish.verify(store, "small", version)


def test_a_kill_at_any_moment_leaves_the_store_as_it_was(store, folder):
    """After a kill at any moment the store is valid, and the next publisher deletes the leftovers.

    The current version is always the old one or the new one.
    """
    process = publisher("killed", store, folder)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    found = [json.loads(line) for line in out.splitlines()]
    killed, finished = found[:-1], found[-1]
    assert finished["status"] == 0
    assert len(killed) > 20
    seen = set()
    for each in killed:
        assert each["killed"], each
        seen.add((tuple(each["versions"]), each["current"], each["hidden"]))
        assert each["again"] == 0, each
        assert not each["after"]["hidden"], each
        assert each["after"]["versions"] == [*each["versions"], each["versions"][-1] + 1]
        assert each["after"]["current"] == each["current"]
    # Before anything is visible, without litter and with it; published but not promoted; promoted.
    waiting, published, promoted = ((1,), 1), ((1, 2), 1), ((1, 2), 2)
    assert seen == {
        (*waiting, False),
        (*waiting, True),
        (*published, True),
        (*published, False),
        (*promoted, False),
    }
