"""The data set: labelled images in a fixed order, and the names of its classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.models.manifest import STRICT, Preparation


class DataError(Exception):
    """Missing, damaged or unsuitable data. The message contains what to do."""


@dataclass(frozen=True)
class Dataset:
    """Labelled 28x28 greyscale images in a fixed order.

    Attributes:
        name: name of the data set, such as `mnist`.
        source: origin of the images in words, without paths of this machine.
        images: uint8 [n, 28, 28].
        labels: uint8 [n].
        label_names: name of each label, such as `0` or `coat`.
        noun: noun for the images of one label, such as `digit`.
        test_start: index of the first image of the test file; None if the set has no test file.
        copies: number of images that were left out because an earlier one has the same pixels.
        preparation: how files became these images.
    """

    name: str
    source: str
    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    label_names: tuple[str, ...]
    noun: str
    test_start: int | None
    copies: int = 0
    preparation: Preparation = STRICT

    @property
    def sha256(self) -> str:
        """SHA-256 of the pixels followed by the labels, in hexadecimal."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def describe(self, normal: Sequence[int]) -> str:
        """Return a normal class in words: "the digit 0", "the digits 3 and 5".

        Raises:
            DataError: a label is unknown.
        """
        unknown = [label for label in normal if not 0 <= label < len(self.label_names)]
        if unknown or not normal:
            raise DataError(f"labels of {self.name} are 0 to {len(self.label_names) - 1}, not {list(normal)}")
        names = [self.label_names[label] for label in normal]
        if len(names) == 1:
            return f"the {self.noun} {names[0]}"
        plural = self.noun + ("es" if self.noun.endswith("s") else "s")
        return f"the {plural} {', '.join(names[:-1])} and {names[-1]}"
