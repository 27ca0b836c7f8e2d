"""Which files of a folder are scored, and what the command reports about the others."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anomaly.cli.signals import StopFlag
from anomaly.cli.watching import Arrivals
from anomaly.image_files import Kind, kind_of_name, search
from tests.cli.conftest import Anomaly
from tests.conftest import MODEL_STORE, ROOT

STORE = ("--model-store", MODEL_STORE)
IGNORED = {
    Kind.OTHER: ["note.txt", "data.csv", "png", "a.png.part", "noext"],
    Kind.OTHER_FORMAT: ["a.jpg", "b.JPEG", "c.webp"],
    Kind.HIDDEN: ["._x.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".a.png", "deep/._y.png"],
    Kind.HIDDEN_FOLDER: ["__MACOSX/x.png", ".cache/c.png", "deep/@eaDir/d.png"],
}
SCORED = ["A.PNG", "b.png", "deep/er/c.Png", "empty.png", "gone.png", "linked.png", "named.png/inside.png", "é.png"]


@pytest.fixture
def folder(tmp_path: Path, zero: bytes) -> Path:
    """Return a folder with every kind of entry."""
    folder = tmp_path / "photos"
    for name in [*(name for names in IGNORED.values() for name in names), *SCORED]:
        if name not in {"gone.png", "linked.png"}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"" if name == "empty.png" else zero)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(zero)
    (folder / "today").symlink_to(tmp_path / "data")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "linked.png").symlink_to(tmp_path / "data" / "a.png")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    return folder


def test_the_rule(folder: Path) -> None:
    """PNG names are images, in any case of letters; everything else is counted by its kind."""
    found = search(folder)
    assert found.images == sorted(folder / name for name in SCORED)
    assert found.ignored == {
        **{kind: len(names) for kind, names in IGNORED.items()}, Kind.LINKED_FOLDER: 2, Kind.SPECIAL: 1,
    }  # fmt: skip
    assert found.links == [folder / "loop", folder / "today"]
    assert found.unreadable == []


def test_the_rule_for_names() -> None:
    """The rule for a name alone is the rule for the files of a folder."""
    for kind in (Kind.OTHER, Kind.OTHER_FORMAT, Kind.HIDDEN):
        assert {kind_of_name(Path(name).name) for name in IGNORED[kind]} == {kind}
    assert {kind_of_name(Path(name).name) for name in SCORED} == {None}


def test_the_rule_has_no_dependencies() -> None:
    """The module imports the standard library only."""
    tree = ast.parse((ROOT / "anomaly" / "image_files.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_watch_has_the_same_rule(folder: Path) -> None:
    """`watch` finds the images that `score` finds."""
    arrivals = Arrivals(folder)
    arrivals.poll()
    assert sorted(arrivals.poll()) == search(folder).images
    assert arrivals.found.ignored == search(folder).ignored


def test_ignored_files_are_one_line(in_process: Anomaly, folder: Path) -> None:
    """One line on the error stream counts the ignored entries by kind and names the linked folders."""
    done = in_process("score", folder, *STORE, "-f", "jsonl")
    ignored = [line for line in done.stderr.splitlines() if "ignored" in line]
    assert ignored == [
        "ignored 5 files that are not images, 3 images in other formats than PNG, 6 hidden or system files, "
        "3 hidden or system folders, 1 named pipe or device, "
        f"2 links to folders ({folder / 'loop'}, {folder / 'today'})"
    ]
    results = {Path(each["file"]).name: each for each in map(json.loads, done.stdout.splitlines())}
    assert len(results) == len(SCORED)
    assert {name for name, each in results.items() if "problem" in each} == {"empty.png", "gone.png"}
    assert "the link leads to a file that does not exist" in results["gone.png"]["problem"]["title"]
    assert "is empty" in results["empty.png"]["problem"]["title"]
    assert done.returncode == 2


def test_a_thousand_ignored_files_are_one_line(run: Callable[..., int], tmp_path: Path, zero: bytes,
                                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """The line is no longer for many files; a folder without ignored files has no line."""
    (tmp_path / "a.png").write_bytes(zero)
    assert run("score", tmp_path) == 0
    assert capsys.readouterr().err == ""
    for number in range(300):
        (tmp_path / f"{number}.txt").touch()
    assert run("score", tmp_path) == 0
    assert capsys.readouterr().err == "ignored 300 files that are not images\n"


def test_a_folder_without_images_says_what_it_has(run: Callable[..., int], tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """A folder of JPEG files is an error that mentions them."""
    (tmp_path / "a.jpg").touch()
    assert run("score", tmp_path) == 2
    said = capsys.readouterr().err
    assert "ignored 1 image in another format than PNG" in said
    assert "there is no PNG file" in said


def test_a_file_that_is_named_is_scored(in_process: Anomaly, tmp_path: Path, zero: bytes) -> None:
    """The rule is for folders: a file that is an argument is scored, whatever its name is."""
    (tmp_path / ".hidden").write_bytes(zero)
    assert in_process("score", tmp_path / ".hidden", *STORE).returncode == 0


def test_watch_reports_a_kind_once(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`watch` writes the line about ignored files at its start, and again only when a new kind of them arrives."""
    (tmp_path / "a.txt").touch()
    arriving = iter(["b.txt", "c.jpg", "d.jpg", None])

    def wait(stop: StopFlag, _: float) -> None:
        name = next(arriving)
        if name is None:
            stop.set()
        else:
            (tmp_path / name).touch()

    monkeypatch.setattr(StopFlag, "wait", wait)
    assert run("watch", tmp_path) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "ignored" in line] == [
        "ignored 1 file that is not an image",
        "ignored 2 files that are not images, 1 image in another format than PNG",
    ]
