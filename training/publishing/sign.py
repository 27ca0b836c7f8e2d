"""Signs model versions with the package `model-signing`, offline and with a private key of the curve P-256."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from app.models.provenance import SIGNATURE_FILE, ProvenanceError
from app.models.provenance import files as files_of
from training.publishing.files import PublishError, locked, sync
from training.publishing.publish import verify


def sign(root: Path, name: str, version: int, private_key: Path) -> Path:
    """Write the signature of a version, and return its path. An earlier signature is replaced.

    Args:
        root: model store.
        name, version: of the version.
        private_key: PEM file, not encrypted.

    Raises:
        PublishError: the key cannot be used, the service's code rejects the version, or the version contains a file
            that its manifest does not list.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(private_key.read_bytes(), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise PublishError(f"{private_key} is not a PEM file with an unencrypted private key of the curve P-256")
    manifest = verify(root, name, version)
    folder = root / name / str(version)
    try:
        found = files_of(folder)
    except ProvenanceError as error:
        raise PublishError(f"{name}@{version}: {error}") from error
    for file in found:
        if file != "manifest.json" and file not in manifest.files:
            raise PublishError(f"{name}@{version}: {file} is not in manifest.json; delete it before you sign")

    from model_signing import hashing, signing

    target = folder / SIGNATURE_FILE
    with locked(root), tempfile.TemporaryDirectory(dir=root, prefix=".staging-") as staging:
        draft = Path(staging) / SIGNATURE_FILE
        files = hashing.Config().set_ignored_paths(paths=[target], ignore_git_paths=False)  # type: ignore[no-untyped-call]
        signer = signing.Config().use_elliptic_key_signer(private_key=private_key)  # type: ignore[no-untyped-call]
        signer.set_hashing_config(files).sign(folder, draft)
        draft.chmod(0o644)
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(target)
        sync(folder)
    return target
