"""Each row of docs/reliability.md names a test that exists."""

from __future__ import annotations

import ast
import re

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text()


def test_every_row_names_a_test_that_exists() -> None:
    """The last cell of each row is `file::test`, and the file defines a test of that name."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| fault |", "| ---"))]
    assert len(rows) > 50
    for row in rows:
        match = re.search(r"\| `(tests/[\w/]+\.py)::(test_\w+)` \|$", row)
        assert match is not None, f"a row without a test: {row}"
        defined = {
            node.name
            for node in ast.walk(ast.parse((ROOT / match[1]).read_text()))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        }
        assert match[2] in defined, f"{match[1]} defines no {match[2]}"
