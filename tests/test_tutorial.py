"""The tutorial's commands work, word for word and in their order, and end in a served model of one's own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, free_port
from tests.page_commands import bash_blocks, run_page

TUTORIAL = ROOT / "docs" / "tutorial.md"


@pytest.mark.long
def test_the_tutorial_works_word_for_word(tmp_path: Path) -> None:
    """Every command runs without an error in one shell; only the port differs, because 8000 may be in use.

    The service that it starts serves the reader's model, which detects anomalous images and few normal ones.
    """
    assert shutil.which("curl"), "the tutorial uses curl"
    port = free_port()
    *before_stop, stop = bash_blocks(TUTORIAL)
    assert len(before_stop) == 8
    check = f"{sys.executable} - <<'EOF' || exit 70\n{QUESTIONS.format(port=port)}\nEOF\n"
    said = run_page([*before_stop, check, stop], tmp_path, port)
    assert "questions answered" in said
    assert "published mine@1" in said
    folder = tmp_path / "tutorial"
    with Image.open(folder / "panel.png", formats=("PNG",)) as panel:
        assert panel.size == (736, 304)
    rows = (folder / "odd.csv").read_text().splitlines()[1:]
    assert len(rows) == 500
    assert sum(",anomalous," in row for row in rows) > 400


QUESTIONS = """
from pathlib import Path
from anomaly import Client

with Client("http://127.0.0.1:{port}") as service:
    (mine,) = service.models()
    assert (mine.name, mine.current, mine.is_default) == ("mine", 1, True), mine
    normal = [service.score(path).is_anomaly for path in sorted(Path("normal").glob("*.png"))[::5]]
    assert sum(normal) < 20, sum(normal)
print("questions answered")
"""
