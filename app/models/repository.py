"""The model versions on disk: lists them, and reads and verifies their files. Independent of torch and HTTP.

model_store/<model>/CURRENT           one line: the current version's number
model_store/<model>/<version>/        immutable
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from app.models import textfiles
from app.models.calibration import Calibration, CalibrationError
from app.models.files import read_regular
from app.models.manifest import Manifest
from app.models.provenance import Provenance, ProvenanceError

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_MOST_DIGITS = 9
_MAX_CURRENT_BYTES = 256
_REQUIRED = ("model.pt", "calibration.npy", "golden.npz")


class RepositoryError(Exception):
    """A version is missing, incomplete or differs from its manifest. The message names the version."""


@dataclass(frozen=True)
class Golden:
    """Images with the outputs of the module at export.

    Attributes:
        images: uint8 [n, 1, 28, 28].
        mse: float32 [n].
        reconstructions: float32 [n, 1, 28, 28] in 0..1.
    """

    images: NDArray[np.uint8]
    mse: NDArray[np.float32]
    reconstructions: NDArray[np.float32]


@dataclass(frozen=True)
class Artifact:
    """One model version, read and verified: all bytes have the checksums of the manifest.

    Attributes:
        manifest: of the version.
        model: its module.
        calibration: its calibration scores.
        golden: its golden scores.
        digest: SHA-256 of its manifest.json.
    """

    manifest: Manifest
    model: bytes
    calibration: Calibration
    golden: Golden
    digest: str

    @property
    def key(self) -> tuple[str, int]:
        """Name and version."""
        return self.manifest.name, self.manifest.version


def sha256(content: bytes) -> str:
    """Return the SHA-256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


class Repository:
    """The model store at `root`. It only reads, and caches nothing.

    Args:
        root: folder of the model store.
        provenance: rules for versions to open. Default: none.
    """

    def __init__(self, root: Path, provenance: Provenance | None = None) -> None:
        self.root = root
        self._provenance = provenance or Provenance()

    def names(self) -> list[str]:
        """Return the names of the models that have a current version, or whose folder cannot be read, sorted.

        Raises:
            OSError: the model store exists but cannot be listed, for a reason other than its permissions.
        """
        try:
            found = _folders_with(self.root, "CURRENT") if self.root.is_dir() else []
        except PermissionError:
            return []
        return sorted(name for name in found if MODEL_NAME.fullmatch(name))

    def require_models(self) -> None:
        """Check that at least one model has a current version.

        Raises:
            RepositoryError: there is no model store. The message contains the absolute path of the model store.
        """
        path = self.root.absolute()
        what_to_do = "set ANOMALY_MODEL_STORE, or ANOMALY_ALLOW_EMPTY=true if the models arrive later"
        try:
            empty, found = not any(path.iterdir()), self.names()
        except FileNotFoundError as error:
            raise RepositoryError(f"there is no model store {path}; {what_to_do}") from error
        except OSError as error:
            raise RepositoryError(f"the model store {path} cannot be read: {error.strerror}") from error
        if empty:
            raise RepositoryError(f"the model store {path} is empty; {what_to_do}")
        if not found:
            raise RepositoryError(f"{path} contains no model with a current version (NAME/CURRENT); {what_to_do}")

    def lacks(self, name: str) -> bool:
        """Return whether a model's folder was deleted: the store can be read, and does not contain it."""
        try:
            return all(path.name != name for path in self.root.iterdir())
        except OSError:
            return False

    def versions(self, name: str) -> list[int]:
        """Return the version numbers of a model, ascending; empty if the model does not exist or cannot be read.

        A version whose folder cannot be read is among them.
        """
        if not MODEL_NAME.fullmatch(name):
            return []
        try:
            found = _folders_with(self.root / name, "manifest.json")
        except OSError:
            return []
        return sorted(int(number) for number in found if is_version(number))

    def current(self, name: str) -> int | None:
        """Return the current version's number, or None if the model has no current version.

        Raises:
            RepositoryError: `CURRENT` does not contain one number.
        """
        if not MODEL_NAME.fullmatch(name):
            return None
        try:
            text = textfiles.decode(read_regular(self.root / name / "CURRENT", _MAX_CURRENT_BYTES)).strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise RepositoryError(f"{name}: CURRENT cannot be read") from error
        if not is_version(text):
            raise RepositoryError(f"{name}: CURRENT does not hold a version number")
        return int(text)

    def manifest(self, name: str, version: int) -> Manifest:
        """Read a version's manifest.

        Raises:
            RepositoryError: the version does not exist, or the manifest is invalid or belongs to another version.
        """
        return self._parse(name, version, self._read(name, version, "manifest.json"))

    def _parse(self, name: str, version: int, content: bytes) -> Manifest:
        label = f"{name}@{version}"
        try:
            manifest = Manifest.model_validate_json(content)
        except ValidationError as error:
            raise RepositoryError(f"{label}: manifest.json is not valid: {_first(error)}") from error
        if (manifest.name, manifest.version) != (name, version):
            raise RepositoryError(f"{label}: manifest.json says it is {manifest.name}@{manifest.version}")
        for required in _REQUIRED:
            if required not in manifest.files:
                raise RepositoryError(f"{label}: manifest.json lists no checksum of {required}")
        return manifest

    def read(self, manifest: Manifest, file: str) -> bytes:
        """Read one file of a version and compare it with the manifest's checksum.

        The returned bytes are those that were compared, so a later change of the file has no effect.

        Raises:
            RepositoryError: the manifest does not list the file, or its checksum differs.
        """
        label = f"{manifest.name}@{manifest.version}"
        expected = manifest.files.get(file)
        if expected is None:
            raise RepositoryError(f"{label}: manifest.json does not list {file}")
        content = self._read(manifest.name, manifest.version, file)
        if sha256(content) != expected:
            raise RepositoryError(f"{label}: {file} is not the file that was published (SHA-256 differs)")
        return content

    def calibration(self, manifest: Manifest) -> Calibration:
        """Read the calibration scores of a version.

        Raises:
            RepositoryError: the file is missing, altered, or contradicts the manifest.
        """
        label = f"{manifest.name}@{manifest.version}"
        stored = self.read(manifest, "calibration.npy")
        try:
            scores = np.load(io.BytesIO(stored), allow_pickle=False).astype(float, casting="same_kind")
            finite = scores.ndim == 1 and np.isfinite(scores).all()
        except Exception as error:  # the checksum proves the publisher's bytes; only numpy can tell whether they parse
            raise RepositoryError(f"{label}: calibration.npy or golden.npz cannot be read") from error
        if not finite:
            raise RepositoryError(f"{label}: calibration.npy is not a list of finite scores")
        calibration = Calibration(scores.tolist(), manifest.calibration.confidence)
        self._check(manifest, calibration)
        return calibration

    def open(self, name: str, version: int) -> Artifact:
        """Read a version and check it, without running the module.

        Raises:
            RepositoryError: the version is missing, incomplete, altered, or contradicts itself, or a rule about its
                origin rejects it.
        """
        content = self._read(name, version, "manifest.json")
        manifest = self._parse(name, version, content)
        label = f"{name}@{version}"
        try:
            self._provenance.check(name, version, (self.root / name / str(version)).resolve(), content, manifest.files)
        except ProvenanceError as error:
            raise RepositoryError(f"{label}: {error}") from error
        calibration, examples = self.calibration(manifest), self.read(manifest, "golden.npz")
        try:
            with np.load(io.BytesIO(examples), allow_pickle=False) as arrays:
                golden = Golden(arrays["images"], arrays["mse"], arrays["reconstructions"])
        except Exception as error:  # any error of the loader means a damaged file
            raise RepositoryError(f"{label}: calibration.npy or golden.npz cannot be read") from error
        if golden.images.dtype != np.uint8 or {golden.mse.dtype, golden.reconstructions.dtype} != {
            np.dtype(np.float32)
        }:
            raise RepositoryError(f"{label}: golden.npz contains arrays of other types than the contract says")
        return Artifact(manifest, self.read(manifest, "model.pt"), calibration, golden, sha256(content))

    def _check(self, manifest: Manifest, calibration: Calibration) -> None:
        label, scores = f"{manifest.name}@{manifest.version}", calibration.scores
        if len(scores) != manifest.calibration.n or any(a > b for a, b in pairwise(scores)):
            raise RepositoryError(f"{label}: calibration.npy is not the {manifest.calibration.n} sorted scores")
        try:
            threshold = calibration.threshold(manifest.alpha)
        except CalibrationError as error:
            raise RepositoryError(f"{label}: {error}") from error
        if np.float32(threshold) != np.float32(manifest.threshold):
            raise RepositoryError(f"{label}: the threshold is not the one that its calibration scores give")

    def _read(self, name: str, version: int, file: str) -> bytes:
        label = f"{name}@{version}"
        path = PurePosixPath(file)
        if not MODEL_NAME.fullmatch(name) or path.is_absolute() or ".." in path.parts:
            raise RepositoryError(f"{label}: {file} does not lie inside the version")
        try:
            folder = (self.root / name / str(version)).resolve()
            target = (folder / path).resolve()
            if not target.is_relative_to(self.root.resolve() / name / str(version)):
                raise RepositoryError(f"{label}: {file} does not lie inside the version")
            return read_regular(target)
        except (OSError, RuntimeError) as error:  # before Python 3.13, a loop of symbolic links is a RuntimeError
            raise RepositoryError(f"{label}: {file} is missing or cannot be read") from error


def is_version(text: str) -> bool:
    """Return whether a text is a version number, as in the name of a folder."""
    return text.isascii() and text.isdigit() and text[0] != "0" and len(text) <= _MOST_DIGITS


def _folders_with(folder: Path, file: str) -> list[str]:
    """Return the names of the entries of a folder that contain a file, or that cannot be read."""
    return [path.name for path in folder.iterdir() if _may_exist(path / file)]


def _may_exist(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # one entry must not hide the others; the read that follows says what is wrong with it
        return True
    return True


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
