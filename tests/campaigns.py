"""Record what `make fuzz`, `make contract`, `make mutants` and `make soak` did, in the table of docs/security.md."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "security.md"
RESULTS = ROOT / "docs" / "campaigns.json"
_TABLE = re.compile(r"(?<=<!-- campaigns -->\n).*(?=<!-- /campaigns -->)", re.DOTALL)


def record(name: str, amount: str, seconds: float, findings: str) -> None:
    """Store the result of a campaign, and rewrite the table.

    Args:
        name: name of the campaign; a later result of the same name replaces this one.
        amount: how much was tried, with its unit.
        seconds: duration.
        findings: result in words.
    """
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    results[name] = {"amount": amount, "seconds": round(seconds), "findings": findings, "date": date}
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    PAGE.write_text(_TABLE.sub(lambda _: table(results), PAGE.read_text()))


def table(results: dict[str, dict[str, object]]) -> str:
    """Return the results as a table in Markdown."""
    lines = ["\n| campaign | tried | duration | findings | date |\n| --- | --- | ---: | --- | --- |\n"]
    lines += [
        f"| {name} | {each['amount']} | {each['seconds']} s | {each['findings']} | {each['date']} |\n"
        for name, each in sorted(results.items())
    ]
    return "".join([*lines, "\n"])
