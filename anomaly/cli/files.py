"""Which files a person means, and which have just arrived. Knows: folders. Does not know: what a score is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

STDIN = "-"


@dataclass(frozen=True)
class Source:
    """One image to score.

    Attributes:
        name: as it is shown.
        image: its file, or its bytes where they came through the standard input.
    """

    name: str
    image: Path | bytes


class FolderAway(Exception):
    """The folder that is watched is not there, or cannot be read."""


def sources(arguments: Iterable[str]) -> Iterator[Source]:
    """Yield what each argument means: a file, every PNG of a folder and its subfolders by name, or `-`."""
    for argument in arguments:
        path = Path(argument)
        if argument == STDIN:
            yield Source(STDIN, sys.stdin.buffer.read())
        elif _is(path.is_dir, otherwise=False):
            yield from (Source(str(found), found) for found in pngs(path))
        else:
            yield Source(argument, path)


def pngs(folder: Path) -> list[Path]:
    """Return the PNG files of a folder and its subfolders, sorted; hidden ones are left out.

    What cannot be looked at is among them, be it a folder: reading it says why.
    """
    found: list[Path] = []
    for where, folders, names in os.walk(folder, onerror=lambda error: found.append(Path(error.filename))):
        folders[:] = _shown(folders)
        files = (Path(where, name) for name in _shown(names) if name.lower().endswith(".png"))
        found.extend(path for path in files if _is(path.is_file, otherwise=True))
    return sorted(found)


def _shown(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def _is(kind: Callable[[], bool], *, otherwise: bool) -> bool:
    """Ask for the kind of a path; `otherwise` where it cannot be told."""
    try:
        return kind()
    except OSError:
        return otherwise


@dataclass
class Arrivals:
    """Finds the files of a folder that are new or changed, once they have stopped growing.

    Looks instead of being told, so that it works on network drives too. A file counts as whole when two looks in a
    row find the same size and time. A look begins behind the first file of the look before that was not done: one that
    cannot be scored does not keep the others waiting.

    Attributes:
        folder: where to look, subfolders included.
    """

    folder: Path
    _before: dict[Path, tuple[int, int]] = field(default_factory=dict)
    _done: dict[Path, tuple[int, int]] = field(default_factory=dict)
    _returned: list[Path] = field(default_factory=list)

    def pass_over(self) -> None:
        """Treat all that is there now as done.

        Raises:
            FolderAway: there is nothing to look at.
        """
        self._done = self._look()

    def look(self) -> list[Path]:
        """Return the files that are whole and not done, sorted, from the one on that is next.

        Raises:
            FolderAway: there is nothing to look at; what is done stays so.
        """
        now = self._look()
        ready = [path for path, mark in now.items() if self._before.get(path) == mark != self._done.get(path)]
        stuck = next((path for path in self._returned if self._done.get(path) != self._before[path]), None)
        if stuck is not None:
            ready.sort(key=lambda path: path <= stuck)
        # Of a folder that cannot be read for now, what is done stays done.
        self._done = {
            path: mark for path, mark in self._done.items() if path in now or not now.keys().isdisjoint(path.parents)
        }
        self._before, self._returned = now, ready
        return ready

    def done(self, path: Path) -> None:
        """Do not return this file again, unless it changes."""
        if path in self._before:
            self._done[path] = self._before[path]

    def _look(self) -> dict[Path, tuple[int, int]]:
        paths = pngs(self.folder)
        if self.folder in paths:
            raise FolderAway(f"{self.folder} is not there, or cannot be read")
        found = {}
        for path in paths:
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            except OSError:
                found[path] = (0, 0)
            else:
                found[path] = (status.st_mtime_ns, status.st_size)
        return found
