"""A short soak; `make soak` runs a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.load import soak


@pytest.mark.process
def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    """In five seconds of mixed load and faults, no reply is lost and no score is wrong."""
    report = soak(tmp_path, 5, seed=25)
    assert report["wrong"] == [], report
    assert report["counts"]["scored"] > 50
