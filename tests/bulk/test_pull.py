"""`anomaly pull`: every form of a source, wrong digests, hostile archives, atomicity."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from anomaly.bulk.locations import BulkError, locate
from anomaly.bulk.versions import read_version
from tests import model_stores
from tests.cli.conftest import Anomaly
from tests.conftest import MODEL_STORE
from training.publishing import publish as publishing
from training.publishing.sign import sign

VERSION = MODEL_STORE / "zero-article" / "1"
DIGEST = hashlib.sha256((VERSION / "manifest.json").read_bytes()).hexdigest()


def members(prefix: str = "") -> dict[str, bytes]:
    """Return the files of the shipped version, by name in an archive."""
    files = {path.relative_to(VERSION).as_posix(): path.read_bytes() for path in VERSION.rglob("*") if path.is_file()}
    return {prefix + name: content for name, content in files.items()}


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    """Return a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Layout:
    """An OCI image layout on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = folder / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.manifests: list[dict[str, Any]] = []

    def blob(self, content: bytes, kind: str, **annotations: str) -> dict[str, Any]:
        """Write a blob and return its descriptor."""
        digest = hashlib.sha256(content).hexdigest()
        (self.blobs / digest).write_bytes(content)
        found: dict[str, Any] = {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}
        return {**found, "annotations": annotations} if annotations else found

    def add(self, tag: str, *layers: dict[str, Any]) -> None:
        """Add an artifact."""
        config = self.blob(b"{}", "application/vnd.oci.empty.v1+json")
        kind = "application/vnd.oci.image.manifest.v1+json"
        document = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": list(layers)}
        name = {"org.opencontainers.image.ref.name": tag}
        self.manifests.append(self.blob(json.dumps(document).encode(), kind, **name))
        (self.folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.manifests}))


TAR, TAR_GZ = "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar+gzip"


@pytest.fixture
def forms(tmp_path: Path) -> dict[str, Path]:
    """Return the same version in every form."""
    folder = tmp_path / "forms"
    shutil.copytree(VERSION, folder / "plain" / "any-name")
    (folder / "v.tar").write_bytes(tar(members()))
    (folder / "v.tar.gz").write_bytes(tar(members("./zero-article/1/"), "w:gz"))
    with zipfile.ZipFile(folder / "v.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members("x/").items():
            archive.writestr(name, content)
    image = Layout(folder / "image")
    one = {name: content for name, content in members("models/").items() if "model.pt" not in name}
    old = {"models/model.pt": b"old", "models/golden.npz": b"old", "etc/passwd": b"root"}
    rest = {"models/model.pt": members()["model.pt"], "etc/.wh.passwd": b""}
    image.add("v1", image.blob(tar(old), TAR), image.blob(gzip.compress(tar(one)), TAR_GZ), image.blob(tar(rest), TAR))
    artifact = Layout(folder / "artifact")
    artifact.add("other", artifact.blob(b"x", "text/plain", **{"org.opencontainers.image.title": "readme"}))
    artifact.add(
        "v1",
        *(
            artifact.blob(content, "application/octet-stream", **{"org.opencontainers.image.title": name})
            for name, content in members().items()
        ),
    )
    files = {path.relative_to(image.folder).as_posix(): path.read_bytes() for path in image.folder.rglob("*.*")}
    files |= {f"blobs/sha256/{path.name}": path.read_bytes() for path in image.blobs.iterdir()}
    files |= {name: (image.folder / name).read_bytes() for name in ("oci-layout", "index.json")}
    (folder / "image.tar").write_bytes(tar(files))
    return {path.name: path for path in folder.iterdir()}


def test_every_form_is_the_same_version(forms: dict[str, Path]) -> None:
    """Folder, archives and OCI layouts give the same bytes."""
    assert sorted(forms) == ["artifact", "image", "image.tar", "plain", "v.tar", "v.tar.gz", "v.zip"]
    for name, path in forms.items():
        found = read_version(locate(str(path)), tag="v1" if name == "artifact" else None)
        assert found.digest == DIGEST, name
        listed = json.loads(found.manifest)["files"]
        assert found.files == {file: (VERSION / file).read_bytes() for file in listed}, name


def test_a_url_of_fsspec() -> None:
    """The source may be on a file system of fsspec."""
    import fsspec

    fsspec.filesystem("memory").pipe("/models/v.tar.gz", tar(members(), "w:gz"))
    assert read_version(locate("memory://models/v.tar.gz")).digest == DIGEST


def test_pull_publishes_once(in_process: Anomaly, forms: dict[str, Path], tmp_path: Path) -> None:
    """The first pull copies, the second one verifies; the version and CURRENT are those of the source."""
    store = tmp_path / "store"
    for words in ("copied to", "is already in"):
        done = in_process("pull", forms["image"], "--model-store", store, "--promote", "--digest", f"sha256:{DIGEST}")
        assert done.returncode == 0, done.stderr
        assert f"zero-article@1 {words} {store}, and is now current; sha256:{DIGEST}\n" == done.stdout
    assert (store / "zero-article" / "CURRENT").read_text() == "1\n"
    assert sorted(path.name for path in store.iterdir()) == ["zero-article"]
    (store / "zero-article" / "1" / "model.pt").write_bytes(b"damaged")
    failed = in_process("pull", forms["image"], "--model-store", store)
    assert failed.returncode == 2 and "SHA-256 differs" in failed.stderr


def test_nothing_is_copied_if_a_check_fails(
    in_process: Anomaly,
    forms: dict[str, Path],
    tmp_path: Path,
) -> None:
    """A wrong digest, another version of the same number, and scores that differ do not change the store."""
    store = tmp_path / "store"
    failed = in_process("pull", forms["v.tar"], "--model-store", store, "--digest", "0" * 64)
    assert failed.returncode == 2 and "nothing was copied" in failed.stderr and not store.exists()
    blind = model_stores.copy(tmp_path / "blind", 1)
    model_stores.put_module(blind / "zero-article" / "1", model_stores.Blind())
    failed = in_process("pull", blind, "--model-store", store)
    assert failed.returncode == 2 and "golden scores differ" in failed.stderr
    assert not list(store.iterdir())
    other = model_stores.copy(tmp_path / "other", 1)
    model_stores.change(other / "zero-article" / "1", normal_class="another")
    assert in_process("pull", other, "--model-store", store).returncode == 0
    failed = in_process("pull", forms["v.tar"], "--model-store", store)
    assert failed.returncode == 2 and "contains another zero-article@1; versions never change" in failed.stderr


def test_the_origin_is_checked(in_process: Anomaly, tmp_path: Path) -> None:
    """A list of digests and a required signature reject versions; the signature is copied with its version."""
    store, listed = tmp_path / "store", tmp_path / "digests"
    listed.write_text(f"{'0' * 64}  zero-article/1/manifest.json\n")
    failed = in_process("pull", VERSION, "--model-store", store, "--digests", listed)
    assert failed.returncode == 2 and "differs from the list of digests" in failed.stderr
    failed = in_process("pull", VERSION, "--model-store", store, "--signature", "require")
    assert failed.returncode == 2 and "ANOMALY_MODEL_PUBLIC_KEY_FILE" in failed.stderr
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    for number, key in enumerate(keys):
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (tmp_path / f"{number}.pem").write_bytes(key.private_bytes(*form))
        public = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        (tmp_path / f"{number}.pub").write_bytes(key.public_key().public_bytes(*public))
    source = model_stores.copy(tmp_path / "source", 1)
    sign(source, "zero-article", 1, tmp_path / "0.pem")
    options = ("--model-store", store, "--signature", "require", "--public-key")
    failed = in_process("pull", source, *options, tmp_path / "1.pub")
    assert failed.returncode == 2 and "was not made with the private key" in failed.stderr
    assert not list(store.iterdir())
    assert in_process("pull", source, *options, tmp_path / "0.pub").returncode == 0
    here = (store / "zero-article" / "1" / "model.sig").read_bytes()
    assert here == (source / "zero-article" / "1" / "model.sig").read_bytes()


def test_a_killed_pull_leaves_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the rename, the store has no part of the version; the next pull removes the leftovers of a killed one."""
    found = read_version(locate(str(VERSION)))
    seen: list[list[str]] = []
    verify = publishing._verify

    def look(root: Path, name: str, version: int, *rest: Any) -> Any:
        seen.append([path.name for path in tmp_path.iterdir() if not path.name.startswith(".")])
        return verify(root, name, version, *rest)

    monkeypatch.setattr(publishing, "_verify", look)
    (tmp_path / ".staging-killed" / "zero-article").mkdir(parents=True)
    publishing.publish_exact(tmp_path, found.manifest, found.files)
    assert seen == [[]]
    assert [path.name for path in tmp_path.iterdir()] == ["zero-article"]


def test_damaged_and_hostile_sources_are_rejected(forms: dict[str, Path], tmp_path: Path) -> None:
    """Changed bytes, missing blobs, names that lead outside, and ambiguous sources raise an error with the reason."""
    changed = {**members(), "golden.npz": b"changed"}
    listed = json.loads(members()["manifest.json"])
    listed["files"]["../outside"] = hashlib.sha256(b"x").hexdigest()
    cases = {
        "changed.tar": (tar(changed), "golden.npz is not the file that was published"),
        "outside.tar": (tar({**members(), "../outside": b"x"}), "leads out of the version"),
        "absolute.tar": (tar({**members(), "/etc/outside": b"x"}), "leads out of the version"),
        "listed.tar": (tar({**members(), "manifest.json": json.dumps(listed).encode()}), "does not lie inside"),
        "lacking.tar": (tar({"manifest.json": members()["manifest.json"]}), "is missing"),
        "cut.tar.gz": (tar(members(), "w:gz")[:5000], "is damaged"),
        "empty.tar": (tar({"a": b""}), "contains no model version"),
        "text.txt": (b"text" * 1000, "neither a folder nor a tar or zip archive"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BulkError, match=message):
            read_version(locate(str(tmp_path / name)))
    link = tarfile.TarInfo("model.pt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        archive.addfile(link)
        content = members()["manifest.json"]
        member = tarfile.TarInfo("manifest.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    with pytest.raises(BulkError, match="is missing"):
        read_version(locate(str(tmp_path / "link.tar")))
    with pytest.raises(BulkError, match="does not exist"):
        read_version(locate(str(tmp_path / "nowhere")))
    with pytest.raises(BulkError, match=r"contains zero-article@1, zero@1; choose one with --model NAME@VERSION"):
        read_version(locate(str(MODEL_STORE)))
    with pytest.raises(BulkError, match="contains other, v1; choose one artifact with --tag"):
        read_version(locate(str(forms["artifact"])))
    with pytest.raises(BulkError, match="is not an OCI image layout"):
        read_version(locate(str(forms["v.tar"])), tag="v1")
    blobs = forms["image"] / "blobs" / "sha256"
    largest = max(blobs.iterdir(), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + b"x")
    with pytest.raises(BulkError, match="has another content"):
        read_version(locate(str(forms["image"])))
    largest.unlink()
    with pytest.raises(BulkError, match="lacks the blob"):
        read_version(locate(str(forms["image"])))


def test_unpacking_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive that unpacks to more than the maximum is rejected before it is in memory."""
    monkeypatch.setattr("anomaly.bulk.versions.MAX_BYTES", 100_000)
    (tmp_path / "bomb.tar.gz").write_bytes(tar({"a": bytes(10_000_000)}, "w:gz"))
    with pytest.raises(BulkError, match="when it is unpacked"):
        read_version(locate(str(tmp_path / "bomb.tar.gz")))
