"""The commands around signatures: `sign`, and the checks of `promote`, `rollback` and `verify`."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from tests.app.models.test_provenance import NAME, flip, write_keys
from tests.model_stores import change, copy
from tests.training.commands import TRAIN, run
from training.publishing import sign as signing


def signature_options(public: Path) -> tuple[str, ...]:
    """Return the options that require signatures."""
    return ("--signature", "require", "--public-key", str(public))


def test_promote_needs_what_the_service_needs(tmp_path):
    """`promote`, `rollback` and `verify` reject an unsigned version, and accept it once it is signed."""
    private, public = write_keys(tmp_path, "publisher")
    store = copy(tmp_path / "store", 1, 2, 3, current=3)
    options = (*signature_options(public), "--model-store", str(store))
    for command in (("promote", NAME, 1), ("rollback", NAME), ("verify", NAME, 1)):
        code, _, errors = run(*command, *options)
        assert code == 2
        assert "it has no signature (model.sig)" in errors
    assert (store / NAME / "CURRENT").read_text() == "3\n"

    for version in (1, 2):
        code, out, _ = run("sign", NAME, version, "--private-key", private, "--model-store", store)
        assert code == 0
        assert out == f"{NAME}@{version}: signed, {store / NAME / str(version) / 'model.sig'}\n"
    assert run("promote", NAME, 1, *options)[0] == 0
    assert run("promote", NAME, 2, *options)[0] == 0
    assert run("rollback", NAME, *options)[1] == f"{NAME}: version 1 is current\n"
    assert run("verify", NAME, 2, *options)[1] == f"{NAME}@2: good\n"
    assert not list(store.glob(".staging-*"))


def test_the_variables_of_the_service_apply(tmp_path, monkeypatch):
    """`promote` reads the settings of the service; `--promote` of a training is rejected before it begins."""
    _, public = write_keys(tmp_path, "publisher")
    store = copy(tmp_path / "store", 1, 2)
    monkeypatch.setenv("ANOMALY_MODEL_SIGNATURE", "require")
    assert "set ANOMALY_MODEL_PUBLIC_KEY_FILE" in run("promote", NAME, 1, "--model-store", store)[2]
    monkeypatch.setenv("ANOMALY_MODEL_PUBLIC_KEY_FILE", str(public))
    assert "no signature" in run("promote", NAME, 1, "--model-store", store)[2]
    code, _, errors = run(*TRAIN, "--model-store", tmp_path / "new", "--promote")
    assert code == 2
    assert "has no signature" in " ".join(errors.replace("│", " ").split())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["byte", "extra"])
def test_a_damaged_version_is_not_signed(tmp_path, damage):
    """`sign` rejects a version that differs from its manifest or contains a file outside of it."""
    private, _ = write_keys(tmp_path, "publisher")
    store = copy(tmp_path / "store", 1)
    folder = store / NAME / "1"
    if damage == "byte":
        flip(folder / "model.pt")
    else:
        (folder / "notes.txt").write_text("later")
    code, _, errors = run("sign", NAME, 1, "--private-key", private, "--model-store", store)
    assert code == 2
    assert ("SHA-256 differs" if damage == "byte" else "notes.txt is not in manifest.json") in errors
    assert not (folder / "model.sig").exists()


@pytest.mark.parametrize("replaced", ["manifest", "module", "extra"])
def test_what_was_not_verified_is_not_signed(tmp_path, monkeypatch, replaced):
    """A version that is replaced between the checks and the signature gets none, and no signature leaves `sign`."""
    private, _ = write_keys(tmp_path, "publisher")
    store, other = copy(tmp_path / "store", 1), copy(tmp_path / "other", 1) / NAME / "1"
    if replaced == "manifest":
        change(other, normal_class="another class")
    elif replaced == "module":
        flip(other / "model.pt")
    else:
        (other / "notes.txt").write_text("later")
    verify = signing.verify

    def verify_and_replace(*given):
        lock = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
        found = verify(*given)
        (store / NAME / "1").rename(tmp_path / "verified")
        other.rename(store / NAME / "1")
        return found

    monkeypatch.setattr(signing, "verify", verify_and_replace)
    code, _, errors = run("sign", NAME, 1, "--private-key", private, "--model-store", store)
    assert code == 2
    words = {"manifest": "manifest.json is not the file that was signed", "module": "model.pt is not the file that was"}
    assert words.get(replaced, "notes.txt is not in manifest.json") in " ".join(errors.split())
    assert not [*tmp_path.rglob("model.sig"), *store.glob(".staging-*")]


def test_a_key_that_cannot_sign_is_rejected(tmp_path):
    """`sign` names the file if it is missing, a public key or a private key of another curve."""
    from cryptography.hazmat.primitives.asymmetric import ec

    store = copy(tmp_path / "store", 1)
    _, public = write_keys(tmp_path, "publisher")
    other_curve, _ = write_keys(tmp_path, "p384", ec.SECP384R1())
    for path in (public, other_curve):
        code, _, errors = run("sign", NAME, 1, "--private-key", path, "--model-store", store)
        assert code == 2
        assert f"{path} is not a PEM file with an unencrypted private key of the curve P-256" in errors.replace(
            "\n", ""
        )
    assert "No such file" in run("sign", NAME, 1, "--private-key", tmp_path / "none", "--model-store", store)[2]
