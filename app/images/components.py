"""Connected components of a mask, by union of runs.

Scope: masks, runs, boxes. Independent of digits, images and models.

A run is a stretch of set pixels in one row. Runs are few where pixels are many, so the components of a photograph cost
milliseconds without a compiled library; the worst mask, every second pixel set, costs a bounded multiple of its area.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Components:
    """The components of a mask, numbered from 0. Each array has one value per component.

    Attributes:
        labels: number of the component of each pixel, -1 outside all of them, int32 [height, width].
        left, top, right, bottom: box, right and bottom outside.
        area: number of pixels.
        mass: sum of the weights.
        peak: largest weight.
    """

    labels: NDArray[np.int32]
    left: Ints
    top: Ints
    right: Ints
    bottom: Ints
    area: Ints
    mass: NDArray[np.float64]
    peak: Floats

    @property
    def extent(self) -> Ints:
        """Longer side of each box."""
        extent: Ints = np.maximum(self.right - self.left, self.bottom - self.top)
        return extent

    def touching(self) -> Mask:
        """Return which sides of the image each component touches: left, top, right, bottom, bool [4, components]."""
        height, width = self.labels.shape
        return np.array([self.left == 0, self.top == 0, self.right == width, self.bottom == height])

    def sides(self) -> Ints:
        """Return at how many sides of the image each component touches the border."""
        counts: Ints = self.touching().sum(0)
        return counts

    def box(self, chosen: Mask) -> tuple[int, int, int, int]:
        """Return left, top, right, bottom of the box around the chosen components."""
        return (
            int(self.left[chosen].min()),
            int(self.top[chosen].min()),
            int(self.right[chosen].max()),
            int(self.bottom[chosen].max()),
        )

    def part(self, number: int) -> Mask:
        """Return the pixels of one component within its box."""
        box = self.labels[self.top[number] : self.bottom[number], self.left[number] : self.right[number]]
        inside: Mask = box == number
        return inside

    def mask(self, chosen: Mask) -> Mask:
        """Return the pixels of the chosen components."""
        return np.append(chosen, False)[self.labels]


def components(mask: Mask, weights: Floats) -> Components:
    """Label the 8-connected components of a mask.

    Args:
        mask: bool [height, width].
        weights: float32 [height, width], summed up for each component.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    steps = np.diff(padded, axis=1).ravel()
    # Of each row of `steps`, width + 1 long, +1 begins a run and -1 ends it.
    rows, starts = np.divmod(np.flatnonzero(steps == 1), width + 1)
    ends = np.flatnonzero(steps == -1) % (width + 1)
    labels = np.full(height * width, -1, np.int32)
    empty = np.zeros(0, np.int64)
    if not rows.size:
        none = np.zeros(0, np.float64)
        return Components(
            labels.reshape(height, width), empty, empty, empty, empty, empty, none, none.astype(np.float32)
        )
    numbers, count = _united(rows, starts, ends, width + 2)
    lengths = ends - starts
    first = rows * width + starts
    labels[np.repeat(first - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())] = np.repeat(
        numbers, lengths
    )
    values = weights[mask]
    begins = np.cumsum(lengths) - lengths
    mass: NDArray[np.float64] = np.bincount(numbers, np.add.reduceat(values, begins, dtype=np.float64), count).astype(
        np.float64
    )
    peak = np.zeros(count, np.float32)
    np.maximum.at(peak, numbers, np.maximum.reduceat(values, begins))
    left, top = np.full(count, width), np.full(count, height)
    right, bottom = np.zeros(count, np.int64), np.zeros(count, np.int64)
    np.minimum.at(left, numbers, starts)
    np.maximum.at(right, numbers, ends)
    np.minimum.at(top, numbers, rows)
    np.maximum.at(bottom, numbers, rows + 1)
    area = np.bincount(numbers, lengths, count).astype(np.int64)
    return Components(labels.reshape(height, width), left, top, right, bottom, area, mass, peak)


def _united(rows: Ints, starts: Ints, ends: Ints, base: int) -> tuple[Ints, int]:
    """Return the component of each run and the number of components; runs of adjacent rows that touch are one."""
    below = (rows + 1) * base
    first = np.searchsorted(rows * base + ends, below + starts, "left")
    past = np.searchsorted(rows * base + starts, below + ends, "right")
    counts = np.maximum(past - first, 0)
    upper = np.repeat(np.arange(rows.size), counts)
    lower = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    parents = np.arange(rows.size)
    while True:
        one, other = parents[upper], parents[lower]
        apart = one != other
        if not apart.any():
            break
        upper, lower, one, other = upper[apart], lower[apart], one[apart], other[apart]
        np.minimum.at(parents, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(shorter := parents[parents], parents):
            parents = shorter
    roots, numbers = np.unique(parents, return_inverse=True)
    return numbers.astype(np.int64), int(roots.size)
