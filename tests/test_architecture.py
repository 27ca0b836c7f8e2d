"""Names that no module may use. `make check` holds the imports: the layers in pyproject.toml."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

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


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("torch", {"app.inference.buffers", "app.inference.detector", "app.inference.device"}),
        (
            "fastapi",
            {
                "app.main",
                "app.http.dependencies",
                "app.http.errors",
                "app.http.examples",
                *(name for name in SERVICE if name.startswith("app.http.routes.")),
            },
        ),
        ("sqlite3", {"app.stores.sqlite", "app.stores.sqlite_file", "app.stores.states"}),
        ("prometheus_client", {"app.telemetry.metrics"}),
        (
            "PIL",
            {f"app.images.{name}" for name in ("png", "jpeg", "background", "reading", "fit", "pictures", "resize")},
        ),
    ],
)
def test_each_library_has_its_home(package: str, homes: set[str]) -> None:
    """A library that shapes the design is named only where it belongs."""
    users = {name for name in SERVICE if any(each.partition(".")[0] == package for each in imports_of(MODULES[name]))}
    assert users <= homes
    assert users


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_unpickles(module: str) -> None:
    """No module of the product reads a pickle, in any of its disguises."""
    source = MODULES[module].read_text()
    for forbidden in ("torch.load", "import pickle", "joblib", "yaml.load", "allow_pickle=True"):
        assert forbidden not in source


def test_torchscript_is_named_in_two_files() -> None:
    """`torch.jit` is deprecated: it stays where it can be replaced."""
    users = {name for name, path in MODULES.items() if "torch.jit." in path.read_text()}
    assert users == {"app.inference.detector", "training.publishing.export"}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.name)
def test_every_test_states_its_claim(path: Path) -> None:
    """A test's docstring is its claim."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, functions) and node.name.startswith("test_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_the_service_stays_easy_to_read() -> None:
    """`app/` has at most 15 entries, no file has more than 300 lines, and no class more than 200."""
    entries = {path.name for path in (ROOT / "app").iterdir()} - {"__init__.py", "__pycache__"}
    assert len(entries) <= 15
    long: list[str] = []
    for name in SERVICE:
        source = MODULES[name].read_text()
        assert source.count("\n") <= 300, name
        classes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
        long += [f"{name}.{each.name}" for each in classes if (each.end_lineno or 0) - each.lineno >= 200]
    assert long == []
