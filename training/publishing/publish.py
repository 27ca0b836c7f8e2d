"""Changes of the model store: publish, promote, roll back, verify.

A version is written to a hidden folder, loaded and scored by the service's own code, and then renamed. The file CURRENT
is replaced by a rename as well. Every change holds the lock of the store, so that a hidden folder found under the lock
belongs to a killed process.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import ValidationError

from app.inference.detector import Detector, DetectorError
from app.inference.device import one_thread
from app.models.manifest import Manifest
from app.models.provenance import SIGNATURE_FILE, Provenance
from app.models.repository import MODEL_NAME, Artifact, Repository, RepositoryError, is_version, sha256
from training.publishing.files import (
    PublishError,
    locked,
    remove_leftovers,
    staging_folder,
    sync,
    write_current,
    write_folder,
)


def publish(root: Path, draft: Manifest, files: Mapping[str, bytes], *, promote: bool = False) -> Manifest:
    """Publish a version under the next free number.

    Args:
        root: model store; created if it is missing.
        draft: manifest without the final `version` and `files`.
        files: contents by path relative to the version's folder, without manifest.json.
        promote: whether to make it the current version.

    Returns:
        The manifest as published.

    Raises:
        PublishError: the service's code rejects the version, and the store is unchanged; or the version is published,
            but cannot be promoted.
        OSError: the store cannot be written; the error contains the path. The store is unchanged.
    """
    with locked(root):
        remove_leftovers(root)
        version = max(_used_numbers(root, draft.name)) + 1
        checksums = {path: sha256(content) for path, content in sorted(files.items())}
        manifest = draft.model_copy(update={"version": version, "files": checksums})
        with staging_folder(root) as staging:
            folder = staging / draft.name / str(version)
            write_folder(folder, {**files, "manifest.json": manifest.model_dump_json(indent=2).encode() + b"\n"})
            _verify(staging, draft.name, version)
            (root / draft.name).mkdir(exist_ok=True)
            folder.rename(root / draft.name / str(version))
        sync(root / draft.name)
        sync(root)
        if promote:
            try:
                write_current(root / draft.name, version)
            except OSError as error:
                raise PublishError(
                    f"{draft.name}@{version} is published, but is not the current version: {error}; when the cause is "
                    f"gone, run: anomaly promote {draft.name} {version} --model-store {root}"
                ) from error
    return manifest


def publish_copy(root: Path, folder: Path, *, promote: bool = False) -> Manifest:
    """Publish a copy of a version of another model store, under the next free number.

    Args:
        root: model store; created if it is missing.
        folder: folder of the version: `<model store>/<model>/<version>`.
        promote: whether to make it the current version.

    Returns:
        The manifest as published.

    Raises:
        PublishError: `folder` is not a version, differs from its manifest, or is a recalibration of a version that
            `root` does not contain under the same number. The store is unchanged.
    """
    folder = folder.resolve()
    if not MODEL_NAME.fullmatch(folder.parent.name) or not is_version(folder.name):
        raise PublishError(f"{folder} is not a version; give a path that ends in a model name and a number")
    source = Repository(folder.parents[1])
    try:
        manifest = source.manifest(folder.parent.name, int(folder.name))
        files = {file: source.read(manifest, file) for file in manifest.files}
    except RepositoryError as error:
        raise PublishError(str(error)) from error
    origin = manifest.calibration.recalibrated
    if origin is not None and _module_sha256(root, manifest.name, origin.version) != manifest.files["model.pt"]:
        original = f"{manifest.name}@{origin.version}"
        raise PublishError(
            f"{manifest.name}@{manifest.version} is a recalibration of {original}, which is not in {root} under this "
            f"number; publish {original} there, and run `calibrate` there"
        )
    return publish(root, manifest, files, promote=promote)


def publish_exact(
    root: Path,
    content: bytes,
    files: Mapping[str, bytes],
    *,
    signature: bytes | None = None,
    provenance: Provenance | None = None,
    promote: bool = False,
) -> tuple[Manifest, bool]:
    """Publish a version that another model store published, under its own number and with the same manifest.

    Args:
        root: model store; created if it is missing.
        content: of manifest.json.
        files: contents of the files that the manifest lists, by path relative to the version's folder.
        signature: content of its signature, or None if it has none.
        provenance: rules about the origin of versions. Default: none.
        promote: whether to make it the current version.

    Returns:
        The manifest, and whether the version is new.

    Raises:
        PublishError: the service's code rejects the version, or `root` contains another version of this number. The
            store is unchanged.
    """
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise PublishError(f"manifest.json is not valid: {error.error_count()} errors") from error
    if files.keys() != manifest.files.keys() or any(".." in Path(file).parts or file[:1] == "/" for file in files):
        raise PublishError(f"{manifest.name}@{manifest.version}: the files are not those of the manifest")
    with locked(root):
        remove_leftovers(root)
        folder = root / manifest.name / str(manifest.version)
        is_new = not folder.exists()
        if is_new:
            with staging_folder(root) as staging:
                draft = staging / manifest.name / str(manifest.version)
                signed = {} if signature is None else {SIGNATURE_FILE: signature}
                write_folder(draft, {**files, **signed, "manifest.json": content})
                _verify(staging, manifest.name, manifest.version, provenance)
                folder.parent.mkdir(exist_ok=True)
                draft.rename(folder)
            sync(folder.parent)
            sync(root)
        else:
            present = folder / "manifest.json"
            if not present.is_file() or present.read_bytes() != content:
                raise PublishError(f"{root} contains another {manifest.name}@{manifest.version}; versions never change")
            _verify(root, manifest.name, manifest.version, provenance)
        if promote:
            write_current(root / manifest.name, manifest.version)
    return manifest, is_new


def promote(root: Path, name: str, version: int, provenance: Provenance | None = None) -> None:
    """Make `version` the current one, after loading and scoring it, if `provenance` accepts it.

    Raises:
        PublishError: the version is missing, or the service's code rejects it.
    """
    with locked(existing(root)):
        check_exists(root, name, version)
        _verify(root, name, version, provenance)
        write_current(root / name, version)


def rollback(root: Path, name: str, to: int | None = None, provenance: Provenance | None = None) -> int:
    """Make an older version the current one, and return its number.

    Args:
        root: model store.
        name: name of the model.
        to: number of the older version; None for the highest one below the current version.
        provenance: rules about the origin of the version.

    Raises:
        PublishError: there is no older version, `to` is not older, or the service's code rejects the version.
    """
    with locked(existing(root)):
        repository = Repository(root)
        current = _current(repository, name)
        older = [version for version in repository.versions(name) if current is not None and version < current]
        if current is None or not older:
            raise PublishError(f"{name}: there is no version below the current one; `promote` can choose any version")
        if to is not None and to not in older:
            raise PublishError(f"{name}: version {to} is not below the current version {current}; choose from {older}")
        version = to if to is not None else older[-1]
        _verify(root, name, version, provenance)
        write_current(root / name, version)
        return version


def verify(root: Path, name: str, version: int, provenance: Provenance | None = None) -> Artifact:
    """Load a version as the service does, and compare every checksum and the golden scores on the CPU.

    Raises:
        PublishError: the version is missing or differs from its manifest, or `provenance` rejects it.
    """
    check_exists(existing(root), name, version)
    return _verify(root, name, version, provenance)


def check_exists(root: Path, name: str, version: int) -> None:
    """Check that the model store has a folder for a version.

    Raises:
        PublishError: the version is missing. The message lists the versions of the model, or the models.
    """
    if (root / name / str(version)).is_dir():
        return
    repository = Repository(root)
    if versions := repository.versions(name):
        raise PublishError(f"{name} has no version {version} in {root}; its versions: {', '.join(map(str, versions))}")
    raise PublishError(f"there is no model {name} in {root}; its models: {', '.join(repository.names()) or 'none'}")


def check_current(root: Path, name: str) -> None:
    """Check that a model's CURRENT, if it exists, names an existing version.

    Raises:
        PublishError: the version is missing.
    """
    repository = Repository(root)
    current = _current(repository, name)
    if current is not None and current not in repository.versions(name):
        raise PublishError(f"{name}: CURRENT names version {current}, which is missing")


def check_name(name: str) -> str:
    """Return `name` if it is a valid model name.

    Raises:
        PublishError: the name is invalid.
    """
    if not MODEL_NAME.fullmatch(name):
        raise PublishError(f"{name!r} is not a model name; use lower-case letters, digits and hyphens, at most 63")
    return name


def _verify(root: Path, name: str, version: int, provenance: Provenance | None = None) -> Artifact:
    repository = Repository(root, provenance)
    try:
        artifact = repository.open(name, version)
        for file in artifact.manifest.files:
            repository.read(artifact.manifest, file)
        with one_thread():
            Detector.load(artifact, torch.device("cpu"))
    except (RepositoryError, DetectorError) as error:
        raise PublishError(str(error)) from error
    return artifact


def existing(root: Path) -> Path:
    """Return `root` if there is a folder.

    Raises:
        PublishError: there is no model store.
    """
    if not root.is_dir():
        raise PublishError(f"there is no model store {root}")
    return root


def _current(repository: Repository, name: str) -> int | None:
    try:
        return repository.current(name)
    except RepositoryError as error:
        raise PublishError(str(error)) from error


def _used_numbers(root: Path, name: str) -> list[int]:
    """Return 0 and all numbers in use: of folders, even without a manifest, and in CURRENT, even if deleted."""
    numbers = [0, *(int(path.name) for path in (root / name).glob("*") if is_version(path.name))]
    with suppress(RepositoryError):
        numbers.append(Repository(root).current(name) or 0)
    return numbers


def _module_sha256(root: Path, name: str, version: int) -> str | None:
    """Return the SHA-256 of a version's module, or None if the store does not contain the version."""
    try:
        return Repository(root).manifest(name, version).files["model.pt"]
    except RepositoryError:
        return None
