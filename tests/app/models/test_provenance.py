"""Versions are accepted by their signature, by their digest, or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from app.models.provenance import Provenance, ProvenanceConfigurationError
from app.models.repository import Repository, RepositoryError
from app.settings import Settings
from tests.conftest import MODEL_STORE, running, unprivileged
from tests.model_stores import change, copy, put_bytes
from training.publishing.sign import sign

NAME = "zero-article"
Key = ec.EllipticCurvePrivateKey


def write_keys(folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> tuple[Path, Path]:
    """Write a new pair of keys, and return the paths of the private and of the public key."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(public_pem(key))
    return private, public


def public_pem(key: Any) -> bytes:
    """Return the public key of a private key as PEM."""
    pem: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return a store with a signed version, its private key and its public key."""
    folder = tmp_path_factory.mktemp("signed")
    private, public = write_keys(folder, "publisher")
    store = copy(folder / "store", 1)
    sign(store, NAME, 1, private)
    return store, private, public


@pytest.fixture
def store(signed: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """Return a copy of the store with the signed version, to be altered."""
    shutil.copytree(signed[0], tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def public(signed: tuple[Path, Path, Path]) -> Path:
    """Return the path of the public key."""
    return signed[2]


def forge(folder: Path, private: Path, alter: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    """Change the statement of a signature; sign it again with `private` if `seal`."""
    path = folder / "model.sig"
    bundle = json.loads(path.read_text())
    envelope = bundle["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    alter(statement)
    payload = json.dumps(statement).encode()
    envelope["payload"] = base64.b64encode(payload).decode()
    if seal:
        key = serialization.load_pem_private_key(private.read_bytes(), None)
        assert isinstance(key, Key)
        kind = envelope["payloadType"].encode()
        encoded = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
        envelope["signatures"][0]["sig"] = base64.b64encode(key.sign(encoded, ec.ECDSA(hashes.SHA256()))).decode()
    path.write_text(json.dumps(bundle))


def reference_accepts(store: Path, public: Path) -> bool:
    """Return whether the package `model-signing` accepts version 1."""
    from model_signing import verifying

    folder = store / NAME / "1"
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, folder / "model.sig")
    except Exception:  # its errors have no common class
        return False
    return True


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_signed_version_is_opened(store, public):
    """A version signed by `model-signing` is accepted by the service and by `model-signing`."""
    assert Repository(store, Provenance("require", public)).open(NAME, 1).key == (NAME, 1)
    assert reference_accepts(store, public)


def _other_module(folder: Path) -> None:
    put_bytes(folder, b"another module")


ALTERATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "byte of the module": (lambda folder: flip(folder / "model.pt"), "SHA-256 differs"),
    "byte of the golden scores": (lambda folder: flip(folder / "golden.npz"), "SHA-256 differs"),
    "byte of the signature": (lambda folder: flip(folder / "model.sig"), "model.sig"),
    "module and manifest": (_other_module, "manifest.json is not the file that was signed|model.pt is not the file"),
    "threshold": (
        lambda folder: change(folder, normal_class="anything"),
        "manifest.json is not the file that was signed",
    ),
    "added file": (lambda folder: (folder / "extra.py").write_text("pass"), "extra.py was not signed"),
    "added hidden file": (lambda folder: (folder / "report" / ".x").write_text(""), "report/.x was not signed"),
    "added link": (lambda folder: (folder / "link").symlink_to("model.pt"), "link was not signed"),
    "deleted signature": (lambda folder: (folder / "model.sig").unlink(), "it has no signature"),
    "empty signature": (lambda folder: (folder / "model.sig").write_bytes(b""), "model.sig is not a model signature"),
    "huge signature": (lambda folder: (folder / "model.sig").write_bytes(b" " * 2**21), "model.sig is larger than"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_version_is_rejected(store, public, name):
    """With `require`, a version that differs from what was signed is rejected, as `model-signing` rejects it."""
    alter, message = ALTERATIONS[name]
    alter(store / NAME / "1")
    with pytest.raises(RepositoryError, match=message) as caught:
        Repository(store, Provenance("require", public)).open(NAME, 1)
    assert str(caught.value).startswith(f"{NAME}@1: ")
    assert not reference_accepts(store, public)


def _without_module(statement: dict[str, Any]) -> None:
    resources = statement["predicate"]["resources"]
    resources[:] = [each for each in resources if each["name"] != "model.pt"]


def _twice(statement: dict[str, Any]) -> None:
    statement["predicate"]["resources"].append(statement["predicate"]["resources"][0])


def _weak_hash(statement: dict[str, Any]) -> None:
    statement["predicate"]["resources"][0]["algorithm"] = "md5"


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (_without_module, "model.pt is not the file that was signed"),
        (_twice, "lists a file twice"),
        (_weak_hash, "does not contain the statement"),
        (lambda statement: statement.update(predicateType="https://model_signing/Digests/v0.1"), "does not contain"),
        (lambda statement: statement.update(_type="other"), "does not contain the statement"),
        (lambda statement: statement["predicate"]["serialization"].update(method="shards"), "does not contain"),
    ],
    ids=["incomplete", "twice", "weak hash", "old format", "other type", "shards"],
)
def test_a_valid_signature_of_another_statement_is_rejected(store, signed, alter, message):
    """A signature by the right key counts only for the complete list of files in the current format."""
    forge(store / NAME / "1", signed[1], alter)
    with pytest.raises(RepositoryError, match=message):
        Repository(store, Provenance("require", signed[2])).open(NAME, 1)


def test_a_signature_has_one_form(store, public):
    """Characters outside base64 are rejected, and so is a bundle whose first signature is another one."""
    path = store / NAME / "1" / "model.sig"
    bundle = json.loads(path.read_text())
    (valid,) = bundle["dsseEnvelope"]["signatures"]
    other = {**valid, "sig": base64.b64encode(b"another").decode()}
    for signatures, message in (
        ([{**valid, "sig": valid["sig"][:9] + "!" + valid["sig"][9:]}], "is not a model signature"),
        ([other, valid], "is not a model signature|not made with the private key"),
    ):
        bundle["dsseEnvelope"]["signatures"] = signatures
        path.write_text(json.dumps(bundle))
        with pytest.raises(RepositoryError, match=message):
            Repository(store, Provenance("require", public)).open(NAME, 1)


def test_a_signature_has_a_maximum_size(store, public):
    """A bundle of 1 MiB is read, one with a byte more is not."""
    path = store / NAME / "1" / "model.sig"
    content = path.read_bytes()
    path.write_bytes(content + b" " * (2**20 - len(content)))
    assert Repository(store, Provenance("require", public)).open(NAME, 1)
    path.write_bytes(content + b" " * (2**20 + 1 - len(content)))
    with pytest.raises(RepositoryError, match="larger than 1048576 bytes"):
        Repository(store, Provenance("require", public)).open(NAME, 1)


def test_a_changed_statement_breaks_the_signature(store, signed):
    """The statement cannot be changed without the private key."""
    forge(store / NAME / "1", signed[1], lambda statement: statement.update(extra=1), seal=False)
    with pytest.raises(RepositoryError, match="not made with the private key"):
        Repository(store, Provenance("require", signed[2])).open(NAME, 1)


def test_a_signature_by_another_key_is_rejected(store, tmp_path, public):
    """A version that another key signed is rejected; after a change of the expected key, it is accepted."""
    private, other = write_keys(tmp_path, "other")
    sign(store, NAME, 1, private)
    with pytest.raises(RepositoryError, match="not made with the private key of the expected public key"):
        Repository(store, Provenance("require", public)).open(NAME, 1)
    assert Repository(store, Provenance("require", other)).open(NAME, 1)
    assert not reference_accepts(store, public)


def test_a_signature_of_another_version_is_rejected(store, signed):
    """The signature of one version is not valid for another, although both are signed by the right key."""
    copy(store, 2)
    shutil.copyfile(store / NAME / "1" / "model.sig", store / NAME / "2" / "model.sig")
    with pytest.raises(RepositoryError, match=r"manifest\.json is not the file that was signed"):
        Repository(store, Provenance("require", signed[2])).open(NAME, 2)


def test_the_module_is_not_read_before_the_signature(store, public, monkeypatch):
    """A version without a valid signature is rejected before any file but its manifest is read."""
    (store / NAME / "1" / "model.sig").unlink()
    read: list[str] = []
    original = Repository._read
    monkeypatch.setattr(Repository, "_read", lambda *given: (read.append(given[-1]), original(*given))[1])
    with pytest.raises(RepositoryError, match="no signature"):
        Repository(store, Provenance("require", public)).open(NAME, 1)
    assert read == ["manifest.json"]


def test_a_warning_names_the_version(store, public, caplog):
    """With `warn`, a version without a signature is opened, and a warning names it and the reason."""
    (store / NAME / "1" / "model.sig").unlink()
    with caplog.at_level(logging.WARNING):
        assert Repository(store, Provenance("warn", public)).open(NAME, 1)
    assert [(each.message, each.version, each.reason) for each in caplog.records] == [
        ("model signature not valid", f"{NAME}@1", "it has no signature (model.sig)")
    ]


def test_off_checks_no_signature(store):
    """With `off`, a version needs no signature, and no public key is read."""
    (store / NAME / "1" / "model.sig").unlink()
    assert Repository(store, Provenance("off", Path("missing"))).open(NAME, 1)


def test_only_listed_digests_are_accepted(store, tmp_path):
    """With a list of digests, a listed version is accepted; a changed or an unlisted one is rejected."""
    copy(store, 2)
    manifest = store / NAME / "1" / "manifest.json"
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    listed = tmp_path / "digests"
    listed.write_text(
        f"# accepted on Monday\n\n{digest}  {NAME}/1/manifest.json\n{'0' * 64} *./other/7/manifest.json\n"
    )
    repository = Repository(store, Provenance(digests_file=listed))
    assert repository.open(NAME, 1)
    with pytest.raises(RepositoryError, match=f"{NAME}@2: its digest [0-9a-f]{{64}} is not in the list of digests"):
        repository.open(NAME, 2)
    change(manifest.parent, normal_class="anything")
    with pytest.raises(RepositoryError, match=f"{NAME}@1: its digest [0-9a-f]{{64}} differs from the list of digests"):
        repository.open(NAME, 1)


def test_the_shipped_versions_have_the_shipped_digests():
    """`model_store/SHA256SUMS` lists exactly the shipped versions, and the service accepts them with it."""
    listed = (MODEL_STORE / "SHA256SUMS").read_text().splitlines()
    found = sorted(path.relative_to(MODEL_STORE).as_posix() for path in MODEL_STORE.glob("*/*/manifest.json"))
    assert sorted(line[66:] for line in listed) == found
    repository = Repository(MODEL_STORE, Provenance(digests_file=MODEL_STORE / "SHA256SUMS"))
    for path in found:
        name, version, _ = path.split("/")
        assert repository.open(name, int(version))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nonsense", "line 1 of .* is not `<SHA-256>  <model>/<version>/manifest.json`"),
        (b"0" * 64 + b"  zero/1/model.pt", "line 1 of .* is not"),
        (b"\xff", "is not UTF-8"),
        (
            b"0" * 64 + b"  zero/1/manifest.json\n" + b"1" * 64 + b"  zero/1/manifest.json",
            "line 2 of .* gives a version a second digest",
        ),
    ],
    ids=["nonsense", "other file", "not UTF-8", "twice"],
)
def test_a_malformed_list_of_digests_is_rejected(tmp_path, content, message):
    """A list of digests that is not one is an error at start, not an empty list."""
    path = tmp_path / "digests"
    path.write_bytes(content)
    with pytest.raises(ProvenanceConfigurationError, match=message):
        Provenance(digests_file=path)


def test_an_unusable_public_key_is_rejected(tmp_path):
    """A missing, unreadable or malformed key, a private key, and a key of another kind are errors at start."""
    with pytest.raises(ProvenanceConfigurationError, match="needs the public key: set ANOMALY_MODEL_PUBLIC_KEY_FILE"):
        Provenance("require")
    with pytest.raises(ProvenanceConfigurationError, match="cannot be read: No such file"):
        Provenance("warn", tmp_path / "missing")
    private, public = write_keys(tmp_path, "right")
    _, other_curve = write_keys(tmp_path, "p384", ec.SECP384R1())
    other_kind = tmp_path / "rsa.pub"
    other_kind.write_bytes(public_pem(rsa.generate_private_key(65537, 2048)))
    malformed = tmp_path / "malformed"
    malformed.write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    for path in (private, other_curve, other_kind, malformed):
        with pytest.raises(
            ProvenanceConfigurationError, match="is not a PEM file with a public key of the curve P-256"
        ):
            Provenance("require", path)
    public.chmod(0)
    tmp_path.chmod(0o755)
    with unprivileged(), pytest.raises(ProvenanceConfigurationError, match="cannot be read"):
        Provenance("require", public)


async def test_the_service_rejects_an_unsigned_version(
    make_settings: Callable[..., Settings], store: Path, public: Path, zero: bytes
) -> None:
    """With `require`, the signed version serves, and an unsigned version gets a problem, not a score."""
    copy(store, 2, current=1)
    settings = make_settings(model_store=store, model_signature="require", model_public_key_file=public)
    async with running(settings) as client:
        assert (await client.post("/score", files={"file": zero})).status_code == 200
        reply = await client.post(f"/score?model={NAME}@2", files={"file": zero})
        assert reply.status_code == 503
        assert reply.json()["type"] == "/problems/model-unavailable"
