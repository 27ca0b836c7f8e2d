"""Checks who published a model version: by a signature, and by a list of expected digests.

A signature is the file `model.sig` of a version, in the format of OpenSSF model signing: a Sigstore bundle that
contains a DSSE envelope (https://github.com/secure-systems-lab/dsse) with an in-toto statement. The statement lists
the SHA-256 of each file of the version. docs/decisions/0011-model-provenance.md explains why this module does not
import the package `model-signing`.

The digest of a version is the SHA-256 of its manifest.json, which contains the SHA-256 of every other file.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.models import textfiles

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

_log = logging.getLogger(__name__)

SIGNATURE_FILE = "model.sig"
MANIFEST_FILE = "manifest.json"
Mode = Literal["require", "warn", "off"]

_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_MAX_SIGNATURE_BYTES = 1024 * 1024
_DIGEST_LINE = re.compile(
    r"(?P<digest>[0-9a-f]{64}) [ *](?:\./)?(?P<name>[a-z0-9-]+)/(?P<version>[0-9]+)/manifest\.json"
)


class ProvenanceError(Exception):
    """A version is not signed by the expected key, or is not the expected version. The message does not name it."""


class ProvenanceConfigurationError(Exception):
    """The file of the public key or of the digests cannot be used."""


class Provenance:
    """The rules about the origin of model versions.

    Args:
        mode: `require` rejects a version without a valid signature, `warn` logs a warning, `off` checks nothing.
        public_key_file: PEM file with the public key, of the curve P-256.
        digests_file: text file with lines `<SHA-256>  <model>/<version>/manifest.json`, as `sha256sum` writes them.
            Only these versions are accepted, in each mode. None: all versions.

    Raises:
        ProvenanceConfigurationError: a file cannot be used, or the key is missing.
    """

    def __init__(
        self, mode: Mode = "off", public_key_file: Path | None = None, digests_file: Path | None = None
    ) -> None:
        self.mode = mode
        self._key: EllipticCurvePublicKey | None = None
        if mode != "off":
            if public_key_file is None:
                raise ProvenanceConfigurationError(
                    f"ANOMALY_MODEL_SIGNATURE={mode} needs the public key: set ANOMALY_MODEL_PUBLIC_KEY_FILE"
                )
            self._key = _public_key(public_key_file)
        self._digests = None if digests_file is None else _digests(digests_file)

    def check(self, name: str, version: int, folder: Path, manifest: bytes, files: Mapping[str, str]) -> None:
        """Check a version before any other of its files is read.

        Args:
            name, version: of the version.
            folder: its folder, with symbolic links resolved.
            manifest: content of its manifest.json.
            files: SHA-256 by relative path, from that manifest.

        Raises:
            ProvenanceError: a rule rejects the version.
        """
        digest = hashlib.sha256(manifest).hexdigest()
        if self._digests is not None and self._digests.get((name, version)) != digest:
            known = (name, version) in self._digests
            raise ProvenanceError(f"its digest {digest} {'differs from' if known else 'is not in'} the list of digests")
        if self._key is None:
            return
        try:
            _check_signature(self._key, folder, {**files, MANIFEST_FILE: digest})
        except ProvenanceError as error:
            if self.mode == "require":
                raise
            _log.warning("model signature not valid", extra={"version": f"{name}@{version}", "reason": str(error)})


class _Lenient(BaseModel):
    """Other members are allowed: the formats define more than what is checked here."""

    model_config = ConfigDict(frozen=True)


class _Signature(_Lenient):
    sig: str


class _Envelope(_Lenient):
    payload: str
    payload_type: Literal["application/vnd.in-toto+json"] = Field(alias="payloadType")
    signatures: tuple[_Signature, ...] = Field(min_length=1, max_length=1)


class _Bundle(_Lenient):
    envelope: _Envelope = Field(alias="dsseEnvelope")


class _Resource(_Lenient):
    name: str
    algorithm: Literal["sha256"]
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Serialization(_Lenient):
    method: Literal["files"]


class _Predicate(_Lenient):
    serialization: _Serialization
    resources: tuple[_Resource, ...]


class _Statement(_Lenient):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    predicate_type: Literal["https://model_signing/signature/v1.0"] = Field(alias="predicateType")
    predicate: _Predicate


def _check_signature(key: EllipticCurvePublicKey, folder: Path, expected: Mapping[str, str]) -> None:
    check_signed(key, _read_signature(folder), expected)
    for file in files(folder):
        if file not in expected:
            raise ProvenanceError(f"{file} was not signed")


def check_signed(key: EllipticCurvePublicKey, signature: bytes, expected: Mapping[str, str]) -> None:
    """Check that a signature was made with the private key of `key`, and that it covers the expected files alone.

    Args:
        key: the public key.
        signature: content of the signature.
        expected: SHA-256 by relative path, of all files of the version but its signature.

    Raises:
        ProvenanceError: the signature is invalid, or covers other files.
    """
    payload = _verified_payload(key, signature)
    try:
        resources = _Statement.model_validate_json(payload).predicate.resources
    except ValidationError as error:
        raise ProvenanceError(f"{SIGNATURE_FILE} does not contain the statement of a model signature") from error
    signed = {resource.name: resource.digest for resource in resources}
    if len(signed) != len(resources):
        raise ProvenanceError(f"{SIGNATURE_FILE} lists a file twice")
    for file in sorted(signed.keys() | expected.keys()):
        if signed.get(file) != expected.get(file):
            raise ProvenanceError(f"{file} is not the file that was signed")


def _read_signature(folder: Path) -> bytes:
    path = folder / SIGNATURE_FILE
    try:
        if path.is_symlink() or not path.is_file():
            raise ProvenanceError("it has no signature (model.sig)")
        with path.open("rb") as file:
            content = file.read(_MAX_SIGNATURE_BYTES + 1)
    except OSError as error:
        raise ProvenanceError(f"{SIGNATURE_FILE} cannot be read: {error.strerror}") from error
    if len(content) > _MAX_SIGNATURE_BYTES:
        raise ProvenanceError(f"{SIGNATURE_FILE} is larger than {_MAX_SIGNATURE_BYTES} bytes")
    return content


def _verified_payload(key: EllipticCurvePublicKey, content: bytes) -> bytes:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        envelope = _Bundle.model_validate_json(content).envelope
        payload = base64.b64decode(envelope.payload, validate=True)
        signature = base64.b64decode(envelope.signatures[0].sig, validate=True)
    except ValueError as error:  # ValidationError and binascii.Error are ValueErrors
        raise ProvenanceError(f"{SIGNATURE_FILE} is not a model signature") from error
    # The pre-authentication encoding of DSSE: both lengths are signed, so that type and payload cannot be shifted.
    signed = b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)
    try:
        key.verify(signature, signed, ec.ECDSA(SHA256()))
    except InvalidSignature as error:
        raise ProvenanceError(
            f"{SIGNATURE_FILE} was not made with the private key of the expected public key"
        ) from error
    return payload


def files(folder: Path) -> list[str]:
    """Return the relative paths of all files and links of a version but its signature."""
    try:
        found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    except OSError as error:
        raise ProvenanceError(f"its folder cannot be read: {error.strerror}") from error
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != SIGNATURE_FILE)


def _public_key(path: Path) -> EllipticCurvePublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key: Any
    try:
        key = load_pem_public_key(_content(path))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ProvenanceConfigurationError(f"{path} is not a PEM file with a public key of the curve P-256")
    return key


def _digests(path: Path) -> dict[tuple[str, int], str]:
    try:
        text = textfiles.decode(_content(path))
    except UnicodeDecodeError:
        raise ProvenanceConfigurationError(f"the file of digests {path} is not UTF-8") from None
    found: dict[tuple[str, int], str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _DIGEST_LINE.fullmatch(line.strip())
        if match is None:
            raise ProvenanceConfigurationError(
                f"line {number} of {path} is not `<SHA-256>  <model>/<version>/manifest.json`"
            )
        version = (match["name"], int(match["version"]))
        if found.setdefault(version, match["digest"]) != match["digest"]:
            raise ProvenanceConfigurationError(f"line {number} of {path} gives a version a second digest")
    return found


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProvenanceConfigurationError(f"{path} cannot be read: {error.strerror}") from error
