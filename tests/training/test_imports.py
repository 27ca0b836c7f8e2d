"""The architecture of training: imports point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TRAINING = ROOT / "training"
ORDER = (
    ("datasets", "probes", "standardisation", "subspace"),
    ("autoencoders", "damage", "memory", "scoring"),
    ("data", "splits", "train"),
    ("deep", "instant", "reexpressed"),
    ("recipes", "calibrate", "export", "publish", "pictures", "limits"),
    ("evaluate", "card", "examples", "reference"),
    ("report",),
    ("version", "summary"),
    ("series", "recalibrate"),
    ("__main__",),
)
"""Each module may import only modules of the rows above its own."""
APP = {"app.calibration", "app.detector", "app.manifest", "app.repository", "app.images", "app.problems"}
MODULES = [module for row in ORDER for module in row]


def imports_of(module: str) -> set[str]:
    """Return the modules of this project that a module of training imports, as `app.detector` or `training.data`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((TRAINING / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "training":
            found |= {f"training.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name.split(".")[0] in {"app", "training"}}


def test_every_module_has_its_place():
    """A module that the order does not name does not exist."""
    assert sorted(MODULES) == sorted(path.stem for path in TRAINING.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    """A module imports only from the rows above its own, and of the service only contract, loader and PNGs."""
    row = next(number for number, names in enumerate(ORDER) if module in names)
    allowed = APP | {f"training.{name}" for names in ORDER[:row] for name in names}
    assert imports_of(module) <= allowed


def test_only_export_names_torchscript():
    """No other module of training names torch.jit."""
    naming = [path.stem for path in TRAINING.glob("*.py") if "torch.jit" in path.read_text()]
    assert naming == ["export"]


def test_keeping_a_model_store_needs_neither_statistics_nor_plots():
    """`promote` in a hurry does not wait for what only training uses."""
    code = "import sys, training.__main__; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "'torch'" in found
    assert not any(f"'{name}'" in found for name in ("scipy", "sklearn", "pandas", "matplotlib"))
