"""The figures of docs/calibration.md agree with the calibration scores of the shipped version."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import numpy as np
import pytest

from app.models.repository import Artifact
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return the script that writes the page's table and picture."""
    spec = importlib.util.spec_from_file_location("calibration_page", ROOT / "docs" / "calibration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def artifact(script: ModuleType) -> Artifact:
    """Return the version that the page speaks of."""
    found: Artifact = script.shipped()
    return found


def test_the_table_is_the_scripts(script: ModuleType, artifact: Artifact) -> None:
    """The table in the page equals the script's output for the shipped version."""
    assert f"{script.BEGIN}{script.table(artifact)}{script.END}" in (ROOT / "docs" / "calibration.md").read_text()


def test_the_counts_hold_as_often_as_is_said(script: ModuleType, artifact: Artifact) -> None:
    """The number of false alarms, drawn with the calibration images and the new ones, lies in the table's band 95 %."""
    rows = re.findall(
        r"^\| [\d.]+ \| (\d+) of (\d+) \| [\d.]+ \| (\d+) to (\d+) \|", script.table(artifact), re.MULTILINE
    )
    assert len(rows) == len(script.ALPHAS)
    random = np.random.default_rng(0)
    for rank, n, low, high in (map(int, row) for row in rows):
        counts = random.binomial(10_000, random.beta(n + 1 - rank, rank, 100_000))
        # No band of whole numbers holds exactly 95 %; where few alarms are expected it holds a little more.
        assert 0.948 < ((low <= counts) & (counts <= high)).mean() < 0.97


def test_the_picture_counts_right(script: ModuleType, artifact: Artifact) -> None:
    """The numbers written into the picture follow from the scores, and the shipped picture is there."""
    words = [axes.get_title() for axes in script.picture(artifact).axes]
    worse = sum(score >= script.example(artifact) for score in artifact.calibration.scores)
    assert f"{worse} of {len(artifact.calibration.scores)} normal images" in words[1]
    assert f"= {artifact.calibration.p_value(script.example(artifact)):.3f}" in words[1]
    assert script.PICTURE.read_bytes().startswith(b"\x89PNG")
