"""`anomaly score --fdr`: the anomalies of a whole lot at a false-discovery rate."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from anomaly import Score
from anomaly.bulk.q_values import adjust
from anomaly.cli import lots
from anomaly.cli.formats import Result
from anomaly.client.replies import score_of
from app.scoring.discoveries import discoveries
from tests.cli.conftest import Anomaly
from tests.conftest import EXAMPLES, MODEL_STORE, Server

SCORE = {
    "id": None, "model": "zero", "version": 1, "mse": 0.1, "threshold": 0.11, "alpha": 0.01, "p_value": 0.5,
    "is_anomaly": False, "reason": None, "reconstruction": None,
}  # fmt: skip


def lot(*p_values: float) -> Iterator[Result]:
    """Yield a result with each p-value."""
    for number, p_value in enumerate(p_values):
        yield Result(f"{number}.png", score_of({**SCORE, "p_value": p_value}))


def test_q_values_are_those_of_scipy() -> None:
    """Benjamini-Hochberg, ties included, for lots of 1 to 300 images."""
    generator = np.random.default_rng(0)
    for size in (1, 2, 7, 300):
        p_values = (np.ceil(generator.random(size) ** 2 * 100) / 100).tolist()
        assert lots.q_values(p_values) == pytest.approx(false_discovery_control(p_values, method="bh").tolist())
    assert lots.q_values([]) == []


def test_a_q_value_that_equals_the_rate_is_a_discovery() -> None:
    """9 of 135 images with p = 1/100 have q = 0.15: it must not be rounded above the rate, here, online or in bulk."""
    p_values = [0.01] * 9 + [1.0] * 126
    assert lots.q_values(p_values)[:9] == [0.15] * 9
    assert sum(bool(result.is_discovery) for result in lots.with_discoveries(list(lot(*p_values)), 0.15)) == 9
    online = discoveries(p_values, 0.15, 99)
    assert (online.count, online.min_discoveries, online.q_values[:9]) == (9, 9, [0.15] * 9)
    counts = np.zeros(100, np.int64)
    counts[[0, 99]] = 9, 126
    assert adjust(counts)[0] == 0.15


def test_images_without_a_score_do_not_count(tmp_path: Path, in_process: Anomaly) -> None:
    """A file that is not an image has no q-value, and does not change the q-values of other files."""
    (tmp_path / "a.png").write_bytes(b"no image")
    done = in_process(
        "score", tmp_path / "a.png", EXAMPLES / "six.png", EXAMPLES / "zero.png",
        "--model-store", MODEL_STORE, "--fdr", "0.05", "-f", "csv",
    )  # fmt: skip
    bad, six, zero = csv.DictReader(done.stdout.splitlines())
    assert done.returncode == 2
    assert (bad["q_value"], bad["discovery"]) == ("", "")
    assert float(six["q_value"]) == pytest.approx(2 * float(six["p_value"]))
    assert (six["discovery"], zero["discovery"]) == ("True", "False")
    assert zero["q_value"] == zero["p_value"]


def test_a_service_and_the_command_alone_find_the_same(server: Server, in_process: Anomaly) -> None:
    """The q-values by URL are those of offline scoring, and the line about the lot is the same."""
    files = (EXAMPLES / "six.png", EXAMPLES / "zero.png")
    done = [
        in_process("score", *files, "--fdr", "0.001", "-f", "json", *where)
        for where in (("--url", server.url), ("--model-store", MODEL_STORE))
    ]
    online, offline = ([each["q_value"] for each in json.loads(one.stdout)] for one in done)
    assert online == offline
    for one in done:
        assert "0 of 2 images; with 1185 calibration images, fewer than 2 anomalies in 2 images" in one.stderr


def test_a_lot_of_two_versions_is_an_error() -> None:
    """Their p-values come from two calibrations."""
    first, second = lot(0.1, 0.2)
    assert isinstance(second.outcome, Score)
    with pytest.raises(lots.LotError, match="zero@1, zero@2"):
        lots.with_discoveries([first, replace(second, outcome=replace(second.outcome, version=2))], 0.1)


@pytest.mark.parametrize("rate", ["0", "1", "-0.5", "nan"])
def test_a_rate_that_is_none_is_refused(in_process: Anomaly, rate: str) -> None:
    """The rate lies between 0 and 1."""
    done = in_process("score", EXAMPLES / "six.png", "--model-store", MODEL_STORE, "--fdr", rate)
    assert done.returncode == 2
    assert "--fdr must be at least 1e-9 and below 1" in done.stderr


def test_a_lot_too_small_for_any_discovery_is_called_so() -> None:
    """If more discoveries were needed than there are images, no discovery is possible."""
    assert lots.summary(lots.with_discoveries(list(lot(0.001)), 0.0001), 0.0001, 1185) == (
        "discoveries at a false-discovery rate of 0.0001: 0 of 1 images; with 1185 calibration images, no discovery is "
        "possible at this rate"
    )
