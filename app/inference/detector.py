"""One model version on its device: loads TorchScript, verifies the golden scores, runs forward passes."""

from __future__ import annotations

import functools
import inspect
import io
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from app.inference.buffers import Buffers
from app.models.repository import Artifact, Golden

STEP = 64
"""Default number of images per forward pass where many images are scored; uint8 [64, 1, 28, 28]."""
GOLDEN_TOLERANCE = 1e-3
"""Maximum relative difference of a golden score: rounding depends on device and kernel, the verdict must not."""

_NO_MEMORY = ("CUDA out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of error messages. TorchScript raises a plain RuntimeError for each error inside a module."""


class DetectorError(Exception):
    """The module cannot be loaded, or does not reproduce its golden scores on this device."""


@dataclass(frozen=True)
class Detections:
    """The module's output for a micro-batch of N images.

    Attributes:
        mse: float32 [N], the anomaly scores.
        reconstruction: float32 [N, 1, 28, 28] in 0..1, for display.
        error_map: float32 [N, 28, 28], squared errors in the recipe's standardised space; its mean is `mse`.
        reason: int8 [N], 0 or the code of the guard that decided.
    """

    mse: NDArray[np.float32]
    reconstruction: NDArray[np.float32]
    error_map: NDArray[np.float32]
    reason: NDArray[np.int8]


@dataclass(frozen=True)
class Pictures:
    """Scores and pictures of a micro-batch of N images, as the service stores them.

    Attributes:
        mse: float32 [N], the anomaly scores.
        planes: uint8 [N, 3, 28, 28], input, reconstruction and error map; 255 stands for `peak` in the last.
        peak: float32 [N], the largest squared error of each image, never 0.
        reason: int8 [N], 0 or the code of the guard that decided.
    """

    mse: NDArray[np.float32]
    planes: NDArray[np.uint8]
    peak: NDArray[np.float32]
    reason: NDArray[np.int8]


_DRAWN = np.dtype(
    [("planes", np.uint8, (3, 28, 28)), ("mse", np.float32), ("peak", np.float32), ("reason", np.float32)]
)
_SCORED = np.dtype([("mse", np.float32), ("reason", np.float32)])
"""One output row per image, without padding."""


class _Served:
    """The methods that the service adds to a scoring module, in TorchScript: one per use, with one copy of the weights.

    They write their output rows into given memory on the device. `numbers` is a view of the bytes of `rows` as float32:
    TorchScript has no reinterpreting view.
    """

    forward: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]

    def draw_rows(
        self, images: torch.Tensor, count: int, rows: torch.Tensor, numbers: torch.Tensor, _: torch.Tensor
    ) -> int:
        given = images[:count].to(rows.device, non_blocking=True)
        mse, reconstruction, error_map, reason = self.forward(given)
        peak = error_map.flatten(1).amax(1).clamp_min(1e-12)
        shares = error_map.unsqueeze(1) / peak.view(-1, 1, 1, 1)
        planes = rows[:count, : 3 * 28 * 28].view(count, 3, 28, 28)
        planes[:, :1].copy_(given)
        planes[:, 1:].copy_(torch.cat([reconstruction, shares], 1).mul_(255).round_())
        numbers[:count, 3 * 28 * 28 // 4 :].copy_(torch.stack([mse, peak, reason.to(torch.float32)], 1))
        return count

    def score_rows(
        self, images: torch.Tensor, count: int, _: torch.Tensor, numbers: torch.Tensor, flag: torch.Tensor, *, step: int
    ) -> int:
        # Many passes run without reacquiring the GIL, yet a single score waits for one pass at most. A GPU queues its
        # passes faster than it runs them: there the limit is the number of `images`.
        done = 0
        while done < count:
            end = min(done + step, count)
            mse, _, _, reason = self.forward(images[done:end].to(numbers.device, non_blocking=True))
            numbers[done:end].copy_(torch.stack([mse, reason.to(torch.float32)], 1))
            done = end
            if bool(flag):
                break
        return done


_METHODS = tuple(textwrap.dedent(inspect.getsource(method)) for method in (_Served.draw_rows, _Served.score_rows))


class Detector:
    """A scoring module on its device. The constructor adds methods to the module, so it takes a module once.

    Build it with `Detector.load`, which rejects a module that does not reproduce its golden scores.

    Args:
        module: a scoring module.
        device: where to score.
        step: number of images per forward pass of `score`.
        others_waiting: one byte; while it is not 0, `score` returns after the current forward pass.
    """

    def __init__(
        self,
        module: torch.jit.ScriptModule,
        device: torch.device,
        *,
        step: int = STEP,
        others_waiting: bytearray | None = None,
    ) -> None:
        flag = torch.frombuffer(bytearray(1) if others_waiting is None else others_waiting, dtype=torch.uint8)
        with torchscript_allowed():
            # `torch.jit.script` never frees the code of a module of which another scripted module is a part.
            for method in _METHODS:
                # `define` itself leaves a reference cycle, which keeps the module until the next garbage collection.
                module.eval()._c._define(module._concrete_type, method, {"torch": torch}.get)
            # A frozen module has no parameters to move, so it is moved first.
            content = io.BytesIO()
            torch.jit.save(module, content)
            content.seek(0)
            served = torch.jit.load(content, map_location=device)  # type: ignore[no-untyped-call]
            self._module: torch.jit.ScriptModule = torch.jit.freeze(
                served.eval(), preserved_attrs=["draw_rows", "score_rows"]
            )
        self._device, self._step = device, step
        self._draw = Buffers(self._module.draw_rows, _DRAWN, device, flag)
        self._score = Buffers(functools.partial(self._module.score_rows, step=step), _SCORED, device, flag)

    @classmethod
    def load(
        cls,
        artifact: Artifact,
        device: torch.device,
        batch_sizes: Iterable[int] = (1, 2),
        *,
        step: int = STEP,
        others_waiting: bytearray | None = None,
    ) -> Detector:
        """Load a version onto a device, warm it up and compare its golden scores.

        Args:
            artifact: a version whose checksums have been compared.
            device: where to score.
            batch_sizes: the sizes to warm up, so that no request pays for a first call.
            step, others_waiting: as in the class docstring.

        Raises:
            DetectorError: the bytes are not a TorchScript module of the contract, or the golden scores differ.
        """
        label = "{}@{}".format(*artifact.key)
        with _failures_of(label):
            detector = cls.open(artifact.model, device, step=step, others_waiting=others_waiting)
            detector.warm_up(batch_sizes)
            found = detector.detect(np.ascontiguousarray(artifact.golden.images))
        _compare(label, artifact.golden, found)
        if found.reason.max() > len(artifact.manifest.reasons) or found.reason.min() < 0:
            raise DetectorError(f"{label}: a guard returned a code that the manifest does not name")
        with _failures_of(label):
            for mse in detector._served_scores(artifact.golden.images):
                _compare_scores(label, artifact.golden, mse)
        return detector

    @classmethod
    def open(
        cls, content: bytes, device: torch.device, *, step: int = STEP, others_waiting: bytearray | None = None
    ) -> Detector:
        """Open TorchScript bytes without comparing scores: training records the golden scores with it.

        Args:
            content: of `model.pt`.
            device: where to score.
            step, others_waiting: as for the class.

        Raises:
            RuntimeError: the bytes are not a TorchScript module.
        """
        with torchscript_allowed():
            module = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
        return cls(module, device, step=step, others_waiting=others_waiting)

    def _served_scores(self, images: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        """Yield the scores of N images by every path of the service: with and without pictures, together and alone."""
        images = np.ascontiguousarray(images)
        alone, steps = np.split(images, len(images)), np.split(images, range(self._step, len(images), self._step))
        yield self.draw(images).mse
        yield np.concatenate([self.draw(image).mse for image in alone])
        yield np.concatenate([self.score(step)[0] for step in steps])
        yield np.concatenate([self.score(image)[0] for image in alone])

    def detect(self, images: NDArray[np.uint8]) -> Detections:
        """Run one forward pass and return all of its output.

        Args:
            images: raw pixels, uint8 [N, 1, 28, 28], contiguous.

        Raises:
            RuntimeError: the module failed on this device, for example because memory ran out.
        """
        with torch.inference_mode():
            found = self._module(torch.from_numpy(images).to(self._device))
            return Detections(*(tensor.cpu().numpy() for tensor in found))

    def score(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Score many images without pictures, and return early when other work waits. Errors as for `detect`.

        Args:
            images: as for `detect`.

        Returns:
            mse, float32 [M], and reason, int8 [M], of the first M images: at least `step`, or all.
        """
        rows = self._score(images)
        return rows["mse"], rows["reason"].astype(np.int8)

    def draw(self, images: NDArray[np.uint8]) -> Pictures:
        """Score a micro-batch and return the pictures to store. Arguments and errors as for `detect`."""
        rows = self._draw(images)
        return Pictures(rows["mse"], rows["planes"], rows["peak"], rows["reason"].astype(np.int8))

    def score_alone(self, image: NDArray[np.uint8]) -> float:
        """Return the score of one image, uint8 [1, 1, 28, 28]. A repeated call returns the same score.

        Errors as for `detect`.
        """
        return float(self.score(image)[0][0])

    def warm_up(self, batch_sizes: Iterable[int]) -> None:
        """Score each batch size twice, because TorchScript optimises on the second call."""
        for size in batch_sizes:
            for _ in range(2):
                self.draw(np.zeros((size, 1, 28, 28), np.uint8))
                self.score(np.zeros((size, 1, 28, 28), np.uint8))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of the device or of the process ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in _NO_MEMORY)


@contextmanager
def torchscript_allowed() -> Iterator[None]:
    """Silence exactly the deprecation warnings of `torch.jit`. Docs/decisions/0001 has the reasons for this format."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=DeprecationWarning)
        yield


@contextmanager
def _failures_of(label: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise DetectorError(f"{label}: model.pt is not a scoring module: {_first_line(error)}") from error


def _compare(label: str, golden: Golden, found: Detections) -> None:
    if found.mse.size == 0 or not np.isfinite(found.mse).all():
        raise DetectorError(f"{label}: the golden images do not get finite scores here")
    if found.mse.shape != golden.mse.shape or found.reconstruction.shape != golden.reconstructions.shape:
        raise DetectorError(f"{label}: the golden images, scores and reconstructions do not belong together")
    _compare_scores(label, golden, found.mse)
    picture = np.abs(found.reconstruction - golden.reconstructions).max()
    if not picture <= 10 * GOLDEN_TOLERANCE:
        raise DetectorError(f"{label}: golden reconstructions differ by up to {picture:.2g} on this device")


def _compare_scores(label: str, golden: Golden, mse: NDArray[np.float32]) -> None:
    # The comparison rejects NaN as well.
    difference = np.abs(mse - golden.mse) / np.maximum(np.abs(golden.mse), 1e-6)
    if not difference.max() <= GOLDEN_TOLERANCE:
        raise DetectorError(f"{label}: golden scores differ by up to {difference.max():.2g} relative on this device")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
