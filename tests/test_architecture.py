"""The architecture, held in place: who may import whom, what no module may name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

TABLE = re.compile(r"^\| `(?P<module>app[\w.]*)` \| (?P<imports>[^|]*) \|$", re.MULTILINE)
ALLOWED = {
    match["module"]: set(re.findall(r"`(app[\w.]*)`", match["imports"]))
    for match in TABLE.finditer((ROOT / "docs" / "architecture.md").read_text())
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("app", "training")
    for path in (ROOT / folder).rglob("*.py")
}
SERVICE = sorted(name for name in MODULES if name.startswith("app."))


def imports_of(path: Path) -> set[str]:
    """Return the dotted names of every module that a file imports, late imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(
                name if (name := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            )
    return found


@pytest.mark.parametrize("module", SERVICE)
def test_imports_point_one_way(module: str) -> None:
    """A module of the service imports from the service only what the table in docs/architecture.md lets it."""
    own = {name for name in imports_of(MODULES[module]) if name.partition(".")[0] == "app"}
    assert module in ALLOWED, f"docs/architecture.md does not mention {module}"
    assert own <= ALLOWED[module]


def test_no_imports_go_round() -> None:
    """The table itself has no cycle."""
    left = dict(ALLOWED)
    while left:
        free = [module for module, imports in left.items() if not imports & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for module in free:
            del left[module]


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("torch", {"app.detector"}),
        ("fastapi", {"app.main", "app.routes"}),
        ("sqlite3", {"app.stores.sqlite"}),
        ("prometheus_client", {"app.metrics"}),
        ("PIL", {"app.images", "app.fit"}),
    ],
)
def test_each_library_has_its_home(package: str, homes: set[str]) -> None:
    """A library that shapes the design is named only where it belongs."""
    users = {name for name in SERVICE if any(each.partition(".")[0] == package for each in imports_of(MODULES[name]))}
    assert users <= homes
    assert users


def test_the_service_never_imports_training() -> None:
    """Training is offline: nothing of it reaches the service."""
    assert [name for name in SERVICE if any(each.startswith("training") for each in imports_of(MODULES[name]))] == []


def test_training_imports_only_the_contract() -> None:
    """Training uses of the service the manifest, the repository, the detector, the calibration and the PNG reader."""
    contract = {"app.manifest", "app.repository", "app.detector", "app.calibration", "app.images", "app.problems"}
    for name, path in MODULES.items():
        if name.startswith("training"):
            assert {each for each in imports_of(path) if each.startswith("app")} <= contract, name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_unpickles(module: str) -> None:
    """No module of the product reads a pickle, in any of its disguises."""
    source = MODULES[module].read_text()
    for forbidden in ("torch.load", "import pickle", "joblib", "yaml.load", "allow_pickle=True"):
        assert forbidden not in source


def test_torchscript_is_named_in_two_files() -> None:
    """`torch.jit` is deprecated: it stays where it can be replaced."""
    users = {name for name, path in MODULES.items() if "torch.jit." in path.read_text()}
    assert users == {"app.detector", "training.export"}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.name)
def test_every_test_states_its_claim(path: Path) -> None:
    """A test's docstring is its claim."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, functions) and node.name.startswith("test_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
