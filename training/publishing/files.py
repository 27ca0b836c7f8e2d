"""Durable changes of the model store's folder: lock, staging folder, fsync, atomic rename."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_STAGING_PREFIX = ".staging-"
_CURRENT_DRAFT = ".CURRENT-draft"
_MIN_FREE_BYTES = 2**20
"""Size of the smallest versions: a disk without this space is full."""


class PublishError(Exception):
    """A version that cannot be published, promoted or rolled back to; the model store is unchanged."""


def check_writable(*folders: Path) -> None:
    """Check that each folder can be written, or created; leave no file behind.

    Raises:
        PublishError: a folder cannot be written; the message contains the path and the reason.
    """
    for folder in folders:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=existing) as file:
                file.write(bytes(_MIN_FREE_BYTES))
        except OSError as error:
            raise PublishError(f"{existing} cannot be written: {error.strerror}") from error


@contextmanager
def errors_with_path(path: Path) -> Iterator[None]:
    """Add `path` to an OSError without a path, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of a model store; create the folder if it is missing.

    The kernel releases the lock when the process dies.
    """
    with errors_with_path(root):
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def remove_leftovers(root: Path) -> None:
    """Delete the files of killed processes; the caller holds the lock."""
    for folder in root.glob(f"{_STAGING_PREFIX}*"):
        shutil.rmtree(folder)
    for draft in root.glob(f"*/{_CURRENT_DRAFT}"):
        draft.unlink()


@contextmanager
def staging_folder(root: Path) -> Iterator[Path]:
    """Create a hidden folder in the model store, and delete it at the end."""
    staging = Path(tempfile.mkdtemp(dir=root, prefix=_STAGING_PREFIX))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by relative path, and flush them and their folders to the disk."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(path, content)
    for directory in {folder, *(path for path in folder.rglob("*") if path.is_dir())}:
        sync(directory)


def write_current(folder: Path, version: int) -> None:
    """Replace the file CURRENT of a model by an atomic rename."""
    draft = folder / _CURRENT_DRAFT
    try:
        _write_file(draft, f"{version}\n".encode())
        draft.replace(folder / "CURRENT")
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()
    sync(folder)


def sync(folder: Path) -> None:
    """Flush a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
