"""From a scoring module in memory to bytes that the service can serve, and proof that they say the same.

Knows: TorchScript, the contract of the artifact. Does not know: recipes, data sets, the model store. The only file of
`training` that names torch.jit.
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
from app.models.repository import Golden
from training.networks.reexpressed import reexpressed

PARITY = 1e-5
"""Largest relative difference between the scores of the module in Python and those of the exported bytes; of
reconstructions, the largest difference."""


class ExportError(Exception):
    """A module that does not script, breaks the contract, or scores differently once exported."""


@dataclass(frozen=True)
class Exported:
    """What a model version is made of: the TorchScript bytes, and golden images with what those bytes made of them."""

    model: bytes
    golden: Golden


def export(scoring: nn.Module, golden_images: NDArray[np.uint8]) -> Exported:
    """Script a scoring module on the CPU, and compare eager with exported on the golden images.

    Args:
        scoring: the module of the contract (docs/decisions/0002-four-outputs.md).
        golden_images: real images of every kind, uint8 [n, 28, 28].

    Raises:
        ExportError: it does not script, breaks the contract, or the exported bytes score differently.
    """
    module = scoring.to("cpu").eval()
    images = np.ascontiguousarray(golden_images[:, None])
    content = _script(reexpressed(module))
    found = Detector.open(content, torch.device("cpu")).detect(images)
    with torch.inference_mode():
        mse, reconstruction, error_map, reason = (part.numpy() for part in module(torch.from_numpy(images)))
    n = len(images)
    shapes = {"mse": (n,), "reconstruction": (n, 1, 28, 28), "error_map": (n, 28, 28), "reason": (n,)}
    for name, shape in shapes.items():
        if getattr(found, name).shape != shape:
            raise ExportError(f"{name} has the shape {getattr(found, name).shape}, and the contract says {shape}")
    _same("mse", found.mse, mse)
    # Near black a sigmoid turns the last bits of its argument into relative differences that nobody sees: what counts
    # is the difference on the scale from black to white, of which 1e-5 is a four hundredth of a grey level.
    _same("reconstruction", found.reconstruction, reconstruction, least=1.0)
    _same("error map", found.error_map.mean((1, 2)), error_map.mean((1, 2)))
    _same("mean of the error map", found.mse, found.error_map.mean((1, 2)))
    if (found.reason != reason).any():
        raise ExportError("the guards decide differently once exported")
    if found.reconstruction.min() < 0.0 or found.reconstruction.max() > 1.0:
        raise ExportError("the reconstruction leaves 0..1")
    return Exported(content, Golden(images, found.mse, found.reconstruction))


def golden_images(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], normal: tuple[int, ...], *, normals: int = 12, others: int = 2
) -> NDArray[np.uint8]:
    """Choose the golden images: the first normals, the first few of every other label, and a blank one.

    Args:
        images: unseen images, uint8 [n, 28, 28].
        labels: of those, [n].
        normal: the labels of the normal class.
        normals: how many normal images.
        others: how many of each other label.
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
        raise ExportError(f"the module does not script: {error}") from error
    return _without_debug_files(buffer.getvalue())


def _without_debug_files(archive: bytes) -> bytes:
    # They hold this machine's paths and source lines, and no score depends on them.
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(packed, "w") as target:
        for entry in sorted(source.infolist(), key=lambda entry: entry.filename):
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(entry.filename), source.read(entry), zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _same(what: str, found: NDArray[np.float32], expected: NDArray[np.float32], least: float = 1e-3) -> None:
    difference = np.abs(found - expected) / np.maximum(np.abs(expected), least)
    if not difference.max() <= PARITY:
        raise ExportError(f"{what}: eager and exported differ by {difference.max():.2g}, more than {PARITY:g}")
