"""The commands of docs/own-images.md work, word for word and in their order: from photos to a served model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from app.models.repository import Repository
from tests.conftest import ROOT, free_port
from tests.test_tutorial import path_with_the_command
from training.evaluation.calibrate import count_band

PAGE = ROOT / "docs" / "own-images.md"


@pytest.mark.long
@pytest.mark.process
def test_the_page_works_word_for_word(tmp_path: Path) -> None:
    """New photos are anomalous as often as the exact band allows, defects nearly always, and the service inverts."""
    port = free_port()
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    script = "\n".join(["set -euo pipefail", "set -m", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *blocks])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANOMALY_")}
    with subprocess.Popen(
        ["bash", "-c", script.replace("127.0.0.1:8000", f"127.0.0.1:{port}")],
        cwd=tmp_path,
        env={**environment, "PATH": path_with_the_command(tmp_path / "bin"), "PYTHONPATH": str(ROOT),
             "CHECKOUT": str(ROOT), "ANOMALY_PORT": str(port), "ANOMALY_DEVICE": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as shell:  # fmt: skip
        try:
            said, _ = shell.communicate(timeout=480)
        finally:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, said
    assert "preparation  --fit resize, inverted" in said
    reply, _ = json.JSONDecoder().raw_decode(said, said.index('{"id"'))
    assert (reply["is_anomaly"], reply["fitted"]["source"], reply["fitted"]["inverted"]) == (True, "model", True)
    summary = Repository(tmp_path / "model_store").manifest("washers", 1).calibration
    low, high = count_band(summary.n, summary.rank, 200, 0.999)
    assert low <= (tmp_path / "new.csv").read_text().count(",anomalous,") <= high
    assert (tmp_path / "odd.csv").read_text().count(",anomalous,") >= 95
    assert (tmp_path / "model_store" / "washers" / "2" / "report" / "highest.png").is_file()
