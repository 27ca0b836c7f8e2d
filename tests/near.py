"""Scores that depend on the size of the forward pass by a known share, for tests of images near the threshold."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

RELATIVE_NOISE = 3e-7
"""About the difference that the size of a forward pass makes for `zero-article`."""


class Noisy:
    """The detector of a version, whose scores of several images together are off by a known share."""

    def __init__(self, detector: Any) -> None:
        self._detector = detector
        self.alone = 0

    def _off(self, mse: np.ndarray) -> np.ndarray:
        return mse if len(mse) == 1 else mse * np.float32(1 + RELATIVE_NOISE)

    def detect(self, images: np.ndarray) -> Any:
        """Score images with all outputs of the module."""
        found = self._detector.detect(images)
        return dataclasses.replace(found, mse=self._off(found.mse))

    def draw(self, images: np.ndarray) -> Any:
        """Score a micro-batch."""
        found = self._detector.draw(images)
        return dataclasses.replace(found, mse=self._off(found.mse))

    def score(self, images: np.ndarray) -> Any:
        """Score a chunk."""
        mse, reason = self._detector.score(images)
        return self._off(mse), reason

    def score_alone(self, image: np.ndarray) -> float:
        """Score one image."""
        self.alone += 1
        return float(self._detector.score_alone(image))


def noise(count: int) -> np.ndarray:
    """Return images of random pixels, uint8 [count, 28, 28]."""
    return np.random.default_rng(9).integers(0, 256, (count, 28, 28), dtype=np.uint8)
