"""The folder of the review queue: bounds, modes, several processes, faults."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.scoring.review import folder as module
from app.scoring.review.folder import Entry, ReviewError, ReviewFolder
from tests import model_stores
from tests.conftest import ROOT, unprivileged
from tests.waiting import wait_until


def entries(chosen: str, numbers: range, size: int = 100, model: str = "zero") -> list[Entry]:
    return [Entry(model, chosen, f"{number:044x}", b"p" * (size - 10), b"0123456789") for number in numbers]


def names(root: Path, group: str) -> list[int]:
    """Return the numbers of the complete images of a group."""
    folder = root / "queue" / group
    found = sorted(int(path.stem, 16) for path in folder.glob("*.json"))
    assert found == sorted(int(path.stem, 16) for path in folder.glob("*.png"))
    return found


def add(folder: ReviewFolder, chosen: str, numbers: range, **options: Any) -> None:
    """Add images, and check that all of them were written."""
    wanted = entries(chosen, numbers, **options)
    assert folder.add(wanted) == (wanted, None)


def size_of(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "queue").rglob("*") if path.is_file())


def test_only_the_user_can_read_the_images(tmp_path: Path) -> None:
    """Folders have mode 0700 and files have mode 0600, for any umask."""
    before = os.umask(0)
    try:
        add(ReviewFolder(tmp_path / "review", 10, 10_000), "near", range(1))
    finally:
        os.umask(before)
    for path in [tmp_path / "review", *(tmp_path / "review").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_oldest_image_of_the_largest_group_goes(tmp_path: Path) -> None:
    """A flood of anomalies replaces anomalies, not the few images that were drawn at random."""
    folder = ReviewFolder(tmp_path / "review", 10, 100_000)
    add(folder, "random", range(3))
    for start in range(100, 200, 20):
        add(folder, "anomalous", range(start, start + 20))
    assert names(tmp_path / "review", "zero/random") == [0, 1, 2]
    assert names(tmp_path / "review", "zero/anomalous") == list(range(193, 200))


def test_bytes_are_bounded(tmp_path: Path) -> None:
    """The files of the queue never have more bytes than the maximum."""
    folder = ReviewFolder(tmp_path / "review", 1000, 1000)
    for start in range(0, 40, 4):
        add(folder, "near", range(start, start + 4), size=150)
        assert size_of(tmp_path / "review") <= 1000
    assert names(tmp_path / "review", "zero/near") == list(range(34, 40))


def test_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """An image without a line, a line without an image and an unfinished file are removed and do not count."""
    folder = ReviewFolder(tmp_path / "review", 10, 10_000)
    folder.add(entries("near", range(1)))
    group = tmp_path / "review" / "queue" / "zero" / "near"
    for name in ("a.png", "b.json", "c.png.new"):
        (group / name).write_bytes(b"x")
    folder.add(entries("near", range(1, 2)))
    assert names(tmp_path / "review", "zero/near") == [0, 1]
    assert len(list(group.iterdir())) == 4


FILL = """
import itertools, pathlib, sys
from app.scoring.review.folder import Entry, ReviewFolder
folder = ReviewFolder(pathlib.Path(sys.argv[1]), 50, 100_000)
for start in itertools.count(0, 5):
    folder.add([Entry("zero", sys.argv[2], f"{start + n:044x}", b"p" * 90, b"0123456789") for n in range(5)])
"""


@pytest.mark.process
def test_processes_share_the_folder(tmp_path: Path) -> None:
    """Four processes that write at once and are killed leave complete images and no more than the maximum."""
    root = tmp_path / "review"
    groups = {f"group-{number}" for number in range(4)}
    processes = [subprocess.Popen([sys.executable, "-c", FILL, root, group], cwd=ROOT) for group in groups]
    try:
        wait_until(lambda: {path.parent.name for path in root.glob("queue/*/*/*.json")} == groups)
    finally:
        for process in processes:
            process.kill()
            process.wait(30)
    folder = ReviewFolder(root, 50, 100_000)
    add(folder, "last", range(1))
    complete = [names(root, f"zero/{path.name}") for path in (root / "queue" / "zero").iterdir()]
    assert sum(map(len, complete)) <= 50
    assert size_of(root) == 100 * sum(map(len, complete))


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    """A file that cannot be written completely is removed; the files before it and after it remain."""
    folder = ReviewFolder(tmp_path / "review", 10, 1_000_000)
    small, large = entries("near", range(2)), entries("near", range(2, 3), size=100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        written, error = folder.add([small[0], *large, small[1]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert written == small
    assert isinstance(error, OSError)
    assert names(tmp_path / "review", "zero/near") == [0, 1]
    assert len(list((tmp_path / "review" / "queue" / "zero" / "near").iterdir())) == 4


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_image_is_tried_after_the_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """After ENOSPC or EDQUOT, the other images of the window are dropped without further calls."""
    folder = ReviewFolder(tmp_path / "review", 10, 10_000)
    write, paths = module._write, []

    def fail_later(path: Path, content: bytes) -> None:
        paths.append(path)
        if len(paths) > 2:
            raise OSError(number, os.strerror(number))
        write(path, content)

    monkeypatch.setattr(module, "_write", fail_later)
    wanted = entries("near", range(3))
    written, error = folder.add(wanted)
    assert written == wanted[:1]
    assert error is not None and error.errno == number
    assert len(paths) == 3
    assert folder.name_of(error) is None


def test_entries_of_other_programs_are_ignored(tmp_path: Path) -> None:
    """Folders, links and files that the service did not write stay as they are, and do not prevent new images."""
    root = tmp_path / "review"
    folder = ReviewFolder(root, 3, 10_000)
    add(folder, "near", range(1))
    group = root / "queue" / "zero" / "near"
    for place in (group, group.parent, group.parent.parent):
        (place / "@eaDir" / "near").mkdir(parents=True)
        (place / "@eaDir" / "a.png").touch()
        (place / "@eaDir" / "near" / "a.png").touch()
        (place / "notes.txt").touch()
    (group / "folder.png").mkdir()
    (group / "folder.json").mkdir()
    for name in ("a.json", "a.png"):
        (group / name).symlink_to(tmp_path / "nowhere")
    (group / "unreadable.json").symlink_to(model_stores.UNREADABLE)
    before = set((root / "queue").rglob("*"))
    add(folder, "near", range(1, 6))
    assert {int(path.stem, 16) for path in group.glob("0*.png")} == {3, 4, 5}
    assert before - set((root / "queue").rglob("*")) == {group / f"{0:044x}{suffix}" for suffix in (".png", ".json")}


@pytest.mark.parametrize("place", ["zero", "zero/near"])
def test_links_are_not_followed(tmp_path: Path, place: str) -> None:
    """No file is removed from a folder behind a link or written to it, and other groups get their images."""
    root, elsewhere = tmp_path / "review", tmp_path / "elsewhere"
    folder = ReviewFolder(root, 10, 10_000)
    files = [elsewhere / "photo.png", elsewhere / "near" / "photo.png", elsewhere / "near" / "text.png.new"]
    (elsewhere / "near").mkdir(parents=True)
    for path in files:
        path.touch()
    link = root / "queue" / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(elsewhere if place == "zero" else elsewhere / "near")
    linked, others = entries("near", range(2)), entries("near", range(2, 4), model="other")
    written, error = folder.add([*linked, *others])
    assert written == others
    assert error is not None and error.errno == errno.ENOTDIR
    assert folder.name_of(error) == f"queue/{place}"
    assert sorted(path for path in elsewhere.rglob("*") if path.is_file()) == sorted(files)


def owned(root: Path) -> None:
    """Give a folder to the user of `unprivileged`. As another user, a test is that user already."""
    if os.geteuid() == 0:
        for path in (root, *root.rglob("*")):
            os.chown(path, 65534, 65534)


@pytest.fixture
def shared() -> Iterator[Path]:
    """Yield a folder that the user of `unprivileged` can reach: those of pytest have the mode 0700."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize(("place", "mode"), [("near", 0o300), ("near", 0o500), ("near", 0o000), ("", 0o000)])
def test_a_group_that_cannot_be_used_costs_its_own_images(shared: Path, place: str, mode: int) -> None:
    """If a group or a model cannot be listed, or not be written, all images of the other groups are written."""
    root = shared / "review"
    root.mkdir()
    owned(root)
    with unprivileged():
        folder = ReviewFolder(root, 10, 10_000)
        add(folder, "near", range(2))
        (root / "queue" / "zero" / place).chmod(mode)
        others = entries("random", range(4, 6), model="other")
        written, error = folder.add([*entries("near", range(2, 4)), *others])
        assert written == others
        assert error is not None and error.errno == errno.EACCES
        assert str(folder.name_of(error)).startswith("queue/zero/near")
        (root / "queue" / "zero" / place).chmod(0o700)
    assert names(root, "zero/near") == [0, 1]
    assert names(root, "other/random") == [4, 5]


@pytest.mark.parametrize("unlisted", range(4))
def test_a_group_that_cannot_be_listed_leaves_the_others_bounded(shared: Path, unlisted: int) -> None:
    """The images of all groups of a model that can be listed count."""
    root = shared / "review"
    root.mkdir()
    owned(root)
    groups = [f"group-{number}" for number in range(4)]
    with unprivileged():
        folder = ReviewFolder(root, 8, 10_000)
        for group in groups:
            add(folder, group, range(2))
        (root / "queue" / "zero" / groups.pop(unlisted)).chmod(0o000)
        add(folder, "near", range(10))
        assert sum(len(names(root, f"zero/{group}")) for group in [*groups, "near"]) == 8


def test_images_that_cannot_be_removed_count(shared: Path) -> None:
    """If the images of the largest group cannot be removed, those of the next group are replaced; the bound holds."""
    root = shared / "review"
    root.mkdir()
    owned(root)
    with unprivileged():
        folder = ReviewFolder(root, 5, 10_000)
        add(folder, "near", range(3))
        add(folder, "random", range(2))
        (root / "queue" / "zero" / "near").chmod(0o500)
        add(folder, "random", range(2, 6))
        (root / "queue" / "zero" / "random").chmod(0o500)
        written, error = folder.add(entries("anomalous", range(2)))
        assert (written, error and error.errno) == ([], errno.EACCES)
    assert names(root, "zero/near") == [0, 1, 2]
    assert names(root, "zero/random") == [4, 5]


def test_a_start_that_was_killed_does_not_prevent_the_next(tmp_path: Path) -> None:
    """The file of the check at the start may remain of a process that was killed."""
    (tmp_path / "review" / "queue").mkdir(parents=True)
    (tmp_path / "review" / "queue" / "start.new").touch()
    add(ReviewFolder(tmp_path / "review", 10, 10_000), "near", range(1))
    assert not (tmp_path / "review" / "queue" / "start.new").exists()


def test_a_deleted_folder_is_made_again(tmp_path: Path) -> None:
    """An operator may remove the queue while the service runs."""
    folder = ReviewFolder(tmp_path / "review", 10, 10_000)
    folder.add(entries("near", range(1)))
    (tmp_path / "review").rename(tmp_path / "moved")
    add(folder, "near", range(1, 2))
    assert names(tmp_path / "review", "zero/near") == [1]


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    """A file in its place, a missing parent, and a folder of another user are errors with one line."""
    (tmp_path / "file").touch()
    with pytest.raises(ReviewError, match=r"the folder of the review queue, .*file, cannot be used: Not a directory"):
        ReviewFolder(tmp_path / "file", 10, 10_000)
    with pytest.raises(ReviewError, match="No such file or directory"):
        ReviewFolder(tmp_path / "missing" / "review", 10, 10_000)
    if os.geteuid() == 0:
        ReviewFolder(tmp_path / "review", 10, 10_000)
        with unprivileged(), pytest.raises(ReviewError, match="Permission denied"):
            ReviewFolder(tmp_path / "review", 10, 10_000)
