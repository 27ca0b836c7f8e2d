"""Connected components: the same as scipy's, on any mask."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import label

from app.images.components import components


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.41, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (37, 53), (200, 190)])
def test_components_are_those_of_scipy(share: float, shape: tuple[int, int]) -> None:
    """Number, pixels, boxes, areas and masses agree with scipy's 8-connected labels."""
    rng = np.random.default_rng(0)
    mask, weights = rng.random(shape) < share, rng.random(shape).astype(np.float32)
    found = components(mask, weights)
    wanted, count = label(mask, np.ones((3, 3)))
    assert len(found.area) == count
    assert ((found.labels >= 0) == mask).all()
    assert len(np.unique(np.stack([found.labels[mask], wanted[mask]], 1), axis=0)) == count
    for number in range(min(count, 20)):
        pixels = found.labels == number
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        box = found.left[number], found.top[number], found.right[number], found.bottom[number]
        assert box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert found.area[number] == pixels.sum()
        assert found.mass[number] == pytest.approx(weights[pixels].sum(), rel=1e-4)
        assert found.peak[number] == weights[pixels].max()
