"""Find the images that the arguments of `anomaly score` name."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from anomaly.image_files import Found, search

STDIN = "-"


@dataclass(frozen=True)
class Source:
    """One image to score.

    Attributes:
        name: name in the results.
        image: path of the file, or the bytes from standard input.
    """

    name: str
    image: Path | bytes


def sources(arguments: Iterable[str]) -> tuple[list[Source], Found]:
    """Return the images that the arguments name, and what the folders among them contain.

    An argument is a file, a folder, or `-` for standard input. A file may have any suffix. A folder that cannot be
    listed is returned as an image, so that it becomes a result with the reason.
    """
    wanted: list[Source] = []
    total = Found()
    for argument in arguments:
        path = Path(argument)
        if argument == STDIN:
            wanted.append(Source(STDIN, sys.stdin.buffer.read()))
        elif _is_folder(path):
            found = search(path)
            wanted += (Source(str(each), each) for each in sorted(found.images + found.unreadable))
            total.add(found)
        else:
            wanted.append(Source(argument, path))
    return wanted, total


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False
