"""Chooses the device that model versions are loaded onto, and configures the thread that runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceError(Exception):
    """The requested device does not exist here."""


def choose_device(wanted: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:n` into a device that exists.

    Raises:
        DeviceError: CUDA was requested and is not available, or the name is invalid.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, index = wanted.partition(":")
    if kind != "cuda" or (":" in wanted and not index.isdigit()):
        raise DeviceError(f"device {wanted!r} is none of auto, cpu, cuda, cuda:n")
    if not torch.cuda.is_available():
        raise DeviceError(f"device {wanted!r} was requested, but torch {torch.__version__} finds no CUDA device here")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise DeviceError(f"device {wanted!r} was requested, but there are only {count} CUDA devices here")
    return torch.device("cuda", int(index or 0))


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block, run torch in this thread as the service does: with one intra-op thread.

    Another number of threads adds in another order, and the scores of a golden image then differ.
    """
    before = torch.get_num_threads()
    use_one_thread()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_one_thread() -> None:
    """Limit torch to one intra-op thread. Call it **in** the thread that runs the model: the setting is per thread."""
    torch.set_num_threads(1)
