"""The rule that decides which files of a folder are images to train with, and what the others are.

It is the rule of `anomaly score` (`anomaly/image_files.py`, which training does not import), except that subfolders are
not searched: one folder is one class. Tests compare both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

SUFFIX = ".png"
_OTHER_FORMATS = frozenset(
    (".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".jxl", ".tif", ".tiff", ".webp")
)  # fmt: skip
_SYSTEM = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin", "lost+found",
     "system volume information")
)  # fmt: skip


class Kind(Enum):
    """Why an entry of a folder is ignored; the value is its name in the singular and in the plural."""

    OTHER = ("file that is not an image", "files that are not images")
    OTHER_FORMAT = ("image in another format than PNG", "images in other formats than PNG")
    HIDDEN = ("hidden or system file", "hidden or system files")
    HIDDEN_FOLDER = ("hidden or system folder", "hidden or system folders")
    SPECIAL = ("named pipe or device", "named pipes or devices")
    LINKED_FOLDER = ("link to a folder", "links to folders")
    FOLDER = ("subfolder", "subfolders")


@dataclass
class Found:
    """The content of a folder.

    Attributes:
        images: paths of the images, sorted. An empty file and a link to a file that does not exist count as images, so
            that reading them reports them.
        ignored: number of ignored entries per kind.
    """

    images: list[Path] = field(default_factory=list)
    ignored: Counter[Kind] = field(default_factory=Counter)

    def summary(self) -> str:
        """Return one line about the ignored entries, or an empty text if there are none."""
        parts = [f"{count} {kind.value[count > 1]}" for kind in Kind if (count := self.ignored[kind])]
        return f"ignored {', '.join(parts)}" if parts else ""


def search(folder: Path) -> Found:
    """Find the images of a folder, without its subfolders."""
    found = Found()
    for path in folder.glob("*"):
        kind = _kind(path)
        if kind is None:
            found.images.append(path)
        else:
            found.ignored[kind] += 1
    found.images.sort()
    return found


def _kind(path: Path) -> Kind | None:
    hidden = path.name.startswith(".") or path.name.lower() in _SYSTEM
    if path.is_dir():
        return Kind.HIDDEN_FOLDER if hidden else Kind.LINKED_FOLDER if path.is_symlink() else Kind.FOLDER
    if hidden:
        return Kind.HIDDEN
    suffix = path.suffix.lower()
    if suffix != SUFFIX:
        return Kind.OTHER_FORMAT if suffix in _OTHER_FORMATS else Kind.OTHER
    return None if path.is_file() or not path.exists() else Kind.SPECIAL
