"""Documentation, docstrings and comments contain no pattern of unclear prose: docs/style.md describes the style.

`tests/prose_allowed.txt` lists reviewed exceptions.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT

PATTERNS = {
    "a sentence begins with a pronoun": r"(?:^|[.:!?] )(?:What|Whoever|Whatever|Who)\b(?![^.!?]*\?)",
    "nobody acts": r"\b(?:nobody|somebody|whoever|whatever)\b",
    "unclear 'who'": r"\bto who\b",
    "unusual negation": r"(?<![Tt]here )\b(?:is|are) (?:no|none)\b(?! longer)",
    "unclear default": r"\bunless told\b",
    "metaphor": r"\b(?:let go of|lets go of|company|neighbours?)\b",
    "old word": r"\b(?:anew|afresh|meanwhile|for ever|beside)\b",
    "software says": r"(?:`|\b(?:it|which|that|page|card|header|log|reply|manifest|file|store)) (?:says|said)\b",
    "a rate without 'per'": r"\b(?:once|twice|times|bytes|images|requests|lines?|ms|us|µs|most|\d) an? "
    r"(?:image|request|second|minute|hour|day|line|file|batch|score|pixel)\b",
    "several semicolons": r";[^;]*;",
}
FOLDERS = ("app", "anomaly", "training")
ALLOWED = ROOT / "tests" / "prose_allowed.txt"


class Finding(NamedTuple):
    """A sentence that matches a pattern."""

    file: str
    pattern: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.pattern}: {self.text}"


def documents() -> list[Path]:
    """Return every page and every module whose prose is checked."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "research").rglob("*.md")]
    return sorted([*pages, *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])


def paragraphs(path: Path) -> Iterator[str]:
    """Yield the prose of a file, one paragraph, list item, table cell, docstring paragraph or comment at a time."""
    text = path.read_text()
    if path.suffix == ".md":
        yield from _blocks(re.sub(r"^ *```.*?^ *```", "\n", text, flags=re.MULTILINE | re.DOTALL))
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from _blocks(node.value.value)
    comment: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 and comment:
                yield " ".join(comment)
                comment = []
            comment.append(re.sub(r"^#:? ?|noqa.*|type: ignore.*", "", token.string))
            last = token.start[0]
    yield " ".join(comment)


def _blocks(text: str) -> Iterator[str]:
    for line in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        yield from line.strip("|").split("|")
    text = re.sub(r"^\|.*\|$", "\n", text, flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[*-]|\d+\.) )|\n(?=#)|\n(?=\s+\w[\w, ]*: )", text):
        yield " ".join(block.split())


def findings(path: Path) -> list[Finding]:
    """Return the findings in a file. Code is not prose, and neither are quotations."""
    file, found = path.relative_to(ROOT).as_posix(), []
    for paragraph in paragraphs(path):
        prose = re.sub(r'`[^`]*`|"[^"]*"|\]\([^)]*\)', "`", paragraph)
        for name, pattern in PATTERNS.items():
            if re.search(pattern, prose):
                found.append(Finding(file, name, paragraph))
    return found


def allowed() -> set[str]:
    """Return the reviewed findings."""
    return {line for line in ALLOWED.read_text().splitlines() if line and not line.startswith("#")}


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_clear(path: Path) -> None:
    """No paragraph matches a pattern, except for the reviewed ones."""
    reviewed = allowed()
    assert [each for each in map(str, findings(path)) if each not in reviewed] == []


def test_the_list_of_exceptions_only_shrinks() -> None:
    """Every exception is still needed: the paragraph still occurs."""
    found = {str(each) for path in documents() for each in findings(path)}
    assert sorted(allowed() - found) == [], "changed: remove the line from the list"
