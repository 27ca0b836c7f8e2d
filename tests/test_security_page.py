"""docs/security.md names tests and make targets that exist, and shows the recorded campaigns."""

from __future__ import annotations

import ast
import json
import re

import pytest

from tests.campaigns import PAGE, RESULTS, table
from tests.conftest import ROOT

ROWS = [line for line in PAGE.read_text().splitlines() if re.match(r"\| (?!attack |---|campaign |`make )", line)]


def test_every_row_has_a_test() -> None:
    """Each attack has five cells, and the last one names a test or a make target."""
    assert len(ROWS) > 30
    for row in ROWS:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 5, row
        assert re.search(r"`(tests/[\w/]+\.py::test_\w+|make [a-z-]+)`", cells[-1]), row


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[^`]+)`", PAGE.read_text()))))
def test_every_named_test_exists(name: str) -> None:
    """A named test is a function of its file."""
    path, _, function = name.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_every_named_target_exists() -> None:
    """A named make target is one of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z-]+)`", PAGE.read_text()))
    assert {"fuzz", "contract", "mutants", "audit", "sbom", "ages"} <= named
    assert [target for target in sorted(named) if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_the_table_of_campaigns_is_that_of_the_recorded_results() -> None:
    """The figures of the page are those of docs/campaigns.json."""
    assert f"<!-- campaigns -->\n{table(json.loads(RESULTS.read_text()))}<!-- /campaigns -->" in PAGE.read_text()
