"""One model version in memory: the only module of the service that knows torch.

Knows: TorchScript, devices, golden samples. Does not know: queues, stores, HTTP.
"""

from __future__ import annotations

import ctypes
import io
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from app.models.repository import Artifact, Golden

STEP = 64
"""Images of one forward pass where many are scored, unless told otherwise; uint8 [64, 1, 28, 28]."""
GOLDEN_TOLERANCE = 1e-3
"""Largest relative difference of a golden score: devices and kernels round differently, verdicts must not."""


class DetectorError(Exception):
    """A module that cannot be loaded, or does not reproduce its golden scores here."""


class DeviceError(Exception):
    """The device that was asked for is not there."""


@dataclass(frozen=True)
class Detections:
    """What the module made of one micro-batch of N images.

    Attributes:
        mse: float32 [N], the anomaly scores.
        reconstruction: float32 [N, 1, 28, 28] in 0..1, for people.
        error_map: float32 [N, 28, 28], squared errors in the recipe's standardised space; its mean is `mse`.
        reason: int8 [N], 0 or the code of the guard that decided.
    """

    mse: NDArray[np.float32]
    reconstruction: NDArray[np.float32]
    error_map: NDArray[np.float32]
    reason: NDArray[np.int8]


@dataclass(frozen=True)
class Pictures:
    """What the service keeps of one micro-batch of N images.

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
"""What is written of each image in one piece, without gaps."""


class _Drawing(torch.nn.Module):
    """A scoring module that also turns its floats into pixels, and writes each image's `_DRAWN` to a row."""

    def __init__(self, scoring: torch.jit.ScriptModule, device: torch.device) -> None:
        super().__init__()
        self.scoring = scoring
        self.device = device

    def forward(
        self, images: torch.Tensor, count: int, rows: torch.Tensor, numbers: torch.Tensor, _: torch.Tensor
    ) -> int:
        # `numbers` are the bytes of `rows` as float32: TorchScript cannot see one as the other itself.
        given = images[:count].to(self.device, non_blocking=True)
        mse, reconstruction, error_map, reason = self.scoring(given)
        peak = error_map.flatten(1).amax(1).clamp_min(1e-12)
        shares = error_map.unsqueeze(1) / peak.view(-1, 1, 1, 1)
        planes = rows[:count, : 3 * 28 * 28].view(count, 3, 28, 28)
        planes[:, :1].copy_(given)
        planes[:, 1:].copy_(torch.cat([reconstruction, shares], 1).mul_(255).round_())
        numbers[:count, 3 * 28 * 28 // 4 :].copy_(torch.stack([mse, peak, reason.to(torch.float32)], 1))
        return count


class _Scoring(torch.nn.Module):
    """A scoring module that writes each image's `_SCORED` to a row, `step` images a forward pass.

    It ends early, after a pass, when `others` says that somebody waits. So many passes go by without Python, for whose
    lock each call waits anew, and yet nobody waits for more than one. A GPU is given its passes faster than it does
    them: there, nobody waits for more than `images` are.
    """

    def __init__(self, scoring: torch.jit.ScriptModule, device: torch.device, step: int) -> None:
        super().__init__()
        self.scoring = scoring
        self.device = device
        self.step = step

    def forward(
        self, images: torch.Tensor, count: int, _: torch.Tensor, numbers: torch.Tensor, others: torch.Tensor
    ) -> int:
        done = 0
        while done < count:
            end = min(done + self.step, count)
            mse, _, _, reason = self.scoring(images[done:end].to(self.device, non_blocking=True))
            numbers[done:end].copy_(torch.stack([mse, reason.to(torch.float32)], 1))
            done = end
            if bool(others):
                break
        return done


class _Caller:
    """Calls one of the modules above from memory to memory, one thread at a time.

    Every tensor that Python lets go of gives Python's lock away, and a busy event loop lets this thread wait for it
    each time. So none is made: images and rows have memory that is written anew with every call.
    """

    def __init__(
        self, module: torch.nn.Module, row: np.dtype[np.void], device: torch.device, others: bytearray
    ) -> None:
        self._others = torch.frombuffer(others, dtype=torch.uint8)
        # A module scripted here and frozen leaves its weights to torch for ever; one that was loaded does not.
        content = io.BytesIO()
        torch.jit.save(torch.jit.script(module), content)
        content.seek(0)
        loaded = torch.jit.load(content, map_location=device)  # type: ignore[no-untyped-call]
        self._module: torch.jit.ScriptModule = torch.jit.freeze(loaded.eval())
        self._row = row
        self._device = device
        self._room = 0

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.void]:
        """Return the rows of those of N images, uint8 [N, 1, 28, 28] and contiguous, that the module got to."""
        count = len(images)
        if count > self._room:
            self._make_room(count)
        # Bytes are copied without giving the lock away; numpy gives it away.
        self._given[: images.nbytes] = images.data.cast("B")
        with torch.inference_mode():
            done = self._module(self._images, count, self._rows, self._numbers, self._others)
            if self._answer is not self._rows:
                self._answer[:done].copy_(self._rows[:done])
        return np.frombuffer(self._written[: done * self._row.itemsize].tobytes(), self._row)

    def _make_room(self, count: int) -> None:
        """Make memory on the device and, where that is not here, memory here that the device copies from and to."""
        self._room = 0  # should memory run out half-way, the next call begins anew
        away = self._device.type == "cuda"
        self._images = torch.empty((count, 1, 28, 28), dtype=torch.uint8, pin_memory=away)
        self._rows = torch.empty((count, self._row.itemsize), dtype=torch.uint8, device=self._device)
        self._numbers = self._rows.view(torch.float32)
        self._answer = torch.empty(self._rows.shape, dtype=torch.uint8, pin_memory=True) if away else self._rows
        self._given = self._images.numpy().data.cast("B")
        self._written = self._answer.numpy().data.cast("B")
        self._room = count


def share_heaps() -> None:
    """Tell glibc to make three heaps at most: event loop, inference, store. More threads would keep megabytes each.

    Call it before any thread is started. Nothing happens where the C library has no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 3)


def give_memory_back() -> None:
    """Tell glibc to give the kernel what is free now: starting needs more than serving. All threads wait meanwhile."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


_M_ARENA_MAX = -8


def choose_device(wanted: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:n` into a device that exists.

    Raises:
        DeviceError: CUDA was asked for and is not there, or the name means nothing.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, index = wanted.partition(":")
    if kind != "cuda" or (":" in wanted and not index.isdigit()):
        raise DeviceError(f"device {wanted!r} is none of auto, cpu, cuda, cuda:n")
    if not torch.cuda.is_available():
        raise DeviceError(f"device {wanted!r} was asked for, but torch {torch.__version__} sees no CUDA device here")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise DeviceError(f"device {wanted!r} was asked for, but there are only {count} CUDA devices here")
    return torch.device("cuda", int(index or 0))


def use_one_thread() -> None:
    """Keep torch to one intra-op thread. Call it **in** the thread that runs the model: the setting is per thread."""
    torch.set_num_threads(1)


class Detector:
    """A scoring module on its device, ready to score.

    Build it with `Detector.load`, which refuses anything that does not reproduce its golden scores.

    Args:
        module: a scoring module.
        device: where to score.
        step: images of one forward pass of `score`.
        others: one byte; while it is not 0, `score` ends after the forward pass that is under way.
    """

    def __init__(
        self, module: torch.jit.ScriptModule, device: torch.device, *, step: int = STEP, others: bytearray | None = None
    ) -> None:
        self._device = device
        others = bytearray(1) if others is None else others
        with torchscript_allowed():
            # A frozen module has no parameters left to move: the device comes first.
            module = module.eval().to(device)
            self._draw = _Caller(_Drawing(module, device), _DRAWN, device, others)
            self._score = _Caller(_Scoring(module, device, step), _SCORED, device, others)
            self._module: torch.jit.ScriptModule = torch.jit.freeze(module)

    @classmethod
    def load(
        cls,
        artifact: Artifact,
        device: torch.device,
        batch_sizes: Iterable[int] = (1, 2),
        *,
        step: int = STEP,
        others: bytearray | None = None,
    ) -> Detector:
        """Load a version onto a device, warm it up and check its golden scores.

        Args:
            artifact: a version whose checksums were compared.
            device: where to score.
            batch_sizes: the sizes to warm up, so that no request pays for a first call.
            step, others: as for the class.

        Raises:
            DetectorError: the bytes are no TorchScript module of the contract, or the golden scores differ.
        """
        label = "{}@{}".format(*artifact.key)
        with _failures_of(label):
            detector = cls.open(artifact.model, device, step=step, others=others)
            detector.warm_up(batch_sizes)
            found = detector.detect(np.ascontiguousarray(artifact.golden.images))
        _compare(label, artifact.golden, found)
        if found.reason.max() > len(artifact.manifest.reasons) or found.reason.min() < 0:
            raise DetectorError(f"{label}: a guard speaks that the manifest has no name for")
        with _failures_of(label):
            for mse in detector._served(artifact.golden.images):
                _compare_scores(label, artifact.golden, mse)
        return detector

    @classmethod
    def open(
        cls, content: bytes, device: torch.device, *, step: int = STEP, others: bytearray | None = None
    ) -> Detector:
        """Open TorchScript bytes without checking any score: for training, which records the golden scores with it.

        Args:
            content: of `model.pt`.
            device: where to score.
            step, others: as for the class.

        Raises:
            RuntimeError: the bytes are no TorchScript module.
        """
        with torchscript_allowed():
            module = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
        return cls(module, device, step=step, others=others)

    def _served(self, images: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        """Yield the scores of N images as the service makes them: with and without pictures, together and alone."""
        images = np.ascontiguousarray(images)
        alone = np.split(images, len(images))
        yield self.draw(images).mse
        yield np.concatenate([self.draw(image).mse for image in alone])
        yield self.score(images)[0]
        yield np.concatenate([self.score(image)[0] for image in alone])

    def detect(self, images: NDArray[np.uint8]) -> Detections:
        """Score a micro-batch.

        Args:
            images: raw pixels, uint8 [N, 1, 28, 28], contiguous.

        Raises:
            RuntimeError: the module failed on this device (out of memory, for one).
        """
        with torch.inference_mode():
            found = self._module(torch.from_numpy(images).to(self._device))
            return Detections(*(tensor.cpu().numpy() for tensor in found))

    def score(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Score many images, until somebody else waits, and make nothing else of them. Errors as for `detect`.

        Args:
            images: as for `detect`.

        Returns:
            mse, float32 [M], and reason, int8 [M], of the first M images: at least one step, or all.
        """
        rows = self._score(images)
        return rows["mse"], rows["reason"].astype(np.int8)

    def draw(self, images: NDArray[np.uint8]) -> Pictures:
        """Score a micro-batch and make the pictures that are kept of it. Arguments and errors as for `detect`."""
        rows = self._draw(images)
        return Pictures(rows["mse"], rows["planes"], rows["peak"], rows["reason"].astype(np.int8))

    def warm_up(self, batch_sizes: Iterable[int]) -> float:
        """Score each batch size twice, because TorchScript optimises on the second call. Returns the seconds taken."""
        started = time.perf_counter()
        for size in batch_sizes:
            for _ in range(2):
                self.draw(np.zeros((size, 1, 28, 28), np.uint8))
                self.score(np.zeros((size, 1, 28, 28), np.uint8))
        return time.perf_counter() - started


@contextmanager
def torchscript_allowed() -> Iterator[None]:
    """Silence exactly the deprecation of `torch.jit`, this project's format by choice: docs/decisions/0001."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=DeprecationWarning)
        yield


@contextmanager
def _failures_of(label: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
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
    # Written so that a difference that is not a number is refused as well.
    difference = np.abs(mse - golden.mse) / np.maximum(np.abs(golden.mse), 1e-6)
    if not difference.max() <= GOLDEN_TOLERANCE:
        raise DetectorError(f"{label}: golden scores differ by up to {difference.max():.2g} relative on this device")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
