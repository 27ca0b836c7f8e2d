"""A short soak; `make soak` runs a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import soak


@pytest.mark.process
def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    """Five seconds of mixed load and faults: nothing lost, nothing wrong."""
    report = soak(tmp_path, 5, seed=25)
    assert report["wrong"] == [], report
    assert report["counts"]["scored"] > 50
