"""An image near the threshold has the same verdict in a block of any size, and in the service."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from anomaly.bulk.rows import NORMAL, NOT_SCORED, Refusal, block
from anomaly.bulk.scorer import BlockScorer, open_job
from app.inference.device import one_thread
from tests.conftest import MODEL_STORE
from tests.near import Noisy, noise

SIZES = (1, 2, 3, 7, 32, 64)


class Near:
    """Scores blocks with a version whose threshold is the score of one image alone."""

    def __init__(self, *, reconstructions: bool) -> None:
        job = open_job(MODEL_STORE, "zero-article", alpha=None, device="cpu", reconstructions=reconstructions)
        self._scorer = BlockScorer(job)
        self._scorer._detector = self.detector = Noisy(self._scorer._detector)  # type: ignore[assignment]

    def set_threshold(self, image: np.ndarray) -> float:
        """Set the threshold to the score of an image alone, and return it."""
        mse = self.detector.score_alone(image.reshape(1, 1, 28, 28))
        self._scorer._rule = dataclasses.replace(self._scorer._rule, threshold=mse)
        self.detector.alone = 0
        return mse

    def rows(self, images: np.ndarray, refused: int | None = None) -> list[dict[str, object]]:
        """Return the rows of a block, whose image at the place `refused` was not read."""
        refusals = {} if refused is None else {refused: Refusal("invalid-image", "it is damaged")}
        ids = [str(place) for place in range(len(images))]
        found: list[dict[str, object]] = self._scorer(block(ids, images.reshape(-1), refusals)).to_pylist()
        return found


@pytest.fixture(params=[False, True], ids=["scores", "reconstructions"])
def near(request: pytest.FixtureRequest) -> object:
    """Return a scorer without and with reconstructions."""
    with one_thread():
        yield Near(reconstructions=request.param)


@pytest.mark.parametrize("size", SIZES)
def test_an_image_at_the_threshold_has_one_verdict_in_blocks_of_any_size(near: Near, size: int) -> None:
    """The threshold is the score of the image alone: the row has that score, and the image is normal."""
    images = noise(64)
    for place in range(0, 64, 5):
        mse = near.set_threshold(images[place])
        start = min(place, 64 - size)
        found = near.rows(images[start : start + size])
        row = found[place - start]
        assert (row["verdict"], row["mse"]) == (NORMAL, mse)


def test_other_images_are_scored_once(near: Near) -> None:
    """Of a block, only images near the threshold are scored again, and none that was not read."""
    images = noise(8)
    images[3] = images[2]
    near.set_threshold(images[2])
    found = near.rows(images, refused=3)
    assert near.detector.alone == 1
    assert (found[2]["verdict"], found[3]["verdict"], found[3]["mse"]) == (NORMAL, NOT_SCORED, None)
    near.rows(images[4:])
    assert near.detector.alone == 1
