"""Runs the commands of a page of the documentation in one shell, as its reader does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import ROOT

_SECONDS = 480


def bash_blocks(page: Path) -> list[str]:
    """Return the `bash` blocks of a page in their order. Commands that a reader runs once are `console` blocks."""
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def run_page(commands: Sequence[str], folder: Path, port: int) -> str:
    """Run commands in one shell, with the `python` and the `anomaly` of this checkout, and return their output.

    Args:
        commands: in their order. The first one that fails ends the shell.
        folder: the current folder.
        port: replaces port 8000, which another process may use.

    Raises:
        AssertionError: a command failed.
    """
    script = "\n".join(["set -euo pipefail", "set -m", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *commands])
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("ANOMALY_", "MODEL_STORE"))
    }
    with subprocess.Popen(
        ["bash", "-c", script.replace("127.0.0.1:8000", f"127.0.0.1:{port}")],
        cwd=folder,
        env={**environment, "PATH": _path_with_the_command(folder / "bin"), "PYTHONPATH": str(ROOT),
             "CHECKOUT": str(ROOT), "ANOMALY_PORT": str(port), "ANOMALY_DEVICE": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as shell:  # fmt: skip
        try:
            output, _ = shell.communicate(timeout=_SECONDS)
        finally:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, output
    return output


def _path_with_the_command(folder: Path) -> str:
    here = Path(sys.executable).parent
    if not (here / "anomaly").exists():
        # The installed script, written as pip writes it: this checkout was not installed since the command was added.
        folder.mkdir()
        script = folder / "anomaly"
        script.write_text(f"#!{sys.executable}\nimport sys\nfrom anomaly.cli.__main__ import main\nsys.exit(main())\n")
        script.chmod(0o755)
    return f"{folder}:{here}:{os.environ['PATH']}"
