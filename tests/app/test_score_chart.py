"""The chart of scores on the model card."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from xml.etree import ElementTree

import httpx
import pytest

from app.settings import Settings
from app.web.score_chart import Row, score_chart
from tests.conftest import running
from tests.requests import raw

QUANTILES = {0.1: 0.004, 0.5: 0.01, 0.9: 0.03, 0.99: 0.1}


def drawn(rows: list[Row], threshold: float) -> ElementTree.Element:
    return ElementTree.fromstring(score_chart(rows, threshold))


def position(element: ElementTree.Element, name: str = "x1") -> float:
    return float(element.attrib[name].removesuffix("%"))


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1.01, 50.0])
def test_scores_are_in_order_and_inside(factor: float) -> None:
    """Each quantile of each row is within the chart, at a place that grows with the logarithm of the score."""
    later = {level: value * factor for level, value in QUANTILES.items()}
    svg = drawn([Row("a", QUANTILES), Row("b", later)], 0.08)[0]
    medians = [position(each, "cx") for each in svg.iter("circle")]
    bars = [each.attrib for each in svg.iter("line") if each.get("class") == "bar"]
    lowest = [float(bar["x1"].removesuffix("%")) for bar in bars]
    highest = [float(bar["x2"].removesuffix("%")) for bar in bars]
    for low, middle, high in zip(lowest, medians, highest, strict=True):
        assert 0 < low < middle < high < 100
    assert (medians[0] < medians[1]) == (factor > 1)
    texts = list(svg.iter("text"))
    ticks = [(float(each.text or ""), position(each, "x")) for each in texts if each.get("class") == "tick"]
    assert 1 <= len(ticks) <= 6
    assert ticks == sorted(ticks)
    assert all(right - left >= 8 for (_, left), (_, right) in itertools.pairwise(ticks))


def test_equal_scores_have_a_chart() -> None:
    """Quantiles that are all equal to the threshold are drawn in the middle."""
    svg = drawn([Row("a", dict.fromkeys(QUANTILES, 0.5))], 0.5)[0]
    assert [position(each, "cx") for each in svg.iter("circle")] == [50.0]


def test_words_replace_the_picture() -> None:
    """The text alternative contains all quantiles and the threshold; words are escaped."""
    svg = drawn([Row("<Calibration> & more", QUANTILES), Row("none", {})], 0.08)[0]
    assert svg.attrib["role"] == "img"
    assert svg.attrib["aria-label"] == (
        "Quantiles of the scores. <Calibration> & more: 10 % 0.004, 50 % 0.01, 90 % 0.03, 99 % 0.1. Threshold: 0.08"
    )
    assert len(list(svg.iter("circle"))) == 1


def test_a_threshold_of_zero_has_no_chart() -> None:
    """A logarithmic axis has no zero."""
    assert score_chart([Row("a", QUANTILES)], 0.0) == ""


async def test_the_card_shows_the_chart(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """The model card contains the chart, without and with images, and no style or script of its own."""
    async with running(make_settings()) as client:
        before = await card(client)
        assert before.count("<circle") == 1
        assert "Latest images: none so far" in before
        assert (await raw(client, zero)).status_code == 200
        after = await card(client)
        found = (await client.get("/models/zero-article/validity")).json()["quantiles"]
    assert after.count("<circle") == 2
    assert f"99 % {found[-1]['recent']:.3g}" in after
    figure = re.search("<figure.*</figure>", after, re.DOTALL)
    assert figure is not None
    assert "style=" not in figure[0]
    assert "<script" not in figure[0]


async def card(client: httpx.AsyncClient) -> str:
    reply = await client.get("/models/zero-article", headers={"accept": "text/html"})
    assert reply.status_code == 200
    return reply.text
