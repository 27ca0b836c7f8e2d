"""IDX files with the names and folders of common tools, and files that are not IDX files."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.conftest import ROOT
from tests.training.commands import run
from training.data.dataset import DataError
from training.data.idx import IMAGES, LABELS
from training.data.loaders import infer_dataset, load

CASES = ROOT / "tests" / "cases"
OWN = CASES / "24-own-idx"


def ring(width: int, place: int) -> np.ndarray:
    """Return a ring; no two widths and places give the same pixels."""
    image = Image.new("L", (28, 28))
    ImageDraw.Draw(image).ellipse((8, 5, 19, 23), outline=255, width=width)
    pixels = np.array(image)
    pixels[14, 14], pixels[13, 14] = place % 256, place // 256
    return pixels


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array of unsigned bytes in the format IDX."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder of 900 images of the user's own: rings, with the label 1 for thick ones."""
    folder = tmp_path / "own"
    folder.mkdir()
    for stems, first, count in ((0, 0, 750), (1, 750, 150)):
        labels = np.arange(count) % 10 == 9
        images = np.stack([ring(5 if thick else 2, first + n) for n, thick in enumerate(labels)])
        write_idx(folder / f"{IMAGES[stems]}-ubyte", images)
        write_idx(folder / f"{LABELS[stems]}-ubyte", labels)
    return folder


def test_names_with_a_dot_are_read() -> None:
    """Files that 7-Zip has unpacked have a dot in their names."""
    folder = CASES / "23-idx-with-a-dot"
    assert infer_dataset(folder) == "mnist"
    assert load("idx", folder).images.shape == (9, 28, 28)


@pytest.mark.parametrize(
    "layout", ["hyphen", "dot", "gzip", "gzip in name only", "no gzip in the name", "folders", "torchvision"]
)
def test_every_layout_is_read(tmp_path: Path, layout: str) -> None:
    """The layouts of torchvision, 7-Zip, browsers and archive pages give the same images and labels."""
    for path in OWN.glob("*-ubyte"):
        content, folder, name = path.read_bytes(), tmp_path, path.name
        if layout == "dot":
            name = name.replace("-idx", ".idx")
        elif layout == "folders":
            folder, name = tmp_path / name, name.replace("-idx", ".idx")
        elif layout == "torchvision":
            folder = tmp_path / "MNIST" / "raw"
        elif layout == "gzip":
            name, content = f"{name}.gz", gzip.compress(content, mtime=0)
        elif layout == "gzip in name only":
            name = f"{name}.gz"
        elif layout == "no gzip in the name":
            content = gzip.compress(content, mtime=0)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert infer_dataset(tmp_path) == "mnist"
    found, expected = load("idx", tmp_path), load("idx", OWN)
    assert found.sha256 == expected.sha256
    assert found.test_start == 6


def test_the_set_of_torchvision_is_recognised(tmp_path: Path) -> None:
    """In torchvision's folder the name of the set is a folder."""
    shutil.copytree(OWN, tmp_path / "FashionMNIST" / "raw")
    assert infer_dataset(tmp_path) == "fashion-mnist"
    with pytest.raises(DataError, match="images and labels of fashion-mnist"):
        load("fashion-mnist", tmp_path)
    shutil.copytree(OWN, tmp_path / "MNIST" / "raw")
    assert infer_dataset(tmp_path) == "mnist"


def test_a_web_page_is_named() -> None:
    """A download that is a web page is named as one."""
    folder = CASES / "s7-idx-gz-that-is-none"
    code, _, errors = run("train", "--data-dir", folder)
    assert code == 2
    assert "train-images-idx3-ubyte.gz is damaged: it is a web page" in errors.replace("\n", " ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"\0\0\x08\x03" + bytes(12) + b"x", "it has 1 bytes of data; its header says 0"),
        (b"\0\0\x0d\x03", "not an IDX file of unsigned bytes"),
        (gzip.compress(b"x" * 100, mtime=0)[:-10], "damaged"),
    ],
)
def test_what_is_no_idx_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    """The message contains the path and the reason."""
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=words):
        load("idx", tmp_path)


def test_own_files_are_refused_with_a_way_out() -> None:
    """Files that are not MNIST are not used as MNIST; the message names the right option."""
    code, _, errors = run("train", "--data-dir", OWN, "--normal", "0", "--name", "mine")
    assert code == 2
    assert "--data idx --name NAME" in " ".join(errors.split())
    code, _, errors = run("train", "--data", "idx", "--data-dir", OWN)
    assert (code, "needs --name" in " ".join(errors.split())) == (2, True)


def test_own_files_train(own: Path, tmp_path: Path) -> None:
    """With `--data idx` a model is trained, and published with the data set's name."""
    store = tmp_path / "store"
    code, out, errors = run(
        "train", "--recipe", "instant", "--data", "idx", "--data-dir", own, "--name", "mine", "--device", "cpu",
        "--promote", "--model-store", store,
    )  # fmt: skip
    assert (code, errors) == (0, "")
    assert "published mine@1 (current)" in out
    card = (store / "mine" / "1" / "report" / "model-card.md").read_text()
    assert "--data idx --data-dir FOLDER_OF_IDX_FILES" in card
