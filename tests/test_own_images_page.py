"""The commands of docs/own-images.md work, word for word and in their order: from photos to a served model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.models.repository import Repository
from tests.conftest import ROOT, free_port
from tests.page_commands import bash_blocks, run_page
from training.evaluation.calibrate import count_band

PAGE = ROOT / "docs" / "own-images.md"


@pytest.mark.long
@pytest.mark.process
def test_the_page_works_word_for_word(tmp_path: Path) -> None:
    """New photos are anomalous as often as the exact band allows, defects nearly always, and the service inverts."""
    blocks = bash_blocks(PAGE)
    assert len(blocks) == 5
    said = run_page(blocks, tmp_path, free_port())
    assert "preparation  --fit resize, inverted" in said
    reply, _ = json.JSONDecoder().raw_decode(said, said.index('{"id"'))
    assert (reply["is_anomaly"], reply["fitted"]["source"], reply["fitted"]["inverted"]) == (True, "model", True)
    summary = Repository(tmp_path / "model_store").manifest("washers", 1).calibration
    low, high = count_band(summary.n, summary.rank, 200, 0.999)
    assert low <= (tmp_path / "new.csv").read_text().count(",anomalous,") <= high
    assert (tmp_path / "odd.csv").read_text().count(",anomalous,") >= 95
    assert (tmp_path / "model_store" / "washers" / "2" / "report" / "highest.png").is_file()
