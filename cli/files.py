"""Which files a person means, and which have just arrived. Knows: folders. Does not know: what a score is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
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


def sources(arguments: Iterable[str]) -> Iterator[Source]:
    """Yield what each argument means: a file, every PNG of a folder and its subfolders by name, or `-`."""
    for argument in arguments:
        path = Path(argument)
        if argument == STDIN:
            yield Source(STDIN, sys.stdin.buffer.read())
        elif path.is_dir():
            yield from (Source(str(found), found) for found in pngs(path))
        else:
            yield Source(argument, path)


def pngs(folder: Path) -> list[Path]:
    """Return the PNG files of a folder and its subfolders, sorted; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() == ".png"
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


@dataclass
class Arrivals:
    """Finds the files of a folder that are new or changed, once they have stopped growing.

    Looks instead of being told, so that it works on network drives too. A file counts as whole when two looks in a
    row find the same size and time.

    Attributes:
        folder: where to look, subfolders included.
    """

    folder: Path
    _before: dict[Path, tuple[int, int]] = field(default_factory=dict)
    _done: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def pass_over(self) -> None:
        """Treat all that is there now as done."""
        self._done = self._look()

    def look(self) -> list[Path]:
        """Return the files that are whole and not done, sorted."""
        now = self._look()
        ready = [path for path, mark in now.items() if self._before.get(path) == mark != self._done.get(path)]
        self._done = {path: mark for path, mark in self._done.items() if path in now}
        self._before = now
        return ready

    def done(self, path: Path) -> None:
        """Do not return this file again, unless it changes."""
        if path in self._before:
            self._done[path] = self._before[path]

    def _look(self) -> dict[Path, tuple[int, int]]:
        found = {}
        for path in pngs(self.folder):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found[path] = (status.st_mtime_ns, status.st_size)
        return found
