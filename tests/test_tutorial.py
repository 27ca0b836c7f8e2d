"""The tutorial's commands work, word for word and in their order, and end in a served model of one's own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, free_port

TUTORIAL = ROOT / "docs" / "tutorial.md"


def commands() -> list[str]:
    """Return the tutorial's `bash` blocks in their order. What a reader does once, installing, is a `console` block."""
    return re.findall(r"^```bash\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)


def path_with_the_command(folder: Path) -> str:
    """Return a PATH on which `python` is this one and `anomaly` the installed command."""
    here = Path(sys.executable).parent
    if not (here / "anomaly").exists():
        # The installed script, written as pip writes it: this checkout was not installed since the command was added.
        folder.mkdir()
        script = folder / "anomaly"
        script.write_text(f"#!{sys.executable}\nimport sys\nfrom anomaly.cli.__main__ import main\nsys.exit(main())\n")
        script.chmod(0o755)
    return f"{folder}:{here}:{os.environ['PATH']}"


@pytest.mark.long
def test_the_tutorial_works_word_for_word(tmp_path: Path) -> None:
    """Every command runs without an error in one shell; only the port differs, since 8000 may be somebody's.

    The service that it starts answers with the reader's model, calls the odd ones out and spares the normal ones.
    """
    assert shutil.which("curl"), "the tutorial uses curl"
    port = free_port()
    blocks = [block.replace("127.0.0.1:8000", f"127.0.0.1:{port}") for block in commands()]
    assert len(blocks) == 9
    before_stop, stop = blocks[:-1], blocks[-1]
    check = f"{sys.executable} - <<'EOF' || exit 70\n{QUESTIONS.format(port=port)}\nEOF\n"
    script = "\n".join(
        ["set -euo pipefail", "set -m", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *before_stop, check, stop]
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("ANOMALY_", "MODEL_STORE"))
    }
    with subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**environment, "PATH": path_with_the_command(tmp_path / "bin"), "PYTHONPATH": str(ROOT),
             "ANOMALY_PORT": str(port), "ANOMALY_DEVICE": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as shell:  # fmt: skip
        try:
            said, _ = shell.communicate(timeout=480)
        finally:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, said
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
