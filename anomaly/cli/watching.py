"""Find the images that arrive in a folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from anomaly.image_files import PNG_ONLY, Found, search

Mark = tuple[int, int]
"""Modification time in nanoseconds and size in bytes."""


class FolderAway(Exception):
    """The watched folder does not exist or cannot be read."""


@dataclass
class Arrivals:
    """Finds new and changed images of a folder once they are completely written.

    Polls the folder, because network file systems send no notifications. A file is complete when two polls in a row
    find the same size and modification time. Each poll starts after the first file that the last one returned and that
    was not done, so a file that cannot be scored does not block the others.

    Attributes:
        folder: watched folder, subfolders included.
        suffixes: suffixes of the images.
        found: content of the folder at the last poll.
    """

    folder: Path
    suffixes: frozenset[str] = PNG_ONLY
    found: Found = field(default_factory=Found)
    _before: dict[Path, Mark] = field(default_factory=dict)
    _done: dict[Path, Mark] = field(default_factory=dict)
    _returned: list[Path] = field(default_factory=list)

    def skip_present(self) -> None:
        """Treat all images that are in the folder now as done.

        Raises:
            FolderAway: the folder cannot be listed.
        """
        self._done = self._marks()

    def poll(self) -> list[Path]:
        """Return the complete images that are not done, sorted, starting with the one that is due.

        Raises:
            FolderAway: the folder cannot be listed; images that are done remain marked as done.
        """
        now = self._marks()
        ready = [path for path, mark in now.items() if self._before.get(path) == mark != self._done.get(path)]
        stuck = next((path for path in self._returned if self._done.get(path) != self._before[path]), None)
        if stuck is not None:
            ready.sort(key=lambda path: path <= stuck)
        # Images in a subfolder that cannot be listed at the moment stay done.
        self._done = {
            path: mark for path, mark in self._done.items() if path in now or not now.keys().isdisjoint(path.parents)
        }
        self._before, self._returned = now, ready
        return ready

    def mark_done(self, path: Path) -> None:
        """Do not return this image again unless it changes."""
        if path in self._before:
            self._done[path] = self._before[path]

    def _marks(self) -> dict[Path, Mark]:
        found = search(self.folder, self.suffixes)
        if self.folder in found.unreadable:
            raise FolderAway(f"the folder {self.folder} does not exist or cannot be read")
        self.found = found
        marks: dict[Path, Mark] = {}
        for path in sorted(found.images + found.unreadable):
            try:
                status = path.stat()
            except FileNotFoundError:
                if path.is_symlink():
                    marks[path] = (0, 0)
            except OSError:
                marks[path] = (0, 0)
            else:
                # The time of a folder changes with its content, which cannot be read.
                marks[path] = (0, 0) if path in found.unreadable else (status.st_mtime_ns, status.st_size)
        return marks
