"""Which files of a folder are images to train with: the rule of `anomaly score`, without subfolders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from anomaly.image_files import search
from app.models.manifest import STRICT
from tests.conftest import EXAMPLES
from training.commands.console import print_ignored
from training.data.dataset import DataError
from training.data.pictures import content_of, read_folder

NAMES = (
    "a.png", "B.PNG", "é.Png", "._a.png", ".DS_Store", ".hidden.png", "Thumbs.db", "desktop.ini", "Icon\r", "note.txt",
    "png", "a.png.part", "photo.jpg", "photo.HEIC", "empty.png",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with every kind of entry."""
    made = tmp_path / "photos"
    made.mkdir()
    for name in NAMES:
        (made / name).write_bytes(b"" if name == "empty.png" else (EXAMPLES / "zero.png").read_bytes())
    for name in ("deep", "named.png", "__MACOSX", ".cache"):
        (made / name).mkdir()
        (made / name / "inside.png").write_bytes(b"x")
    (made / "today").symlink_to(tmp_path)
    (made / "linked.png").symlink_to(EXAMPLES / "six.png")
    (made / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(made / "pipe.png")
    return made


def test_the_rule_is_that_of_the_command(folder: Path) -> None:
    """The images are the same, and the same entries are counted by the same kinds; only subfolders differ."""
    ours, theirs = content_of(folder, STRICT), search(folder)
    assert ours.images == [path for path in theirs.images if path.parent == folder]
    assert {path.name for path in ours.images} == {
        "a.png", "B.PNG", "é.Png", "empty.png", "linked.png", "gone.png",
    }  # fmt: skip
    counts = {kind.name: count for kind, count in ours.ignored.items()}
    assert counts.pop("FOLDER") == 2
    assert counts == {kind.name: count for kind, count in theirs.ignored.items()}


def test_one_line_counts_what_is_ignored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`train` and `calibrate` print one line per folder, and nothing for a folder of images only."""
    print_ignored(folder, None, EXAMPLES)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"{folder}: ignored 3 files that are not images, 2 images in other formats than PNG, ")
    assert "6 hidden or system files, 2 hidden or system folders, 1 named pipe or device, 2 subfolders, " in said
    assert said.endswith(f"1 link to a folder ({folder / 'today'})")


def test_macos_metadata_is_not_an_image(tmp_path: Path) -> None:
    """A folder that macOS has copied is read without its `._` files; an empty file and a dangling link are named."""
    (tmp_path / "zero.png").write_bytes((EXAMPLES / "zero.png").read_bytes())
    (tmp_path / "._zero.png").write_bytes(b"\x00\x05\x16\x07")
    found = read_folder(tmp_path, STRICT)
    assert (len(found.images), found.copies) == (1, 0)
    for name, make in BROKEN.items():
        make(tmp_path / name)
        words = "the link leads to a file that does not exist" if name == "gone.png" else ""
        with pytest.raises(DataError, match=f"{name}.*{words}"):
            read_folder(tmp_path, STRICT)
        (tmp_path / name).unlink()


BROKEN: dict[str, Callable[[Path], object]] = {
    "empty.png": lambda path: path.touch(),
    "gone.png": lambda path: path.symlink_to("nowhere.png"),
}
