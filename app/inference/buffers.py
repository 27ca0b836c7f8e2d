"""Calls a scripted module from preallocated memory to preallocated memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray


class Buffers:
    """Preallocated input and output memory of one method of a scripted module, for one thread at a time.

    Args:
        method: gets (images, count, rows, rows as float32, others_waiting) and returns the number of rows it wrote.
        row: the type of an output row.
        device: of the module.
        others_waiting: one byte, passed on to the method.

    Freeing a tensor releases the GIL, and under load the thread then waits to reacquire it. So no tensor is created per
    call: images are copied into, and rows out of, the same memory each time.
    """

    def __init__(
        self, method: Callable[..., int], row: np.dtype[np.void], device: torch.device, others_waiting: torch.Tensor
    ) -> None:
        self._method = method
        self._row = row
        self._device = device
        self._others_waiting = others_waiting
        self._capacity = 0

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.void]:
        """Return one row of results per image, for contiguous images of type uint8 and shape [N, 1, 28, 28]."""
        count = len(images)
        if count > self._capacity:
            self._allocate(count)
        # A memoryview copies bytes without releasing the GIL; numpy releases it.
        self._given[: images.nbytes] = images.data.cast("B")
        with torch.inference_mode():
            done = self._method(self._images, count, self._rows, self._numbers, self._others_waiting)
            if self._answer is not self._rows:
                self._answer[:done].copy_(self._rows[:done])
        return np.frombuffer(self._written[: done * self._row.itemsize].tobytes(), self._row)

    def _allocate(self, count: int) -> None:
        """Allocate memory on the device and, for CUDA, pinned memory on the host."""
        self._capacity = 0  # if an allocation fails, the next call starts over
        cuda = self._device.type == "cuda"
        self._images = torch.empty((count, 1, 28, 28), dtype=torch.uint8, pin_memory=cuda)
        self._rows = torch.empty((count, self._row.itemsize), dtype=torch.uint8, device=self._device)
        self._numbers = self._rows.view(torch.float32)
        self._answer = torch.empty(self._rows.shape, dtype=torch.uint8, pin_memory=True) if cuda else self._rows
        self._given = self._images.numpy().data.cast("B")
        self._written = self._answer.numpy().data.cast("B")
        self._capacity = count
