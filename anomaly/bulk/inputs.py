"""Finds the files of an input and divides them into units of work. Each unit is read by one thread or one task of Ray.

The id of an image is the name of its file, relative to the input. In a file of several images, `#` and its place in the
file follow, counted from 0, and in an archive also the name of the member: `digits.npy#17`, `photos.tar#3/a.png`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from anomaly.bulk import arrays
from anomaly.bulk.locations import BulkError, Location
from anomaly.bulk.rows import PIXELS
from anomaly.image_files import is_hidden
from app.problems import Problem

Kind = Literal["image", "tar", "zip", "parquet", "npy", "idx"]
KINDS: tuple[tuple[Kind, str], ...] = (
    ("image", r"\.(png|jpe?g|webp)"),
    ("tar", r"\.(tar|tar\.(gz|bz2|xz)|tgz|tbz2|txz)"),
    ("zip", r"\.zip"),
    ("parquet", r"\.(parquet|pq)"),
    ("npy", r"\.npy"),
    ("idx", r"([-.]idx3[-.]ubyte|\.idx3?)(\.gz)?"),
)
"""Endings of file names, in lower case. WebP and JPEG are scored with `fit=mnist` only, as by the service."""
UNIT_IMAGES = 16_384
"""Maximum number of images of an array per unit."""
_UNIT_BYTES = UNIT_IMAGES * PIXELS
_FILE_COST = 4096
"""Bytes that opening a file is worth: a folder of small images is divided by their number."""
UNREADABLE_ERRORS = frozenset(
    (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
)
"""Numbers of errors of one file or folder. Any other error of a file system or network ends the run, which can be
resumed."""
DAMAGED_PARQUET = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.lib.ArrowIndexError, UnicodeDecodeError)
"""Errors that the reader of Parquet raises for damaged files, besides `OSError`."""


class Piece(NamedTuple):
    """A part of a file.

    Attributes:
        path: path on the file system of the input.
        name: name in ids.
        kind: format.
        start, stop: range of images of an array, or of row groups of a Parquet file; `stop` is None if the whole file
            is one piece.
        first: place of the first image in the file.
    """

    path: str
    name: str
    kind: Kind
    start: int = 0
    stop: int | None = None
    first: int = 0


Unit = tuple[Piece, ...]
"""Pieces that are read one after the other."""


@dataclass
class Listing:
    """The files of an input.

    Attributes:
        source: file or folder.
        column: column of the images in Parquet files.
        ignored: number of files of other formats that have been met so far.
    """

    source: Location
    column: str
    ignored: int = 0
    _found: Counter[str] = field(default_factory=Counter)

    def units(self) -> Iterator[Unit]:
        """Yield the units of work. Files are listed while units are processed, so memory does not grow with them.

        Raises:
            BulkError: the input does not exist, contains no images, or a Parquet file lacks the column.
        """
        unit: list[Piece] = []
        cost, any_found = 0, False
        for piece, size in self._pieces():
            any_found = True
            if unit and cost + size > _UNIT_BYTES:
                yield tuple(unit)
                unit, cost = [], 0
            unit.append(piece)
            cost += size
        if unit:
            yield tuple(unit)
        if not any_found:
            formats = "PNG, JPEG or WebP images, tar or zip archives, Parquet, npy or IDX files"
            raise BulkError(f"{self.source.url} contains no {formats}")

    def _pieces(self) -> Iterator[tuple[Piece, int]]:
        """Yield each piece with its cost in bytes."""
        for path, name, kind, size in self._files():
            if kind is None:
                self.ignored += 1
            elif kind == "image":
                yield Piece(path, name, kind), _FILE_COST
            elif kind == "parquet":
                yield from self._row_groups(path, name, size)
            elif kind in ("npy", "idx") and not name.lower().endswith(".gz"):
                yield from self._ranges(Piece(path, name, kind), size)
            else:
                yield Piece(path, name, kind), size

    def _files(self) -> Iterator[tuple[str, str, Kind | None, int]]:
        """Yield path, name in ids, format and size of each file.

        A subfolder that cannot be listed is yielded as an image, so that it becomes a row with the reason.
        """
        files, root = self.source.files, self.source.path
        try:
            info = files.get_file_info(root)
        except OSError as error:
            raise BulkError(f"{self.source.url} cannot be read: {error}") from error
        if info.type == fs.FileType.NotFound:
            raise BulkError(f"{self.source.url} does not exist")
        if info.type != fs.FileType.Directory:
            name = printable(info.base_name)
            kind = kind_of(name)
            if kind is None:
                endings = ".png, .jpg, .webp, .tar, .zip, .parquet, .npy or -idx3-ubyte"
                raise BulkError(f"{self.source.url} is not a folder, and its name does not end with {endings}")
            yield root, name, kind, info.size or 0
            return
        folders = [root]
        while folders:
            folder = folders.pop()
            try:
                for path, is_folder, size in _entries(self.source, folder):
                    if is_hidden(path.rpartition("/")[2]):
                        continue
                    if is_folder:
                        folders.append(path)
                    else:
                        name = self._name(path)
                        yield path, name, kind_of(name), size
            except OSError as error:
                if folder == root or error.errno not in UNREADABLE_ERRORS:
                    raise BulkError(f"the folder {folder} cannot be listed: {error}") from error
                yield folder, self._name(folder), "image", 0

    def _name(self, path: str) -> str:
        """Return the name of a file in ids."""
        return printable(path[len(self.source.path) :].lstrip("/"))

    def _ranges(self, piece: Piece, size: int) -> Iterator[tuple[Piece, int]]:
        """Divide an array that is not compressed. Damage is reported when the piece is read."""
        try:
            with self.source.files.open_input_file(piece.path) as stream:
                count, offset = arrays.header(piece.kind, stream.read(arrays.LONGEST_START))
        except (OSError, Problem):
            count, offset = 0, -1
        if offset + count * PIXELS != size:  # a damaged header may declare any number of images
            yield piece, size
            return
        for start in range(0, max(count, 1), UNIT_IMAGES):
            stop = min(start + UNIT_IMAGES, count)
            yield piece._replace(start=start, stop=stop), (stop - start) * PIXELS

    def _row_groups(self, path: str, name: str, size: int) -> Iterator[tuple[Piece, int]]:
        """Divide a Parquet file. A damaged file is reported when the piece is read."""
        try:
            with self.source.files.open_input_file(path) as stream:
                found = pq.ParquetFile(stream)
                columns, metadata = found.schema_arrow.names, found.metadata
                counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        except (OSError, *DAMAGED_PARQUET):
            yield Piece(path, name, "parquet"), size
            return
        if self.column not in columns:
            known = ", ".join(columns)
            raise BulkError(f"{name} has no column {self.column!r}; choose one of {known} with --image-column")
        first = 0
        for number, count in enumerate(counts):
            yield Piece(path, name, "parquet", number, number + 1, first), count * PIXELS
            first += count


def kind_of(name: str) -> Kind | None:
    """Return the format of a file by its name, or None if it is not an input."""
    return next((kind for kind, ending in KINDS if re.search(f"{ending}$", name.lower())), None)


def printable(name: str) -> str:
    """Return a file name as UTF-8 can represent it: Linux allows any bytes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _entries(source: Location, folder: str) -> Iterator[tuple[str, bool, int]]:
    """Yield path, whether it is a folder, and size of each entry of a folder.

    A local folder is not listed completely first, because it may contain millions of files. Links to folders are not
    followed, because a link may lead in a circle.
    """
    if not source.is_local:
        infos: list[Any] = source.files.get_file_info(fs.FileSelector(folder))
        for info in sorted(infos, key=lambda info: info.path):
            yield info.path, info.type == fs.FileType.Directory, info.size or 0
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield entry.path, True, 0
            elif entry.is_file(follow_symlinks=False) and kind_of(entry.name) in ("image", None):
                yield entry.path, False, 0  # without a system call per image
            elif (size := _size(entry)) is not None:
                yield entry.path, False, size


def _size(entry: os.DirEntry[str]) -> int | None:
    """Return the size of a file, or of the file that a link leads to; None for something else, such as a FIFO.

    A file that has been removed and a link that leads nowhere have the size 0: they are reported when they are read.
    """
    try:
        found = entry.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else None
