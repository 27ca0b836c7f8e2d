"""Checks a folder of the user's own images before training, so that errors are reported early and with advice.

Scope: prepared images, and the number that each step needs. Independent of files, recipes and the console.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.models.calibration import needed
from app.models.manifest import Preparation
from training.data.dataset import DataError
from training.data.pictures import Folder

_PLAIN_GROUND = 0.75
"""Share of an image's border that is close to the border's median, from which the image has a plain background."""
_CLOSE = 48
"""Grey levels between a border pixel and the median of the border that count as close."""
_MIXED = 0.1
"""Share of the rarer polarity from which a folder is mixed."""
_BLANK_CONTRAST = 12
"""Grey levels between the darkest and the brightest pixel; an image with less contrast is blank."""
_MOST_BLANK = 0.05
"""Share of blank images from which a folder is rejected."""


@dataclass(frozen=True)
class Polarity:
    """Numbers of images with a plain bright background, with a plain dark one, and without a plain background."""

    bright: int
    dark: int
    none: int

    @property
    def is_mixed(self) -> bool:
        """Return whether both polarities are common."""
        return min(self.bright, self.dark) > _MIXED * (self.bright + self.dark)

    @property
    def is_dark_on_bright(self) -> bool:
        """Return whether most plain backgrounds are bright."""
        return self.bright > self.dark and 2 * self.bright > self.none

    def __str__(self) -> str:
        return f"bright background {self.bright:,}, dark background {self.dark:,}, no plain background {self.none:,}"


def polarity(images: NDArray[np.uint8]) -> Polarity:
    """Count the backgrounds of images, uint8 [n, 28, 28], by their borders."""
    border = _border(images).astype(np.int16)
    median = np.median(border, axis=1)
    plain = (np.abs(border - median[:, None]) < _CLOSE).mean(axis=1) >= _PLAIN_GROUND
    bright, dark = int((plain & (median > 127)).sum()), int((plain & (median <= 127)).sum())
    return Polarity(bright, dark, len(images) - bright - dark)


def choose_inversion(images: NDArray[np.uint8]) -> bool:
    """Return whether images that are prepared without inversion should be inverted: bright objects on dark train best.

    Raises:
        DataError: both polarities are common.
    """
    found = polarity(images)
    if found.is_mixed:
        raise DataError(
            f"polarity: {found}; put the images of one polarity in one folder, or decide with --invert or --no-invert"
        )
    return found.is_dark_on_bright


def ink(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return how much of each image differs from its own background, the median of its border: float64 [n].

    A pixel that differs by the whole range counts as 1, as in the guards of `training.networks.scoring`.
    """
    ground = np.median(_border(images), axis=1)
    differences: NDArray[np.float64] = np.abs(images.astype(np.float64) - ground[:, None, None]).sum(axis=(1, 2)) / 255
    return differences


def table(folder: Folder, preparation: Preparation, *, parts: Sequence[int], alpha: float) -> list[tuple[str, str]]:
    """Return the rows of the table about a folder: what was checked, and what was found.

    Args:
        folder: the normal images.
        preparation: how they were prepared.
        parts: number of images for training, threshold and test.
        alpha: false-positive rate of the threshold.
    """
    widths, heights = zip(*folder.sizes, strict=True)
    sizes = f"{min(widths)}x{min(heights)} to {max(widths)}x{max(heights)} pixels, {len(set(folder.sizes)):,} different"
    found = np.sort(ink(folder.images))
    ratios = np.array(widths) / np.array(heights)
    stretched = preparation.fit == "resize" and ratios.max() > 1.5 * ratios.min()
    if stretched:
        sizes += "; the ratios of the sides differ, so images are stretched differently"
    train, threshold, test = parts
    chosen = f"--fit {preparation.fit}"
    if preparation.fit == "resize":
        chosen += ", inverted" if preparation.invert else ", not inverted"
        chosen += f", crop {','.join(f'{share:g}' for share in preparation.crop)}" if preparation.crop else ""
    return [
        ("formats", _listed(folder.formats)),
        ("sizes", sizes),
        ("preparation", chosen),
        ("polarity", f"{polarity(folder.images)} (after the preparation)"),
        (
            "ink",
            f"{found[0]:.1f} to {found[-1]:.1f} of 784, median {np.median(found):.1f}; blank images {_blank(folder):,}",
        ),
        ("copies", f"{folder.copies:,} left out (the same pixels as an earlier image)"),
        *([("refused", _listed(folder.refused))] if folder.refused else []),
        (
            "count",
            f"{len(folder.images):,} images: {train:,} for training, {threshold:,} for the threshold "
            f"(alpha {alpha:g} needs {needed(alpha):,}), {test:,} for the test",
        ),
    ]


def check(folder: Folder, preparation: Preparation, inversion_chosen: bool) -> None:
    """Check that prepared images can be used for training.

    Args:
        folder: the normal images.
        preparation: how they were prepared.
        inversion_chosen: whether the user decided on the inversion, so that polarity is not checked.

    Raises:
        DataError: the message says what to do.
    """
    if _blank(folder) > _MOST_BLANK * len(folder.images):
        raise DataError(
            f"{_blank(folder):,} of {len(folder.images):,} images are blank after the preparation; remove them, or "
            "choose a part with --crop that contains the object"
        )
    if preparation.fit == "strict" and not inversion_chosen:
        found = polarity(folder.images)
        if found.is_mixed:
            raise DataError(f"polarity: {found}; put the images of one polarity in one folder, or add --no-invert")
        if found.is_dark_on_bright:
            raise DataError(
                f"polarity: {found}; a model takes bright objects on a dark background: add --fit resize, which "
                "inverts images in training and in the service, or --no-invert to train on these images as they are"
            )


def _blank(folder: Folder) -> int:
    flat = folder.images.reshape(len(folder.images), -1)
    return int((flat.max(1).astype(np.int16) - flat.min(1) < _BLANK_CONTRAST).sum())


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.most_common())


def _border(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate((images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]), axis=1)
