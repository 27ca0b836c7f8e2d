"""An image near the threshold has the same verdict in any micro-batch."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from app.inference.version import ModelVersion
from app.scoring.verdict import NEAR, DecisionRule
from app.settings import Settings
from tests import pngs
from tests.conftest import running, services
from tests.near import Noisy, noise
from tests.requests import raw


def noisy(client: httpx.AsyncClient) -> Noisy:
    version = services(client).registry.current("zero-article")
    assert version is not None
    version.detector = detector = Noisy(version.detector)  # type: ignore[assignment]
    return detector


def npy(images: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, images)
    return file.getvalue()


@pytest.fixture
def with_threshold(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets the threshold of all rules that are made from now on."""

    def set_threshold(threshold: float) -> None:
        def for_alpha(manifest: Any, calibration: Any, alpha: float | None = None) -> DecisionRule:
            return DecisionRule(manifest, calibration, threshold, alpha or manifest.alpha)

        monkeypatch.setattr(DecisionRule, "for_alpha", for_alpha)

    return set_threshold


async def test_an_image_at_the_threshold_has_one_verdict(
    make_settings: Callable[..., Settings], with_threshold: Callable[[float], None]
) -> None:
    """The threshold is the image's own score: it is normal alone, in micro-batches of each size, and in a batch."""
    images = noise(8)
    encoded = [pngs.plain(image) for image in images]
    async with running(make_settings(microbatch_max_size=8)) as client:
        mse = (await raw(client, encoded[0])).json()["mse"]
    with_threshold(mse)
    async with running(make_settings(microbatch_max_size=8)) as client:
        detector = noisy(client)
        for size in range(1, 9):
            replies = await asyncio.gather(*(raw(client, png) for png in encoded[:size]))
            assert (replies[0].json()["is_anomaly"], replies[0].json()["mse"]) == (False, mse)
            assert detector.alone == size  # the other images are not scored again
        headers = {"content-type": "application/x-npy"}
        for query in ("", "?store=true"):
            reply = await client.post(f"/score/batch{query}", content=npy(images), headers=headers)
            item = reply.json()["items"][0]
            assert (item["is_anomaly"], item["mse"]) == (False, mse)
        scores = np.load(
            io.BytesIO(
                (
                    await client.post(
                        "/score/batch", content=npy(images), headers={**headers, "accept": "application/x-npy"}
                    )
                ).content
            )
        )
        assert scores[0] == np.float32(mse)


async def test_the_distance_covers_what_a_forward_pass_changes(client: httpx.AsyncClient) -> None:
    """The scores of an image in passes of 1 to 64 images differ by less than a tenth of the distance."""
    version: ModelVersion | None = services(client).registry.current("zero-article")
    assert version is not None
    images = np.concatenate([noise(32), np.stack([pngs.gradient()] * 32)]).reshape(64, 1, 28, 28)
    alone = np.array([version.detector.score_alone(image[None]) for image in images])

    def largest(parts: Sequence[np.ndarray]) -> float:
        return float(np.max(np.abs(np.concatenate(parts) - alone) / alone))

    for size in (2, 3, 7, 32, 64):
        groups = [np.ascontiguousarray(images[start : start + size]) for start in range(0, 64, size)]
        assert largest([version.detector.draw(group).mse for group in groups]) < NEAR / 10
        assert largest([version.detector.score(group)[0] for group in groups]) < NEAR / 10
