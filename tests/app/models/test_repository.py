"""Reading an untrusted model store: every invalid version is rejected with an error that names it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.models import repository
from app.models.repository import Repository, RepositoryError, sha256
from tests import model_stores
from tests.conftest import MODEL_STORE, unprivileged

SHIPPED = MODEL_STORE
NAME = "zero-article"


@pytest.fixture
def root(tmp_path) -> Path:
    """Return a copy of the shipped model store, to be damaged."""
    shutil.copytree(SHIPPED / NAME, tmp_path / "store" / NAME)
    return tmp_path / "store"


@pytest.fixture
def folder(root) -> Path:
    """Return the folder of version 1 in that copy."""
    return root / NAME / "1"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a version's manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace(folder: Path, file: str, content: bytes) -> None:
    """Replace a file of a version, and its checksum with it: the damage of a bad publisher."""
    (folder / file).write_bytes(content)
    edit(folder, lambda manifest: manifest["files"].update({file: sha256(content)}))


def array(values: Any) -> bytes:
    """Return the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values))
    return buffer.getvalue()


def refused(root: Path, message: str) -> None:
    """Fail unless version 1 is rejected with an error that contains `message` and its name."""
    with pytest.raises(RepositoryError, match=message) as caught:
        Repository(root).open(NAME, 1)
    assert str(caught.value).startswith(f"{NAME}@1: ")


def test_the_shipped_version_opens(root):
    """The shipped model is listed, current and complete, with the number of scores in its manifest."""
    repository = Repository(root)
    assert repository.names() == [NAME]
    assert repository.versions(NAME) == [1]
    assert repository.current(NAME) == 1
    artifact = repository.open(NAME, 1)
    assert artifact.key == (NAME, 1)
    assert len(artifact.calibration.scores) == artifact.manifest.calibration.n
    assert len(artifact.golden.images) == len(artifact.golden.mse)
    for file in artifact.manifest.files:
        assert repository.read(artifact.manifest, file)


@pytest.mark.parametrize("file", ["model.pt", "calibration.npy", "golden.npz"])
def test_a_flipped_bit_is_refused(root, folder, file):
    """One flipped bit in the middle of any file that influences verdicts is detected."""
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    refused(root, "SHA-256 differs")


@pytest.mark.parametrize("file", ["manifest.json", "model.pt", "calibration.npy", "golden.npz"])
def test_a_missing_file_is_refused(root, folder, file):
    """A version without a required file is rejected, and the error names the file."""
    (folder / file).unlink()
    refused(root, f"{file} is missing")


@pytest.mark.parametrize("file", ["model.pt", "calibration.npy", "golden.npz"])
def test_an_unlisted_file_is_refused(root, folder, file):
    """A manifest without the checksum of a file that influences verdicts is rejected."""
    edit(folder, lambda manifest: manifest["files"].pop(file))
    refused(root, f"lists no checksum of {file}")


def test_a_link_out_of_the_store_is_refused(root, folder, tmp_path):
    """A file that is a link to another place is rejected, even if its content is right."""
    shutil.move(folder / "model.pt", tmp_path / "model.pt")
    (folder / "model.pt").symlink_to(tmp_path / "model.pt")
    refused(root, "does not lie inside the version")


def test_a_version_that_is_a_link_is_refused(root, folder, tmp_path):
    """A version's folder that is a link to another place is rejected."""
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    refused(root, "does not lie inside the version")


@pytest.mark.parametrize("path", ["../../../secret", "/etc/hostname", "report/../../../../secret"])
def test_a_path_that_leaves_the_version_is_refused(root, folder, tmp_path, path):
    """A path in the manifest that leaves the version is not read, even if its checksum is right."""
    (tmp_path / "secret").write_bytes(b"secret")
    edit(folder, lambda manifest: manifest["files"].update({path: sha256(b"secret")}))
    repository = Repository(root)
    with pytest.raises(RepositoryError, match="does not lie inside the version"):
        repository.read(repository.manifest(NAME, 1), path)


def test_a_file_that_the_manifest_does_not_list_is_not_read(root, folder):
    """A file that the manifest does not list is ignored."""
    (folder / "extra.txt").write_text("extra")
    repository = Repository(root)
    with pytest.raises(RepositoryError, match=r"does not list extra\.txt"):
        repository.read(repository.manifest(NAME, 1), "extra.txt")


@pytest.mark.parametrize(
    "content", [b"", b"two", b"-1", b"0", b"01", b"1.0", b"1 2", b"../1", "１".encode(), b"\xff\xfe"]
)
def test_a_current_that_is_no_number_is_refused(root, content):
    """CURRENT holds one positive number in ASCII and nothing else."""
    (root / NAME / "CURRENT").write_bytes(content)
    with pytest.raises(RepositoryError, match="CURRENT"):
        Repository(root).current(NAME)


def test_a_current_that_is_a_folder_is_refused(root):
    """A file CURRENT that cannot be read is an error, and does not count as missing."""
    (root / NAME / "CURRENT").unlink()
    (root / NAME / "CURRENT").mkdir()
    with pytest.raises(RepositoryError, match="cannot be read"):
        Repository(root).current(NAME)


@pytest.mark.parametrize("name", ["", "..", "../store", "Zero", "zero/1", "nothing", ".hidden", "a" * 64])
def test_a_name_that_is_no_model_has_nothing(root, name):
    """Names that no model can have, and unknown ones, have no versions and no current one."""
    assert Repository(root).versions(name) == []
    assert Repository(root).current(name) is None


def test_a_missing_store_is_empty(tmp_path):
    """A missing store has no models."""
    assert Repository(tmp_path / "nowhere").names() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
        ({"alpha": 1.5}, "alpha"),
        ({"threshold": 0.5}, "the threshold is not the one"),
        ({"alpha": 0.0001}, "needs at least 9999 calibration images"),
        ({"name": "other"}, "says it is other@1"),
        ({"version": 2}, f"says it is {NAME}@2"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_manifest_that_contradicts_itself_is_refused(root, folder, change, message):
    """A manifest of another schema, name or number, or with a threshold that differs from its scores, is rejected."""
    edit(folder, lambda manifest: manifest.update(change))
    refused(root, message)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_manifest_that_is_no_json_is_refused(root, folder, content):
    """A manifest that cannot be parsed is rejected."""
    (folder / "manifest.json").write_bytes(content)
    refused(root, r"manifest\.json is not valid")


@pytest.mark.parametrize(
    "scores",
    [[3.0, 1.0, 2.0], [1.0, 2.0], [[1.0, 2.0]], [np.nan] * 1200, [*range(1199), np.inf]],
    ids=["unsorted", "too few", "a table", "no numbers", "infinite"],
)
def test_calibration_scores_that_are_none_are_refused(root, folder, scores):
    """Scores that are not a sorted list of finite numbers of the recorded length are rejected."""
    replace(folder, "calibration.npy", array(np.asarray(scores, np.float32)))
    refused(root, r"calibration\.npy")


@pytest.mark.parametrize("change", ["swapped", "a table", "lower threshold", "higher threshold"])
def test_calibration_scores_of_the_right_number_are_checked(root, folder, change):
    """Scores that are not sorted, or in a table, or that give another threshold, are rejected; equal scores are not."""
    scores = np.load(folder / "calibration.npy")
    equal = scores.copy()
    equal[1] = equal[0]
    replace(folder, "calibration.npy", array(equal))
    assert Repository(root).open(NAME, 1)
    changed = {
        "swapped": np.concatenate([scores[1:2], scores[:1], scores[2:]]),
        "a table": scores[:, None],
        "lower threshold": scores * np.float32(0.9),
        "higher threshold": scores * np.float32(1.1),
    }[change]
    replace(folder, "calibration.npy", array(changed))
    refused(root, r"sorted scores|list of finite scores|threshold is not the one")


def test_the_first_contradiction_of_a_manifest_is_named(root, folder):
    """Of several wrong members, the message names the first one of the schema."""
    edit(folder, lambda manifest: manifest.update(schema_version=2, alpha=1.5))
    refused(root, r"manifest\.json is not valid: schema_version: ")


@pytest.mark.parametrize("file", ["calibration.npy", "golden.npz"])
@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half an archive", array([{"a": "pickle"}])])
def test_files_that_are_no_arrays_are_refused(root, folder, file, content):
    """Files with the right checksum that are not arrays, including pickles, are rejected."""
    replace(folder, file, content)
    refused(root, "cannot be read")


def golden(**changed: Any) -> bytes:
    """Return a golden.npz with the arrays of the shipped version, some of them replaced."""
    with np.load(SHIPPED / NAME / "1" / "golden.npz") as arrays:
        content = {**arrays, **changed}
    buffer = io.BytesIO()
    np.savez(buffer, **content)
    return buffer.getvalue()


def undeflatable() -> bytes:
    """Return the shipped golden.npz with its first array damaged where it is deflated."""
    content = bytearray((SHIPPED / NAME / "1" / "golden.npz").read_bytes())
    content[80:112] = b"\xff" * 32
    return bytes(content)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("calibration.npy", golden()),
        ("calibration.npy", array(["a", "b"])),
        ("golden.npz", undeflatable()),
        ("golden.npz", golden(mse=np.array(["a", "b"]))),
        ("golden.npz", golden(images=np.zeros((2, 1, 28, 28)))),
    ],
    ids=["an archive", "text", "damaged inside", "text inside", "other types"],
)
def test_arrays_of_another_kind_are_refused(root, folder, file, content):
    """Other formats that numpy reads, and damage that it finds only during reading, are rejected as well."""
    replace(folder, file, content)
    refused(root, r"cannot be read|of other types")


def test_a_current_with_too_many_digits_is_refused(root):
    """Python converts no number of thousands of digits."""
    (root / NAME / "CURRENT").write_text("1" * 5000)
    with pytest.raises(RepositoryError, match="does not hold a version number"):
        Repository(root).current(NAME)
    for digits, known in ((8, True), (9, True), (10, False)):
        assert repository.is_version("1" * digits) is known


def test_a_store_is_required_to_have_a_model(root, tmp_path):
    """The message says whether the folder is missing, empty, or contains no model with a current version."""
    Repository(root).require_models()
    empty = tmp_path / "empty"
    with pytest.raises(RepositoryError, match="there is no model store"):
        Repository(empty).require_models()
    empty.mkdir()
    with pytest.raises(RepositoryError, match="empty is empty; set"):
        Repository(empty).require_models()
    (root / NAME / "CURRENT").unlink()
    with pytest.raises(RepositoryError, match="contains no model with a current version"):
        Repository(root).require_models()


@pytest.mark.parametrize("reason", ['say "no"', "", "Ink", "a\nb"])
def test_a_reason_is_a_plain_word(root, folder, reason):
    """A reason is a lower-case word without characters that JSON escapes, because replies contain it."""
    edit(folder, lambda manifest: manifest.update(reasons=[reason]))
    refused(root, r"reasons\.0")


def test_a_store_that_cannot_be_read_lists_no_versions(root: Path) -> None:
    """While the folder cannot be read, the list of versions is empty, without an error."""
    repository = Repository(root)
    assert repository.versions(NAME) == [1]
    root.chmod(0)
    with unprivileged():
        assert repository.versions(NAME) == []
    root.chmod(0o700)


def test_a_store_that_cannot_be_read_lacks_no_model(root: Path) -> None:
    """A disk that cannot be read is not a store whose models were deleted: the current versions keep serving."""
    repository = Repository(root)
    assert not repository.lacks(NAME)
    assert repository.lacks("another")
    root.chmod(0)
    with unprivileged():
        assert not repository.lacks("another")
    root.chmod(0o700)
    shutil.rmtree(root)
    assert not repository.lacks("another")


def test_an_entry_that_cannot_be_read_hides_no_other(root: Path) -> None:
    """A model or version that cannot be read is listed, so that its error is reported, and the others are found."""
    model_stores.link(root / "bad", model_stores.UNREADABLE)
    model_stores.link(root / NAME / "7", model_stores.UNREADABLE)
    repository = Repository(root)
    repository.require_models()
    assert repository.names() == ["bad", NAME]
    assert repository.versions(NAME) == [1, 7]
    with pytest.raises(RepositoryError, match="bad: CURRENT cannot be read"):
        repository.current("bad")
    with pytest.raises(RepositoryError, match=f"{NAME}@7: manifest.json does not lie inside"):
        repository.manifest(NAME, 7)
    model_stores.link(root / "link", model_stores.UNREADABLE)
    with pytest.raises(RepositoryError, match="cannot be read: File name too long"):
        Repository(root / "link").require_models()


def make_loop(path: Path) -> None:
    """Replace a file or folder by a symbolic link to itself."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("file", ["manifest.json", "model.pt", "calibration.npy", "golden.npz", ""])
def test_a_loop_of_links_is_refused(root: Path, folder: Path, file: str) -> None:
    """A link to itself, as a file or as the folder of the version, rejects the version with its name."""
    make_loop(folder / file)
    refused(root, "missing or cannot be read")


def test_a_current_that_is_a_loop_is_refused(root: Path) -> None:
    """The model is rejected with a reason."""
    make_loop(root / NAME / "CURRENT")
    with pytest.raises(RepositoryError, match="CURRENT cannot be read"):
        Repository(root).current(NAME)


def test_a_model_or_a_store_that_is_a_loop_has_no_versions(root: Path) -> None:
    """The model is listed, so that its error is reported; the store lists nothing. Nothing raises."""
    make_loop(root / NAME)
    repository = Repository(root)
    assert (repository.names(), repository.versions(NAME)) == ([NAME], [])
    make_loop(root)
    assert (repository.names(), repository.versions(NAME)) == ([], [])


@pytest.mark.parametrize("file", ["CURRENT", "1/manifest.json", "1/model.pt"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_file_that_blocks_or_never_ends_is_refused(root: Path, file: str, kind: str) -> None:
    """Opening a FIFO waits for a writer, and /dev/zero has no end; both are rejected at once."""
    path = root / NAME / file
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    repository = Repository(root)
    if file == "CURRENT":
        with pytest.raises(RepositoryError, match="CURRENT cannot be read"):
            repository.current(NAME)
    else:
        refused(root, "missing or cannot be read|does not lie inside")


def test_a_huge_current_is_not_read(root: Path) -> None:
    """A file of terabytes takes no memory."""
    with (root / NAME / "CURRENT").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(RepositoryError, match="CURRENT does not hold"):
        Repository(root).current(NAME)


class Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the call that unpickling makes."""
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["calibration.npy", "golden.npz"])
def test_a_pickle_in_an_array_is_not_executed(root: Path, folder: Path, tmp_path: Path, file: str) -> None:
    """A version whose arrays contain Python objects is rejected, and no code of a pickle runs before that."""
    marker = tmp_path / "executed"
    objects = np.array([Payload(marker)], dtype=object)
    content = io.BytesIO()
    if file == "calibration.npy":
        np.save(content, objects, allow_pickle=True)
    else:
        np.savez(content, images=objects, mse=objects, reconstructions=objects)
    replace(folder, file, content.getvalue())
    refused(root, "cannot be read")
    assert not marker.exists()
    content.seek(0)
    loaded = np.load(content, allow_pickle=True)
    assert len(loaded if file == "calibration.npy" else loaded["images"]) == 1
    assert marker.exists()  # the payload works where pickles are allowed
