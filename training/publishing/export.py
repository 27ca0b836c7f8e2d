"""Export of a scoring module to TorchScript, with a comparison of the outputs of both.

This is the only module of `training` that uses torch.jit.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from app.inference.detector import Detector, torchscript_allowed
from app.inference.device import one_thread
from app.models.repository import Golden
from training.networks.reexpressed import reexpressed

TOLERANCE = 1e-5
"""Maximum relative difference between scores of the Python module and of TorchScript, and maximum absolute difference
between their reconstructions."""


class ExportError(Exception):
    """A module that cannot be scripted, breaks the contract, or has other outputs in TorchScript."""


@dataclass(frozen=True)
class Exported:
    """An exported module.

    Attributes:
        model: TorchScript bytes.
        golden: golden images with the outputs of these bytes.
    """

    model: bytes
    golden: Golden


def export(scoring: nn.Module, golden_images: NDArray[np.uint8]) -> Exported:
    """Script a scoring module on the CPU, and compare the outputs of both on the golden images.

    Args:
        scoring: module with the four outputs of docs/decisions/0002-four-outputs.md.
        golden_images: images of every label, uint8 [n, 28, 28].

    Raises:
        ExportError: the module cannot be scripted, breaks the contract, or has other outputs in TorchScript.
    """
    module = scoring.to("cpu").eval()
    images = np.ascontiguousarray(golden_images[:, None])
    content = _script(reexpressed(module))
    with one_thread():
        exported = Detector.open(content, torch.device("cpu")).detect(images)
    with torch.inference_mode():
        mse, reconstruction, error_map, reason = (part.numpy() for part in module(torch.from_numpy(images)))
    n = len(images)
    shapes = {"mse": (n,), "reconstruction": (n, 1, 28, 28), "error_map": (n, 28, 28), "reason": (n,)}
    for name, shape in shapes.items():
        if getattr(exported, name).shape != shape:
            raise ExportError(f"{name} has the shape {getattr(exported, name).shape}; the contract requires {shape}")
    _compare("mse", exported.mse, mse)
    # Near black, a sigmoid makes relative differences out of rounding. On the scale from black to white, a difference
    # of 1e-5 is 1/400 of a grey level.
    _compare("reconstruction", exported.reconstruction, reconstruction, floor=1.0)
    _compare("error map", exported.error_map.mean((1, 2)), error_map.mean((1, 2)))
    _compare("mean of the error map", exported.mse, exported.error_map.mean((1, 2)))
    if (exported.reason != reason).any():
        raise ExportError("reason: the Python module and TorchScript differ")
    if exported.reconstruction.min() < 0.0 or exported.reconstruction.max() > 1.0:
        raise ExportError("the reconstruction is outside 0..1")
    return Exported(content, Golden(images, exported.mse, exported.reconstruction))


def golden_images(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], normal: tuple[int, ...], *, normals: int = 12, others: int = 2
) -> NDArray[np.uint8]:
    """Return the golden images: the first normal images, the first images of each other label, and a blank image.

    Args:
        images: test images, uint8 [n, 28, 28].
        labels: their labels, uint8 [n].
        normal: labels of the normal class.
        normals: number of normal images.
        others: number of images of each other label.
    """
    is_normal = np.isin(labels, normal)
    chosen = list(np.flatnonzero(is_normal)[:normals])
    for label in np.unique(labels[~is_normal]):
        chosen += list(np.flatnonzero(labels == label)[:others])
    return np.concatenate([images[chosen], np.zeros((1, 28, 28), np.uint8)])


def _script(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    try:
        with torchscript_allowed():
            torch.jit.save(torch.jit.script(module), buffer)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"the module cannot be scripted: {error}") from error
    return _without_debug_files(buffer.getvalue())


def _without_debug_files(archive: bytes) -> bytes:
    # The debug files contain paths and source lines of this machine; scores do not depend on them.
    stripped = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(stripped, "w") as target:
        for entry in sorted(source.infolist(), key=lambda entry: entry.filename):
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(entry.filename), source.read(entry), zipfile.ZIP_DEFLATED)
    return stripped.getvalue()


def _compare(name: str, exported: NDArray[np.float32], eager: NDArray[np.float32], floor: float = 1e-3) -> None:
    """Raise ExportError if the relative difference is too large; `floor` is the minimum of the denominator."""
    difference = np.abs(exported - eager) / np.maximum(np.abs(eager), floor)
    if not difference.max() <= TOLERANCE:
        raise ExportError(f"{name}: the outputs differ by {difference.max():.2g}; the maximum is {TOLERANCE:g}")
