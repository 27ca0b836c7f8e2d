"""The imports of the command line."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT


def test_keeping_a_model_store_needs_neither_statistics_nor_plots():
    """The command line imports torch, but no statistics or plotting packages."""
    code = "import sys, training.__main__; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "'torch'" in found
    assert not any(f"'{name}'" in found for name in ("scipy", "sklearn", "pandas", "matplotlib"))
