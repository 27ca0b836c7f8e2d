"""Put model versions into the model store, and choose which one answers.

Knows: folders, renames, the lock of the store. Does not know: how a version is made. `app.models.repository` reads.

A version is written into a hidden folder of the store, forced to the disk, opened and scored by the service's own
loader, and only then renamed into place; CURRENT is replaced by rename as well. Whoever publishes or promotes holds a
lock on the store that the kernel drops when the process dies, so that a hidden folder seen while holding it is litter.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from app.inference.detector import Detector, DetectorError
from app.models.manifest import Manifest
from app.models.repository import MODEL_NAME, Repository, RepositoryError, is_version, sha256

_STAGING = ".staging-"
_CURRENT_DRAFT = ".CURRENT-draft"
_ROOM = 2**20
"""Bytes, as many as the smallest versions have: a disk without room for them is full."""


class PublishError(Exception):
    """A version that cannot be published, promoted or rolled back to; the store is as it was."""


def publish(root: Path, draft: Manifest, files: Mapping[str, bytes], *, promote: bool = False) -> Manifest:
    """Publish a version under the next free number.

    Args:
        root: the model store; made if it is not there.
        draft: the manifest; its `version` and `files` are filled in here.
        files: content by path relative to the version's folder, all but manifest.json.
        promote: make it the current version.

    Returns:
        The manifest as published.

    Raises:
        PublishError: the service's loader refuses what was written. Nothing was published.
        OSError: the store cannot be written; it names the path. Nothing was published.
    """
    with _locked(root):
        _remove_litter(root)
        version = max(_numbers(root, draft.name)) + 1
        checksums = {path: sha256(content) for path, content in sorted(files.items())}
        manifest = draft.model_copy(update={"version": version, "files": checksums})
        with _staging(root) as staging:
            folder = staging / draft.name / str(version)
            _write(folder, {**files, "manifest.json": manifest.model_dump_json(indent=2).encode() + b"\n"})
            _verify(staging, draft.name, version)
            (root / draft.name).mkdir(exist_ok=True)
            folder.rename(root / draft.name / str(version))
        _sync(root / draft.name)
        _sync(root)
        if promote:
            _point(root, draft.name, version)
    return manifest


def publish_copy(root: Path, folder: Path, *, promote: bool = False) -> Manifest:
    """Publish a copy of a version that lies in another model store, under the next free number.

    Args:
        root: the model store; made if it is not there.
        folder: of the version: `<model store>/<model>/<version>`.
        promote: make it the current version.

    Returns:
        The manifest as published.

    Raises:
        PublishError: there is no version at `folder`, or it is not what its manifest says, or its threshold was chosen
            anew for a version that `root` does not have under the same number. Nothing was published.
    """
    folder = folder.resolve()
    if not MODEL_NAME.fullmatch(folder.parent.name) or not is_version(folder.name):
        raise PublishError(f"{folder} is no version: its path ends in a model's name and a number")
    elsewhere = Repository(folder.parents[1])
    try:
        manifest = elsewhere.manifest(folder.parent.name, int(folder.name))
        files = {file: elsewhere.read(manifest, file) for file in manifest.files}
    except RepositoryError as error:
        raise PublishError(str(error)) from error
    chosen_anew = manifest.calibration.recalibrated
    if chosen_anew is not None and _module_of(root, manifest.name, chosen_anew.version) != manifest.files["model.pt"]:
        label = f"{manifest.name}@{manifest.version}"
        raise PublishError(
            f"{label} is {manifest.name}@{chosen_anew.version} with another threshold, which {root} does not have "
            "under that number: publish a copy of that one, and use `calibrate` there"
        )
    return publish(root, manifest, files, promote=promote)


def _module_of(root: Path, name: str, version: int) -> str | None:
    """Return the SHA-256 of a version's module, or None where the store has no such version."""
    try:
        return Repository(root).manifest(name, version).files["model.pt"]
    except RepositoryError:
        return None


def check_writable(*folders: Path) -> None:
    """Find out whether each folder, be it there or not, can be written. Nothing is left behind.

    Raises:
        PublishError: one cannot; the message names the path and the reason.
    """
    for folder in folders:
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(bytes(_ROOM))
        except OSError as error:
            raise PublishError(f"{place} cannot be written: {error.strerror}") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name `path` where it names none: a write to a full disk does not say where it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def promote(root: Path, name: str, version: int) -> None:
    """Make `version` the one that answers, after opening and scoring it.

    Raises:
        PublishError: there is no such version, or the service's loader refuses it.
    """
    with _locked(_existing(root)):
        _verify(root, name, version)
        _point(root, name, version)


def rollback(root: Path, name: str, to: int | None = None) -> int:
    """Make an older version the one that answers: `to`, or the highest below the current one. Returns its number.

    Raises:
        PublishError: there is no older version, `to` is not older, or the service's loader refuses it.
    """
    with _locked(_existing(root)):
        repository = Repository(root)
        current = _current(repository, name)
        older = [version for version in repository.versions(name) if current is not None and version < current]
        if current is None or not older:
            raise PublishError(f"{name}: there is no version below the current one to roll back to")
        if to is not None and to not in older:
            raise PublishError(f"{name}: version {to} is not one below the current {current}; there are {older}")
        version = to if to is not None else older[-1]
        _verify(root, name, version)
        _point(root, name, version)
        return version


def verify(root: Path, name: str, version: int) -> Manifest:
    """Open a version as the service does, compare every checksum and score the golden images on the CPU.

    Raises:
        PublishError: anything is not as its manifest says.
    """
    return _verify(_existing(root), name, version)


def check_current(root: Path, name: str) -> None:
    """Check that a model's CURRENT, where there is one, names a version that is there.

    Raises:
        PublishError: it does not.
    """
    repository = Repository(root)
    current = _current(repository, name)
    if current is not None and current not in repository.versions(name):
        raise PublishError(f"{name}: CURRENT names version {current}, which is not there")


def _verify(root: Path, name: str, version: int) -> Manifest:
    repository = Repository(root)
    try:
        artifact = repository.open(name, version)
        for file in artifact.manifest.files:
            repository.read(artifact.manifest, file)
        Detector.load(artifact, torch.device("cpu"))
    except (RepositoryError, DetectorError) as error:
        raise PublishError(str(error)) from error
    return artifact.manifest


def _existing(root: Path) -> Path:
    if not root.is_dir():
        raise PublishError(f"there is no model store at {root}")
    return root


def _current(repository: Repository, name: str) -> int | None:
    try:
        return repository.current(name)
    except RepositoryError as error:
        raise PublishError(str(error)) from error


def _numbers(root: Path, name: str) -> list[int]:
    # Every numbered folder counts, also one without a manifest, and what CURRENT names though it be deleted, so that no
    # number is ever used twice.
    found = [0, *(int(path.name) for path in (root / name).glob("*") if is_version(path.name))]
    with suppress(RepositoryError):
        found.append(Repository(root).current(name) or 0)
    return found


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    with naming(root):
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _remove_litter(root: Path) -> None:
    for folder in root.glob(f"{_STAGING}*"):
        shutil.rmtree(folder)
    for draft in root.glob(f"*/{_CURRENT_DRAFT}"):
        draft.unlink()


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    staging = Path(tempfile.mkdtemp(dir=root, prefix=_STAGING))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(path, content)
    for directory in {folder, *(path for path in folder.rglob("*") if path.is_dir())}:
        _sync(directory)


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _point(root: Path, name: str, version: int) -> None:
    draft = root / name / _CURRENT_DRAFT
    try:
        _write_file(draft, f"{version}\n".encode())
        draft.replace(root / name / "CURRENT")
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()
    _sync(root / name)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_name(name: str) -> str:
    """Return `name` if it can name a model.

    Raises:
        PublishError: it cannot.
    """
    if not MODEL_NAME.fullmatch(name):
        raise PublishError(f"{name!r} cannot name a model: lower-case letters, digits and hyphens, at most 63")
    return name
