"""Resolves paths and URLs with the file systems of pyarrow, or with those of fsspec for all other schemes."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs


class BulkError(Exception):
    """A bulk run cannot begin or continue. The message contains the reason and the remedy."""


@dataclass(frozen=True)
class Location:
    """A file or folder on a file system.

    Attributes:
        files: a `pyarrow.fs.FileSystem`.
        path: path on that file system, without a slash at its end.
        url: name for messages and for other processes; of a local path, the absolute path.
    """

    files: Any
    path: str
    url: str

    @property
    def is_local(self) -> bool:
        """Whether the path is on a file system of this machine."""
        return isinstance(self.files, fs.LocalFileSystem)

    def inside(self, name: str) -> str:
        """Return the path of an entry of this folder."""
        return posixpath.join(self.path, name)

    def write(self, name: str, content: bytes) -> None:
        """Write a file of this folder: first under a hidden name, then renamed. Object stores publish it on closing."""
        hidden = self.inside(f".{name}.new")
        with self.files.open_output_stream(hidden) as stream:
            stream.write(content)
        self.files.move(hidden, self.inside(name))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file of this folder, or None if it does not exist."""
        try:
            with self.files.open_input_stream(self.inside(name)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None


def locate(text: str) -> Location:
    """Resolve a path or a URL.

    Raises:
        BulkError: no file system has the scheme of the URL, or a package for it is missing.
    """
    if not re.match(r"[a-z][a-z0-9+.-]+://", text):
        path = str(Path(text).absolute())
        return Location(fs.LocalFileSystem(), path, path)
    try:
        files, path = fs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # a scheme that this build of pyarrow does not support
        files, path = _with_fsspec(text)
    except OSError as error:
        raise BulkError(f"{text} cannot be opened: {error}") from error
    if isinstance(files, fs.LocalFileSystem):
        return Location(files, path.rstrip("/") or "/", path)
    return Location(files, path.rstrip("/"), text.rstrip("/"))


def _with_fsspec(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise BulkError(f"the scheme of {url} is not supported here: {error}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(files)), path
