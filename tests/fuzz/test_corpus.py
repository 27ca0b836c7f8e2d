"""No input of the corpus violates the assertions of its target, and the targets detect a violation."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.http import multipart, npy
from app.http.forms import FormReader
from app.images import png
from tests import pngs
from tests.fuzz.__main__ import CORPUS, NAMES
from tests.fuzz.targets import TARGETS


def corpus(name: str) -> list[Path]:
    """Return the inputs of a target in the corpus."""
    return sorted((CORPUS / name).iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_holds_the_promises(name):
    """No input of the corpus violates an assertion of its target."""
    inputs = corpus(name)
    assert len(inputs) > 5
    for path in inputs:
        try:
            TARGETS[name](path.read_bytes())
        except BaseException as error:
            error.add_note(f"input: {path}")
            raise


def test_the_targets_have_names():
    """The command line and the corpus have the same targets."""
    assert set(NAMES) == set(TARGETS) == {path.name for path in CORPUS.iterdir()}


def _fails(name: str) -> bool:
    for path in corpus(name):
        try:
            TARGETS[name](path.read_bytes())
        except Exception:
            return True
    return False


def test_another_pixel_is_found(monkeypatch):
    """The target of PNGs fails if the decoder returns one pixel too dark, on both of its paths."""
    original = png.decode
    monkeypatch.setattr(png, "decode", lambda file: original(file)[:-1] + b"\0")
    assert _fails("png")


def test_a_difference_of_the_fast_path_is_found(monkeypatch):
    """The target of PNGs fails if only the fast path of the decoder accepts a file."""
    monkeypatch.setattr(png, "_usual", lambda _: pngs.rows(pngs.gradient()))
    assert _fails("png")


def test_a_cut_that_matters_is_found(monkeypatch):
    """The targets of forms fail if a reader loses a byte at the start of each later piece."""
    feed = FormReader.feed
    fed: set[int] = set()

    def lossy(reader: FormReader, data: bytes) -> None:
        feed(reader, data[1:] if id(reader) in fed else data)
        fed.add(id(reader))

    monkeypatch.setattr(FormReader, "feed", lossy)
    assert _fails("form")
    fed.clear()
    assert _fails("forms")


def test_another_image_of_the_fast_path_is_found(monkeypatch):
    """The target of forms fails if the fast path cuts one byte too few."""
    original = multipart._only_part
    monkeypatch.setattr(multipart, "_only_part", lambda *given: (found := original(*given)) and found + b"\r")
    assert _fails("form")


def test_an_array_that_numpy_rejects_is_found(monkeypatch):
    """The target of arrays fails if another type is read as bytes."""
    original = npy.parse_header

    def as_bytes(content: bytes) -> npy.Header | None:
        header = original(content)
        return header and header._replace(dtype=npy.np.dtype(npy.np.uint8), fortran=False)

    monkeypatch.setattr(npy, "parse_header", as_bytes)
    assert _fails("npy")
