"""Signs model versions with the package `model-signing`, offline and with a private key of the curve P-256."""

from __future__ import annotations

import tempfile
from pathlib import Path

from app.models.provenance import MANIFEST_FILE, SIGNATURE_FILE, ProvenanceError, check_signed
from app.models.provenance import files as files_of
from training.publishing.files import PublishError, locked, staging_folder, sync, write_folder
from training.publishing.publish import existing, verify


def sign(root: Path, name: str, version: int, private_key: Path) -> Path:
    """Write the signature of a version, and return its path. An earlier signature is replaced.

    Args:
        root: model store.
        name, version: of the version.
        private_key: PEM file, not encrypted.

    Raises:
        PublishError: the key cannot be used, the service's code rejects the version, the version contains a file that
            its manifest does not list, or the version changed while it was signed. No signature is written.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(private_key.read_bytes(), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise PublishError(f"{private_key} is not a PEM file with an unencrypted private key of the curve P-256")
    folder = root / name / str(version)
    with locked(existing(root)):
        artifact = verify(root, name, version)
        expected = {**artifact.manifest.files, MANIFEST_FILE: artifact.digest}
        try:
            found = files_of(folder)
        except ProvenanceError as error:
            raise PublishError(f"{name}@{version}: {error}") from error
        for file in found:
            if file not in expected:
                raise PublishError(f"{name}@{version}: {file} is not in manifest.json; delete it before you sign")
        # Programs that do not take the lock may have replaced files since `verify` read them.
        signature = _signature(folder, private_key)
        try:
            check_signed(key.public_key(), signature, expected)
        except ProvenanceError as error:
            raise PublishError(f"{name}@{version} changed between its checks and its signature: {error}") from error
        with staging_folder(root) as staging:
            write_folder(staging, {SIGNATURE_FILE: signature})
            (staging / SIGNATURE_FILE).chmod(0o644)
            (staging / SIGNATURE_FILE).replace(folder / SIGNATURE_FILE)
        sync(folder)
    return folder / SIGNATURE_FILE


def _signature(folder: Path, private_key: Path) -> bytes:
    """Return a signature of all files of a folder but its signature. It is not written to the model store."""
    from model_signing import hashing, signing

    with tempfile.TemporaryDirectory() as outside:
        draft = Path(outside) / SIGNATURE_FILE
        ignored = [folder / SIGNATURE_FILE]
        files = hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)  # type: ignore[no-untyped-call]
        signer = signing.Config().use_elliptic_key_signer(private_key=private_key)  # type: ignore[no-untyped-call]
        signer.set_hashing_config(files).sign(folder, draft)
        return draft.read_bytes()
