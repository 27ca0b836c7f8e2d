"""docs/compatibility.md lists public incidents, each once and with its outcome."""

from __future__ import annotations

import re

from tests.conftest import ROOT


def test_the_page_lists_twenty_incidents() -> None:
    """Each row has a link, what was sent, and what the service does with it; no link occurs twice."""
    page = (ROOT / "docs" / "compatibility.md").read_text()
    rows = re.findall(r"^\| \[[^]]+ #\d+\]\((https://[^)]+)\) \| (.+) \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) >= 20
    assert len({link for link, _, _ in rows}) == len(rows)
    assert len(rows) == page.count("| [")
