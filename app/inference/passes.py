"""The results of a forward pass: whether they are valid, and how they are joined if memory sufficed for parts only."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.inference.detector import Pictures, is_out_of_memory

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


def is_finite(found: Any) -> bool:
    """Return whether all scores are finite: of a list of detections, of an array of scores, or a single score."""
    if isinstance(found, list):  # a few scores: numpy would take longer
        return all(math.isfinite(each.mse) for each in found)
    return bool(np.isfinite(getattr(found, "mse", found)).all())


def within_memory(detect: Callable[[NDArray[np.uint8]], Result], images: NDArray[np.uint8]) -> list[Result]:
    """Return the results of N images in order; if memory runs out, halve the forward pass until one image is left.

    `detect` may return fewer results than it is given images: then only its first part is used.
    """
    try:
        return [detect(images)]
    except (RuntimeError, MemoryError) as error:
        if len(images) == 1 or not is_out_of_memory(error):
            raise
        _log.warning("out of memory: the forward pass is split", extra={"images": len(images)})
    half = len(images) // 2
    first = within_memory(detect, images[:half])
    if sum(map(_count, first)) < half:
        return first
    return [*first, *within_memory(detect, images[half:])]


def _count(found: Any) -> int:
    return len(found.mse if isinstance(found, Pictures) else found[0])


def join_pictures(parts: Sequence[Pictures]) -> Pictures:
    """Concatenate the results of the parts of a forward pass."""
    if len(parts) == 1:
        return parts[0]
    names = ("mse", "planes", "peak", "reason")
    return Pictures(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
