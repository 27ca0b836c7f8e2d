"""docs/calibration.md says what the shipped version's calibration scores say."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from app.repository import Artifact
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
    """The table in the page is what the script makes of the shipped version today."""
    assert f"{script.BEGIN}{script.table(artifact)}{script.END}" in (ROOT / "docs" / "calibration.md").read_text()


def test_the_picture_counts_right(script: ModuleType, artifact: Artifact) -> None:
    """The numbers written into the picture follow from the scores, and the shipped picture is there."""
    words = [axes.get_title() for axes in script.picture(artifact).axes]
    worse = sum(score >= script.example(artifact) for score in artifact.calibration.scores)
    assert f"{worse} of {len(artifact.calibration.scores)} normal images" in words[1]
    assert f"= {artifact.calibration.p_value(script.example(artifact)):.3f}" in words[1]
    assert script.PICTURE.read_bytes().startswith(b"\x89PNG")
