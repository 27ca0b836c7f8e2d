"""The folder of the review queue: the images that wait for a label, and the folders of labelled images.

    FOLDER/queue/<model>/<chosen>/<id>.png, .json    written by the service
    FOLDER/labelled/<model>/normal/<id>.png          normal images that were drawn at random
    FOLDER/labelled/<model>/normal-selected/<id>.png normal images that were chosen because of their scores
    FOLDER/labelled/<model>/anomalous/<id>.png       anomalous images
    FOLDER/labelled/<model>/lines/<id>.json          what the service wrote about each of them

Normal images that were chosen because of their scores are not representative: a threshold chosen from them would be
too high. They are therefore kept apart. The folder that contains an image is its label; no other file does.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Label = Literal["normal", "anomalous"]
LABELS: tuple[Label, ...] = ("normal", "anomalous")
FOLDERS = ("normal", "normal-selected", "anomalous")
"""Folders of labelled images."""
_ORDER = {"random": 0, "anomalous": 1, "near": 2}
"""Images that were drawn at random come first: a threshold needs many of them."""


class ReviewFolderError(Exception):
    """The folder or the file of labels cannot be used."""


@dataclass(frozen=True)
class Item:
    """An image of the review folder.

    Attributes:
        path: of the PNG.
        line: what the service wrote about it.
        line_path: of the file with the line.
        folder: the folder of labelled images that contains it; None in the queue.
    """

    path: Path
    line: dict[str, Any]
    line_path: Path
    folder: str | None = None

    @property
    def id(self) -> str:
        """Name of its files."""
        return self.path.stem

    @property
    def model(self) -> str:
        """Name of the model that scored it."""
        return self.path.parent.parent.name

    @property
    def chosen(self) -> str:
        """Why the service wrote it: `random`, `anomalous` or `near`."""
        return str(self.line.get("chosen", ""))

    def folder_for(self, label: Label) -> str:
        """Return the folder of labelled images for a label."""
        return "normal-selected" if label == "normal" and self.chosen != "random" else label


class ReviewFolder:
    """The folder that the setting `ANOMALY_REVIEW_DIR` names.

    Args:
        root: the folder.
        model: only images of this model. Default: all.

    Raises:
        ReviewFolderError: it is not such a folder.
    """

    def __init__(self, root: Path, model: str | None = None) -> None:
        self.root = root
        self._model = model
        if not (root / "queue").is_dir():
            raise ReviewFolderError(
                f"{root} is not a review folder: it has no folder `queue`; give the folder of ANOMALY_REVIEW_DIR"
            )

    def pending(self) -> list[Item]:
        """Return the images without a label: by model, those drawn at random first, the oldest first."""
        found = (_item(path.with_suffix(".png"), path) for path in self.root.glob("queue/*/*/*.json"))
        return sorted(
            (item for item in found if item and self._wanted(item)),
            key=lambda item: (item.model, _ORDER.get(item.chosen, 3), str(item.line.get("time")), item.id),
        )

    def labelled(self) -> list[Item]:
        """Return the images with a label."""
        found = (
            _item(path, path.parent.parent / "lines" / f"{path.stem}.json", folder)
            for folder in FOLDERS
            for path in self.root.glob(f"labelled/*/{folder}/*.png")
        )
        return [item for item in found if item and self._wanted(item)]

    def label(self, item: Item, label: Label) -> Item | None:
        """Move an image to the folder of its label. Return it there; None if it is no longer in its place."""
        folder = item.folder_for(label)
        of_model = self.root / "labelled" / item.model
        labelled = Item(of_model / folder / item.path.name, item.line, of_model / "lines" / f"{item.id}.json", folder)
        return labelled if self.move(item, labelled) else None

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the number of labelled images by model and folder."""
        found: dict[str, dict[str, int]] = {}
        for item in self.labelled():
            of_model = found.setdefault(item.model, dict.fromkeys(FOLDERS, 0))
            of_model[str(item.folder)] += 1
        return found

    def _wanted(self, item: Item) -> bool:
        return self._model in (None, item.model)

    def move(self, item: Item, to: Item) -> bool:
        """Move an image and its line to the places of `to`. Return False if the image is no longer in its place."""
        _make(to.path.parent, self.root)
        _make(to.line_path.parent, self.root)
        moves_line = item.line_path != to.line_path  # not between two labels
        with self._locked():
            try:
                # The line is in both places while the image moves: an image without its line would not be found.
                if moves_line:
                    shutil.copy(item.line_path, to.line_path)
                item.path.rename(to.path)
            except FileNotFoundError:  # the service has replaced the image, or another review has labelled it
                return False
            if moves_line:
                item.line_path.unlink()
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder, so that the service does not take a half-moved image for a damaged one."""
        try:
            import fcntl
        except ImportError:  # pragma: no cover - Windows, where the service does not run
            yield
            return
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def read_labels(path: Path) -> dict[str, Label]:
    """Read a CSV file with the columns `id` and `label`. Rows with an empty label are left out.

    Raises:
        ReviewFolderError: the file cannot be read, lacks a column or an id, contains another label, or two labels for
            one image.
    """
    found: dict[str, Label] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
            if not {"id", "label"} <= set(rows.fieldnames):
                raise ReviewFolderError(f"the first line of {path} is not `id,label`, separated by a comma")
            for row in rows:
                _add(found, row, f"{path}:{rows.line_num}")
    except OSError as error:
        raise ReviewFolderError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ReviewFolderError(f"{path} is not text in UTF-8; save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise ReviewFolderError(f"{path} cannot be read: {error}") from error
    return found


def _add(found: dict[str, Label], row: dict[str, str | None], place: str) -> None:
    """Add the label of one row. Raise `ReviewFolderError`, which names the place, if it has none that can be used."""
    id, text = ((row[name] or "").strip() for name in ("id", "label"))
    if not text:
        return
    label = next((each for each in LABELS if each == text), None)
    if label is None:
        raise ReviewFolderError(f"{place}: the label is {text!r}; write normal or anomalous")
    if not id:
        raise ReviewFolderError(f"{place}: the id is missing")
    if found.setdefault(id, label) != label:
        raise ReviewFolderError(f"{place}: the image {id} has another label in an earlier line")


def _item(path: Path, line_path: Path, folder: str | None = None) -> Item | None:
    try:
        line = json.loads(line_path.read_bytes())
    except (OSError, ValueError):
        return None
    return Item(path, line, line_path, folder) if isinstance(line, dict) and path.is_file() else None


def _make(folder: Path, root: Path) -> None:
    """Create a folder and its parents below `root`, only for this user."""
    for part in [*reversed(folder.relative_to(root).parents), folder.relative_to(root)]:
        (root / part).mkdir(0o700, exist_ok=True)
