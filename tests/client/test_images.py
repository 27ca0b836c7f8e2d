"""The forms of an image that the client accepts."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anomaly import AsyncClient, Client, Score, UnreadableImage
from anomaly.client import images
from tests.client.test_faults import answering, good
from tests.conftest import EXAMPLES, ROOT

ZERO = EXAMPLES / "zero.png"
FORMS: dict[str, Callable[[], Any]] = {
    "text": lambda: str(ZERO),
    "path": lambda: ZERO,
    "bytes": ZERO.read_bytes,
    "bytearray": lambda: bytearray(ZERO.read_bytes()),
    "memoryview": lambda: memoryview(ZERO.read_bytes()),
    "file": lambda: io.BytesIO(ZERO.read_bytes()),
    "array": lambda: np.array(Image.open(ZERO)),
    "transposed array": lambda: np.array(Image.open(ZERO)).T.copy().T,
    "picture": lambda: Image.open(ZERO),
}


def pixels(png: bytes) -> list[int]:
    """Return the pixels of a PNG."""
    with Image.open(io.BytesIO(png)) as image:
        return list(image.convert("L").tobytes())


@pytest.mark.parametrize("form", FORMS)
async def test_every_form_is_the_same_image(form: str) -> None:
    """Both clients send the same pixels for a path, bytes, a file object, an array and a Pillow image."""
    expected = pixels(ZERO.read_bytes())
    with Client("http://127.0.0.1:1") as service:
        sent = answering(service, good)
        assert isinstance(service.score(FORMS[form]()), Score)
        assert [type(score) for score in service.score_many([FORMS[form]()])] == [Score]
    async with AsyncClient("http://127.0.0.1:1") as other:
        sent += answering(other, good)
        assert isinstance(await other.score(FORMS[form]()), Score)
    assert [pixels(request.content) for request in sent] == [expected] * len(sent)
    assert sent


@given(st.data())
def test_an_array_becomes_a_png_with_its_values(data: st.DataObject) -> None:
    """A uint8 array of any height and width keeps every value."""
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    raw = data.draw(st.binary(min_size=height * width, max_size=height * width))
    array = np.frombuffer(raw, np.uint8).reshape(height, width)
    with Image.open(io.BytesIO(images.read(array))) as image:
        assert (np.asarray(image) == array).all()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros((28, 28)), "uint8.*float64.*255"),
        (np.zeros((28, 28), np.int64), "uint8"),
        (np.zeros((2, 28, 28), np.uint8), "score_array"),
        (np.zeros((0, 28), np.uint8), r"\[0, 28\]"),
        (io.StringIO("text"), "mode='rb'"),
        (7, "not int"),
        (None, "not NoneType"),
        (["zero.png"], "not list"),
    ],
    ids=["floats", "integers", "stack", "empty array", "text file", "number", "none", "list"],
)
def test_other_values_are_type_errors(value: Any, words: str) -> None:
    """A value that is not an image raises `TypeError`, which states the accepted types, and nothing is sent."""
    with Client("http://127.0.0.1:1") as service:
        sent = answering(service, good)
        with pytest.raises(TypeError, match=words):
            service.score(value)
        with pytest.raises(TypeError, match=words):
            list(service.score_many([value]))
    assert sent == []


def test_files_without_an_image_are_unreadable(tmp_path: Path) -> None:
    """An empty file, a link to a missing file and a folder are separate results with the reason."""
    (tmp_path / "empty.png").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for name, words in (("empty.png", "empty"), ("link.png", "link"), ("", "directory")):
        with pytest.raises(UnreadableImage, match=words):
            images.read(tmp_path / name)


def test_a_photo_keeps_its_orientation_and_no_other_tag(tmp_path: Path) -> None:
    """A Pillow image from a rotated photo is sent with its orientation; its place and its camera are not sent."""
    photo, tags = Image.new("L", (40, 30)), Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "a camera"
    photo.save(tmp_path / "photo.jpg", exif=tags)
    with Image.open(tmp_path / "photo.jpg") as image, Image.open(io.BytesIO(images.read(image))) as sent:
        assert dict(sent.getexif()) == {0x0112: 6}


@pytest.mark.process
def test_numpy_is_imported_by_the_caller_only() -> None:
    """Scoring a path or bytes imports neither numpy nor Pillow."""
    code = (
        "import sys; from anomaly.client import images; images.read(sys.argv[1]); images.read(b'x')\n"
        "print({'numpy', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ZERO)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("count", [1, 3, 10_000])
def test_a_stack_becomes_an_npy_file(count: int) -> None:
    """numpy reads what the client writes, also for an array that is not contiguous."""
    stack = (np.arange(count * 784) % 251).astype(np.uint8).reshape(count, 28, 28)[:, ::-1]
    assert (np.load(io.BytesIO(images.npy(stack))) == stack).all()
