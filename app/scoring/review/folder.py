"""The folder of the review queue, which several processes share.

    FOLDER/lock                              locked while files are added or removed
    FOLDER/queue/<model>/<chosen>/<id>.png   the pixels that the model scored
    FOLDER/queue/<model>/<chosen>/<id>.json  one line of JSON

The image is renamed into its place before its line, so an image with a line is complete. `anomaly review` moves
labelled images to FOLDER/labelled, which this module does not touch.

In the folder `queue`, these are not counted or removed: links, files with other endings, and files and folders whose
names do not begin with a letter or a digit.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_FOLDER_MODE, _FILE_MODE = 0o700, 0o600
_NEW = ".new"
_LEFTOVERS = (".png", ".json", f".png{_NEW}", f".json{_NEW}")
"""Endings of the files that a killed process leaves, if they are not a complete image."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


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

    def __init__(self) -> None:
        self.groups: dict[Path, list[_Stored]] = {}
        self.count = 0
        self.size = 0

    def include(self, group: Path, images: list[_Stored]) -> None:
        """Add a group with its images."""
        self.groups[group] = images
        self.count += len(images)
        self.size += sum(each.size for each in images)

    def add(self, stored: _Stored) -> None:
        """Add an image as the newest one of its group."""
        self.groups[stored.group].append(stored)
        self.count += 1
        self.size += stored.size

    def forget_oldest(self, group: Path) -> None:
        """Remove the oldest image of a group from the content."""
        self.count -= 1
        self.size -= self.groups[group].pop(0).size

    def by_size(self) -> list[Path]:
        """Return the groups that contain images, those with the most images first."""
        found = [group for group, images in self.groups.items() if images]
        return sorted(found, key=lambda group: len(self.groups[group]), reverse=True)


class ReviewFolder:
    """The folder of the review queue.

    If it is full, a new image replaces the oldest one of the group with the most images. A group is a model and the
    reason for choosing an image, so a flood of anomalies does not remove the images that were drawn at random. A group
    that cannot be listed does not count, and gets no images.

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
                (self._queue / f"start{_NEW}").unlink(missing_ok=True)  # of a process that was killed here
                _write(self._queue / f"start{_NEW}", b"")
                (self._queue / f"start{_NEW}").unlink()
        except OSError as error:
            raise ReviewError(f"the folder of the review queue, {root}, cannot be used: {error.strerror}") from error

    def add(self, entries: Sequence[Entry]) -> tuple[list[Entry], OSError | None]:
        """Write images. Return those that were written, and the first error.

        An image that cannot be written does not prevent the images after it, unless the disk is full.
        """
        written: list[Entry] = []
        first: OSError | None = None
        try:
            with self._locked():
                content = self._content()
                for entry in entries:
                    try:
                        self._add(content, entry)
                        written.append(entry)
                    except OSError as error:
                        first = first or error
                        if error.errno in _DISK_FULL:
                            break
        except OSError as error:
            first = first or error
        return written, first

    def name_of(self, error: OSError) -> str | None:
        """Return the path of the file of an error, relative to the folder; None if the error names no file."""
        return None if error.filename is None else os.path.relpath(os.fsdecode(error.filename), self._root)

    def _add(self, content: _Content, entry: Entry) -> None:
        size = len(entry.image) + len(entry.line)
        while content.count and (content.count >= self._max_images or content.size + size > self._max_bytes):
            _remove_oldest(content)
        group = _made_real(_made_real(self._queue / entry.model) / entry.chosen)
        if group not in content.groups:
            content.include(group, _stored(group))  # fails if the group cannot be listed: it would grow without limit
        image, line = group / f"{entry.id}.png", group / f"{entry.id}.json"
        for path, bytes_of_file in ((image, entry.image), (line, entry.line)):
            new = path.with_name(path.name + _NEW)
            try:
                _write(new, bytes_of_file)
                new.rename(path)
            except OSError:
                _discard(new)
                _discard(image)
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
        """Return the complete images of the groups that can be listed. The lock must be held."""
        content = _Content()
        for model in _folders(self._queue):
            with contextlib.suppress(OSError):
                for group in _folders(model):
                    with contextlib.suppress(OSError):
                        content.include(group, _stored(group))
        return content


def _folders(folder: Path) -> list[Path]:
    """Return the subfolders of a folder, without links to folders and folders of other programs.

    Names of models and reasons begin with a letter or a digit, those of other programs with `.` or `@`.
    """
    with os.scandir(folder) as found:
        own = [each for each in found if each.name[0].isalnum() and each.is_dir(follow_symlinks=False)]
        return [folder / each.name for each in own]


def _stored(group: Path) -> list[_Stored]:
    """Return the complete images of a group, oldest first. Files of a process that was killed are removed."""
    with os.scandir(group) as found:
        files = {each.name: each for each in found if each.name[0].isalnum() and each.is_file(follow_symlinks=False)}
    ids = {name[:-5] for name in files if name.endswith(".json") and f"{name[:-5]}.png" in files}
    for name in files.keys() - {f"{id}{suffix}" for id in ids for suffix in (".json", ".png")}:
        if name.endswith(_LEFTOVERS):
            _discard(group / name)
    stored: list[_Stored] = []
    for id in ids:
        line, image = files[f"{id}.json"].stat(), files[f"{id}.png"].stat()
        stored.append(_Stored(group, id, line.st_mtime_ns, line.st_size + image.st_size))
    return sorted(stored, key=lambda each: each.modified)


def _remove_oldest(content: _Content) -> None:
    """Remove the oldest image of the group with the most images, or of the next group if that is not possible."""
    errors: list[OSError] = []
    for group in content.by_size():
        oldest = content.groups[group][0]
        try:
            (group / f"{oldest.id}.json").unlink(missing_ok=True)
            (group / f"{oldest.id}.png").unlink(missing_ok=True)
        except OSError as error:
            errors.append(error)
        else:
            content.forget_oldest(group)
            return
    raise errors[0]


def _made(folder: Path) -> Path:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(_FOLDER_MODE)
    return folder


def _made_real(folder: Path) -> Path:
    """Create a folder. Raise `NotADirectoryError` for a link, because the folder behind it may have another purpose."""
    if not stat.S_ISDIR(_made(folder).lstat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
    return folder


def _write(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, _FILE_MODE), "wb") as file:
        file.write(content)


def _discard(path: Path) -> None:
    """Remove a leftover. If that fails, it is tried again when the group is listed the next time."""
    with contextlib.suppress(OSError):
        path.unlink()
