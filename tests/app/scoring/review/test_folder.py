"""The folder of the review queue: bounds, modes, several processes, faults."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from app.scoring.review.folder import Entry, ReviewError, ReviewFolder
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


def size_of(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "queue").rglob("*") if path.is_file())


def test_only_the_user_can_read_the_images(tmp_path: Path) -> None:
    """Folders have mode 0700 and files have mode 0600, for any umask."""
    before = os.umask(0)
    try:
        assert ReviewFolder(tmp_path / "review", 10, 10_000).add(entries("near", range(1))) == (1, None)
    finally:
        os.umask(before)
    for path in [tmp_path / "review", *(tmp_path / "review").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_oldest_image_of_the_largest_group_goes(tmp_path: Path) -> None:
    """A flood of anomalies replaces anomalies, not the few images that were drawn at random."""
    folder = ReviewFolder(tmp_path / "review", 10, 100_000)
    assert folder.add(entries("random", range(3))) == (3, None)
    for start in range(100, 200, 20):
        assert folder.add(entries("anomalous", range(start, start + 20))) == (20, None)
    assert names(tmp_path / "review", "zero/random") == [0, 1, 2]
    assert names(tmp_path / "review", "zero/anomalous") == list(range(193, 200))


def test_bytes_are_bounded(tmp_path: Path) -> None:
    """The files of the queue never have more bytes than the maximum."""
    folder = ReviewFolder(tmp_path / "review", 1000, 1000)
    for start in range(0, 40, 4):
        assert folder.add(entries("near", range(start, start + 4), size=150)) == (4, None)
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
    assert folder.add(entries("last", range(1))) == (1, None)
    complete = [names(root, f"zero/{path.name}") for path in (root / "queue" / "zero").iterdir()]
    assert sum(map(len, complete)) <= 50
    assert size_of(root) == 100 * sum(map(len, complete))


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    """A file that cannot be written completely is removed; files that were written before it remain."""
    folder = ReviewFolder(tmp_path / "review", 10, 1_000_000)
    small, large = entries("near", range(1)), entries("near", range(1, 2), size=100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        written, error = folder.add([*small, *large, *entries("near", range(2, 3))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert written == 1
    assert isinstance(error, OSError)
    assert names(tmp_path / "review", "zero/near") == [0]
    assert len(list((tmp_path / "review" / "queue" / "zero" / "near").iterdir())) == 2


def test_a_deleted_folder_is_made_again(tmp_path: Path) -> None:
    """An operator may remove the queue while the service runs."""
    folder = ReviewFolder(tmp_path / "review", 10, 10_000)
    folder.add(entries("near", range(1)))
    (tmp_path / "review").rename(tmp_path / "moved")
    assert folder.add(entries("near", range(1, 2))) == (1, None)
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
