"""`anomaly review`: labels by keyboard, CSV file and contact sheet; the folders are read by `calibrate` and `train`."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import stat
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest

from anomaly.cli import reviewing
from app.models.manifest import Preparation
from app.models.repository import Repository
from app.scoring.review.folder import ReviewFolder
from app.scoring.review.queue import ReviewQueue
from app.scoring.verdict import Verdict
from app.telemetry.metrics import Metrics
from tests import model_stores
from tests.cli.conftest import Anomaly, environment
from tests.conftest import MODEL_STORE, ROOT
from tests.waiting import wait_until
from training.data.loaders import mnist_sample
from training.data.pictures import read_folder

ABOVE, NEAR, NORMAL = Verdict(9.0, 0.001, True, None), Verdict(0.0, 0.02, False, None), Verdict(0.0, 0.9, False, None)


def zeros(count: int) -> np.ndarray:
    """Return real zeros, uint8 [count, 28, 28]."""
    sample = mnist_sample()
    return sample.images[sample.labels == 0][:count]


def fill(root: Path, images: np.ndarray, verdict: Verdict, *, share: float = 0.0, model: str = "zero-article") -> None:
    """Write images to the queue, as the service does."""
    manifest = Repository(MODEL_STORE).manifest(model, 1)
    for part in range(0, len(images), 20):
        queue = ReviewQueue(ReviewFolder(root, 1000, 10**8), Metrics(), share=share, near=3)
        for image in images[part : part + 20]:
            queue.offer(manifest, image.tobytes(), verdict)
        assert queue.close(30)


@pytest.fixture
def review(tmp_path: Path) -> Path:
    """Return a review folder with two images of each kind."""
    images = zeros(6)
    for verdict, share, part in ((NORMAL, 1.0, images[:2]), (ABOVE, 0.0, images[2:4]), (NEAR, 0.0, images[4:])):
        fill(tmp_path / "review", part, verdict, share=share)
    return tmp_path / "review"


def ids(review: Path, chosen: str) -> list[str]:
    return sorted(path.stem for path in review.glob(f"queue/*/{chosen}/*.png"))


def ids_as_shown(review: Path, chosen: str) -> list[str]:
    """Return the ids by the time of their lines: two images of one millisecond may have their ids in another order."""
    paths = review.glob(f"queue/*/{chosen}/*.json")
    return [path.stem for path in sorted(paths, key=lambda path: (json.loads(path.read_text())["time"], path.stem))]


def content(review: Path) -> dict[str, list[str]]:
    """Return the ids of the labelled images by folder."""
    folders = sorted({path.parent.name for path in review.glob("labelled/*/*/*.png")})
    found = {name: sorted(path.stem for path in review.glob(f"labelled/*/{name}/*.png")) for name in folders}
    lines = sorted(path.stem for path in review.glob("labelled/*/lines/*.json"))
    assert lines == sorted(id for each in found.values() for id in each)
    return found


def csv_of(tmp_path: Path, **labels: list[str]) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text("id,label\n" + "".join(f"{id},{label}\n" for label, each in labels.items() for id in each))
    return path


def test_labels_of_a_file_are_applied_once(review: Path, tmp_path: Path, in_process: Anomaly) -> None:
    """A second run changes nothing; a changed label moves an image; normal images chosen by score are kept apart."""
    drawn, above, near = (ids(review, chosen) for chosen in ("random", "anomalous", "near"))
    labels = csv_of(tmp_path, normal=[*drawn, above[0], near[0]], anomalous=[above[1]])
    for _ in range(2):
        done = in_process("review", review, "--labels", labels)
        assert done.returncode == 0, done.stderr
        expected = {"normal": drawn, "normal-selected": sorted([above[0], near[0]]), "anomalous": [above[1]]}
        assert content(review) == expected
        assert "normal 2, normal-selected 2, anomalous 1" in done.stderr
        assert "1 images are left" in done.stderr
    assert in_process("review", review, "--labels", csv_of(tmp_path, anomalous=[drawn[0]])).returncode == 0
    assert content(review) == {**expected, "normal": drawn[1:], "anomalous": sorted([above[1], drawn[0]])}
    for path in (review / "labelled").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("step", ["rename", "unlink"])
def test_a_review_that_is_killed_loses_no_image(
    review: Path, tmp_path: Path, in_process: Anomaly, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Wherever the process ends, the image has its old or its new place, and the same file can be applied again."""
    [first, *_] = ids(review, "random")
    labels = csv_of(tmp_path, normal=[first])
    before = (review / "queue" / "zero-article" / "random" / f"{first}.json").read_bytes()

    def end(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(Path, step, end)
        folder = reviewing.ReviewFolder(review)
        [item] = [item for item in folder.pending() if item.id == first]
        folder.label(item, "normal")
    done = in_process("review", review, "--labels", labels)
    assert (done.returncode, done.stderr) == (0, done.stderr)
    [labelled] = reviewing.ReviewFolder(review).labelled()
    assert (labelled.id, labelled.folder) == (first, "normal")
    assert labelled.line_path.read_bytes() == before
    assert stat.S_IMODE(labelled.line_path.stat().st_mode) == 0o600


def test_a_file_of_labels_with_errors_is_explained(review: Path, tmp_path: Path, in_process: Anomaly) -> None:
    """Unknown ids and labels are errors with exit code 2; the known ids are labelled, and no path leaves the folder."""
    drawn = ids(review, "random")
    done = in_process("review", review, "--labels", csv_of(tmp_path, normal=[*drawn, "../../x"]))
    assert done.returncode == 2
    assert "1 of 3 ids are not in the folder, for example ../../x" in done.stderr
    assert content(review) == {"normal": drawn}
    for text, words in (
        ("id,label\na,bad\n", "labels.csv:2: the label is 'bad'; write normal or anomalous"),
        ("name\na\n", "the first line of {path} is not `id,label`, separated by a comma"),
        ("id;label\na;normal\n", "the first line of {path} is not `id,label`, separated by a comma"),
        ("label,id\nnormal\n", "labels.csv:2: the id is missing"),
        ("id, label\n,normal\n", "labels.csv:2: the id is missing"),
        ("id,label\na,normal\na,anomalous\n", "labels.csv:3: the image a has another label in an earlier line"),
        ("id,label\na,normal\0\n".encode("utf-16"), "is not text in UTF-8"),
    ):
        (tmp_path / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        done = in_process("review", review, "--labels", tmp_path / "labels.csv")
        assert (done.returncode, done.stdout) == (2, "")
        assert words.format(path=tmp_path / "labels.csv") in done.stderr
    for arguments, words in (
        ((tmp_path,), "is not a review folder"),
        ((review, "--model", "seven"), "has no image of the model seven"),
        ((review, "--labels", tmp_path / "none.csv"), "none.csv cannot be read: No such file or directory\n"),
        ((review, "--sheet", tmp_path / "none" / "sheet.html"), "none/sheet.html: No such file or directory\n"),
        ((review,), "there is no terminal for the keyboard"),
    ):
        done = in_process("review", *arguments)
        assert done.returncode == 2
        assert words in done.stderr


def test_an_empty_queue_needs_no_sheet(review: Path, tmp_path: Path, in_process: Anomaly) -> None:
    """Once all images are labelled, no contact sheet is written."""
    every = [id for reason in ("random", "anomalous", "near") for id in ids(review, reason)]
    in_process("review", review, "--labels", csv_of(tmp_path, normal=every))
    done = in_process("review", review, "--sheet", tmp_path / "sheet.html")
    assert (done.returncode, done.stderr) == (0, "no image waits for a label; no contact sheet was written\n")
    assert not (tmp_path / "sheet.html").exists()


def test_the_sheet_shows_all_images(review: Path, tmp_path: Path, in_process: Anomaly) -> None:
    """The contact sheet contains each image without a label and its id, and nothing from another address."""
    drawn = ids(review, "random")
    in_process("review", review, "--labels", csv_of(tmp_path, normal=drawn))
    done = in_process("review", review, "--sheet", tmp_path / "sheet.html")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "sheet.html").read_text()
    assert stat.S_IMODE((tmp_path / "sheet.html").stat().st_mode) == 0o600
    assert sorted(re.findall(r"<code>(\w+)</code>", text)) == sorted(ids(review, "anomalous") + ids(review, "near"))
    assert not set(drawn) & set(re.findall(r"\w+", text))
    assert "://" not in text


def test_only_images_of_one_model_are_shown(review: Path, tmp_path: Path, in_process: Anomaly) -> None:
    """--model leaves the images of other models out."""
    fill(review, zeros(1), ABOVE, model="zero")
    in_process("review", review, "--model", "zero", "--sheet", tmp_path / "sheet.html")
    assert (tmp_path / "sheet.html").read_text().count("<legend>") == 1


@pytest.mark.process
def test_the_keyboard_labels_image_by_image(review: Path) -> None:
    """One key labels, skips, takes back or ends; a second run shows the images without a label."""
    drawn, above, near = (ids_as_shown(review, chosen) for chosen in ("random", "anomalous", "near"))
    shown = by_keyboard(review, "nunnasnq")
    assert "1 of 6" in shown
    assert "▀" in shown
    assert content(review) == {"anomalous": [above[0]], "normal": sorted(drawn), "normal-selected": [near[0]]}
    assert "1 of 2" in by_keyboard(review, "aa")
    assert content(review)["anomalous"] == sorted([*above, near[1]])
    assert "0 images are left" in by_keyboard(review, "")


def by_keyboard(review: Path, keys: str) -> str:
    """Run the command on a terminal, press a key at each image, and return what it has written."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "anomaly.cli", "review", str(review)],
        cwd=ROOT, env=environment(TERM="xterm-256color"), stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    for number, key in enumerate(keys, start=1):
        while written.count(b"q quit") < number:
            written += os.read(ours, 65536)
        # The command discards what was typed before it waits for a key.
        wait_until(lambda: not termios.tcgetattr(ours)[3] & termios.ICANON)
        os.write(ours, key.encode())
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError as error:  # the other end of the terminal is closed
        assert error.errno == errno.EIO
    os.close(ours)
    assert process.wait(30) == 0, written.decode()
    return written.decode()


@pytest.mark.process
def test_training_reads_the_folders(tmp_path: Path, in_process: Anomaly) -> None:
    """A threshold is chosen from the labelled images of a version that prepares its images, without a second time."""
    images = zeros(60)
    fill(tmp_path / "review", images, NORMAL, share=1.0)
    fill(tmp_path / "review", np.flip(images[:3], 2), ABOVE)
    labels = csv_of(tmp_path, normal=ids(tmp_path / "review", "random"))
    assert in_process("review", tmp_path / "review", "--labels", labels).returncode == 0
    folder = tmp_path / "review" / "labelled" / "zero-article" / "normal"
    store = model_stores.copy(tmp_path / "store", 1)
    preparation = Preparation(fit="resize", invert=True)
    model_stores.change(store / "zero-article" / "1", preparation=preparation.model_dump())
    done = in_process("calibrate", "zero-article", "--data-dir", folder, "--alpha", "0.05", "--model-store", store)
    assert done.returncode == 0, done.stderr
    made = json.loads((store / "zero-article" / "2" / "manifest.json").read_text())
    assert made["calibration"]["n"] == len(images)
    assert made["preparation"]["fit"] == "resize"
    found = read_folder(folder, preparation)
    assert sorted(image.tobytes() for image in found.images) == sorted(image.tobytes() for image in images)
