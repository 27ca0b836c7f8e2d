"""The rule that decides which files of a folder are images, to score and to train with.

Imports the standard library only.

An image is a file that is named `*.png`, in upper or lower case; if images are prepared, also `*.jpg`, `*.jpeg` and
`*.webp`. Ignored are:

* hidden files and folders (`.DS_Store`, `._a.png`) and those of the system (`Thumbs.db`, `__MACOSX`),
* symbolic links to folders, because a link may lead in a circle,
* everything that is not a file, such as a named pipe,
* all files with another suffix.

A folder may have any name, `a.png` too. An empty file and a link to a file that does not exist count as images, so that
they are reported and not lost.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

PNG_ONLY = frozenset((".png",))
"""Suffixes of images that are used as they are."""
PREPARED = PNG_ONLY | {".jpg", ".jpeg", ".webp"}
"""Suffixes of images that are prepared before they are used."""
_OTHER_FORMATS = frozenset(
    (".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".jxl", ".tif", ".tiff", ".webp")
)  # fmt: skip
_SYSTEM = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin", "lost+found",
     "system volume information")
)  # fmt: skip
_NAMED_LINKS = 3
"""Maximum number of links that the summary names."""


class Kind(Enum):
    """Why an entry of a folder is ignored; the value is its name in the singular and in the plural."""

    OTHER = ("file that is not an image", "files that are not images")
    OTHER_FORMAT = ("image in another format than PNG", "images in other formats than PNG")
    HIDDEN = ("hidden or system file", "hidden or system files")
    HIDDEN_FOLDER = ("hidden or system folder", "hidden or system folders")
    SPECIAL = ("named pipe or device", "named pipes or devices")
    FOLDER = ("subfolder", "subfolders")
    LINKED_FOLDER = ("link to a folder", "links to folders")  # last, because the summary continues with their names


def kind_of_name(name: str, suffixes: frozenset[str] = PNG_ONLY) -> Kind | None:
    """Return why a file of this name is ignored, or None if it is an image with one of the suffixes."""
    if is_hidden(name):
        return Kind.HIDDEN
    suffix = Path(name).suffix.lower()
    if suffix in suffixes:
        return None
    return Kind.OTHER_FORMAT if suffix in _OTHER_FORMATS else Kind.OTHER


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or belongs to an operating system."""
    return name.startswith(".") or name.lower() in _SYSTEM


@dataclass
class Found:
    """The content of a folder, and of its subfolders if they were searched.

    Attributes:
        images: paths of the images, sorted.
        unreadable: paths of the folders that cannot be listed, sorted.
        ignored: number of ignored entries per kind.
        links: paths of the ignored links to folders, sorted.
    """

    images: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    ignored: Counter[Kind] = field(default_factory=Counter)
    links: list[Path] = field(default_factory=list)

    def summary(self) -> str:
        """Return one line about the ignored entries, or an empty text if there are none."""
        parts = [f"{count} {kind.value[count > 1]}" for kind in Kind if (count := self.ignored[kind])]
        if not parts:
            return ""
        names = [str(path) for path in self.links[:_NAMED_LINKS]] + ["..."] * (len(self.links) > _NAMED_LINKS)
        return f"ignored {', '.join(parts)}" + (f" ({', '.join(names)})" if names else "")

    def add(self, other: Found) -> None:
        """Add the content of another folder."""
        self.images += other.images
        self.unreadable += other.unreadable
        self.ignored += other.ignored
        self.links += other.links


def search(folder: Path, suffixes: frozenset[str] = PNG_ONLY, *, subfolders: bool = True) -> Found:
    """Find the images of a folder that have one of the suffixes.

    Args:
        folder: the folder.
        suffixes: suffixes of images, in lower case.
        subfolders: whether the subfolders are searched. Otherwise they are counted as ignored.
    """
    found = Found()
    waiting = [str(folder)]
    while waiting:
        where = waiting.pop()
        inside: list[str] = []
        try:
            with os.scandir(where) as entries:
                for entry in entries:
                    _sort_in(entry, found, inside, suffixes)
        except OSError:
            found.unreadable.append(Path(where))
        if subfolders:
            waiting += inside
        else:
            found.ignored[Kind.FOLDER] += len(inside)
    found.images.sort()
    found.unreadable.sort()
    found.links.sort()
    return found


def _sort_in(entry: os.DirEntry[str], found: Found, folders: list[str], suffixes: frozenset[str]) -> None:
    if _is(entry.is_dir, otherwise=False):
        if is_hidden(entry.name):
            found.ignored[Kind.HIDDEN_FOLDER] += 1
        elif entry.is_symlink() or _is_junction(entry):
            found.ignored[Kind.LINKED_FOLDER] += 1
            found.links.append(Path(entry.path))
        else:
            folders.append(entry.path)
    elif (kind := kind_of_name(entry.name, suffixes)) is not None:
        found.ignored[kind] += 1
    elif _is(entry.is_file, otherwise=True) or _is_dangling(entry):
        found.images.append(Path(entry.path))
    else:
        found.ignored[Kind.SPECIAL] += 1


def _is_dangling(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not _is(Path(entry.path).exists, otherwise=False)


def _is_junction(entry: os.DirEntry[str]) -> bool:
    # A link to a folder on Windows, which Python reports since 3.12.
    return bool(getattr(entry, "is_junction", lambda: False)())


def _is(kind: Callable[[], bool], *, otherwise: bool) -> bool:
    try:
        return kind()
    except OSError:
        return otherwise
