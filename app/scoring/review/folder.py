"""The folder of the review queue, which several processes share.

    FOLDER/lock                              locked while files are added or removed
    FOLDER/queue/<model>/<chosen>/<id>.png   the pixels that the model scored
    FOLDER/queue/<model>/<chosen>/<id>.json  one line of JSON

The image is renamed into its place before its line, so an image with a line is complete. `anomaly review` moves
labelled images to FOLDER/labelled, which this module does not touch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_FOLDER_MODE, _FILE_MODE = 0o700, 0o600
_NEW = ".new"


class ReviewError(Exception):
    """The folder of the review queue cannot be used."""


class Entry(NamedTuple):
    """An image to write.

    Attributes:
        model: its name.
        chosen: why the image was chosen.
        id: name of its files.
        image: PNG.
        line: one line of JSON.
    """

    model: str
    chosen: str
    id: str
    image: bytes
    line: bytes


class _Stored(NamedTuple):
    """An image in the folder: its group, its age and the bytes of both files."""

    group: Path
    id: str
    modified: int
    size: int


class _Content:
    """The images in the folder, by folder of their group, oldest first."""

    def __init__(self, groups: dict[Path, list[_Stored]]) -> None:
        self.groups = groups
        self.count = sum(map(len, groups.values()))
        self.size = sum(each.size for group in groups.values() for each in group)

    def add(self, stored: _Stored) -> None:
        self.groups.setdefault(stored.group, []).append(stored)
        self.count += 1
        self.size += stored.size

    def take_oldest(self) -> _Stored:
        """Remove and return the oldest image of the group with the most images."""
        found = max(self.groups.values(), key=len).pop(0)
        self.count -= 1
        self.size -= found.size
        return found


class ReviewFolder:
    """The folder of the review queue.

    If it is full, a new image replaces the oldest one of the group with the most images. A group is a model and the
    reason for choosing an image, so a flood of anomalies does not remove the images that were drawn at random.

    Args:
        root: the folder. It is created if its parent exists.
        max_images: maximum number of images in the queue.
        max_bytes: maximum number of bytes of their files.

    Raises:
        ReviewError: the folder cannot be created or written.
    """

    def __init__(self, root: Path, max_images: int, max_bytes: int) -> None:
        self._root = root.absolute()
        self._queue = self._root / "queue"
        self._max_images = max_images
        self._max_bytes = max_bytes
        try:
            with self._locked():
                self._queue.chmod(_FOLDER_MODE)  # fails if the folder belongs to another user
                _write(self._queue / f"start{_NEW}", b"")
                (self._queue / f"start{_NEW}").unlink()
        except OSError as error:
            raise ReviewError(f"the folder of the review queue, {root}, cannot be used: {error.strerror}") from error

    def add(self, entries: Sequence[Entry]) -> tuple[int, OSError | None]:
        """Write images. Return how many of them were written, and the error that prevented the others."""
        written = 0
        try:
            with self._locked():
                content = self._content()
                for entry in entries:
                    self._add(content, entry)
                    written += 1
        except OSError as error:
            return written, error
        return written, None

    def _add(self, content: _Content, entry: Entry) -> None:
        size = len(entry.image) + len(entry.line)
        while content.count and (content.count >= self._max_images or content.size + size > self._max_bytes):
            oldest = content.take_oldest()
            _unlink(oldest.group / f"{oldest.id}.json")
            _unlink(oldest.group / f"{oldest.id}.png")
        group = _made(_made(self._queue / entry.model) / entry.chosen)
        image, line = group / f"{entry.id}.png", group / f"{entry.id}.json"
        for path, bytes_of_file in ((image, entry.image), (line, entry.line)):
            new = path.with_name(path.name + _NEW)
            try:
                _write(new, bytes_of_file)
                new.rename(path)
            except OSError:
                _unlink(new)
                _unlink(image)
                raise
        content.add(_Stored(group, entry.id, 0, size))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder. The system releases the lock of a process that ends."""
        _made(self._root)
        _made(self._queue)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._root / "lock", flags, _FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _content(self) -> _Content:
        """Return the complete images. Files of a process that was killed are removed; the lock must be held."""
        groups: dict[Path, list[_Stored]] = {}
        for group in self._queue.glob("*/*/"):
            with os.scandir(group) as found:
                files = {each.name: each for each in found}
            ids = {name[:-5] for name in files if name.endswith(".json") and f"{name[:-5]}.png" in files}
            for name in files.keys() - {f"{id}{suffix}" for id in ids for suffix in (".json", ".png")}:
                _unlink(group / name)
            stored = groups[group] = []
            for id in ids:
                line, image = files[f"{id}.json"].stat(), files[f"{id}.png"].stat()
                stored.append(_Stored(group, id, line.st_mtime_ns, line.st_size + image.st_size))
            stored.sort(key=lambda each: each.modified)
        return _Content(groups)


def _made(folder: Path) -> Path:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(_FOLDER_MODE)
    return folder


def _write(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, _FILE_MODE), "wb") as file:
        file.write(content)


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
