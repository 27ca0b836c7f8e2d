"""Draw sentences at random from documentation, docstrings, comments and messages, for a reading by a person.

    python -m tests.sample_sentences SEED [COUNT]

The reading is passed if a reader who is new to the project understands at least 38 of 40 sentences at the first
reading, without looking anything up.
"""

from __future__ import annotations

import ast
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.test_prose import ROOT, documents, paragraphs

MIN_WORDS = 5
_MESSAGE = re.compile(r"^[\w`'({][^<>{}]*(?:\{\}[^<>{}]*)*$")


def messages(path: Path) -> Iterator[str]:
    """Yield the texts of a module that users read: error messages, titles, hints, help and log events."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        text = None
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        if text and _MESSAGE.match(text) and "\n" not in text:
            yield text


def sentences() -> list[str]:
    """Return every sentence with at least `MIN_WORDS` words, with its file and, in brackets, the sentence before it."""
    found = set()
    for path in documents():
        texts = list(paragraphs(path))
        if path.suffix == ".py":
            texts += messages(path)
        for text in texts:
            before = ""
            for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z`*\"(])", re.sub(r"^[#*>\-\d. ]+", "", text)):
                if len(re.findall(r"[A-Za-z]{2,}", sentence)) >= MIN_WORDS:
                    context = f"[{before[-120:]}] " if before else ""
                    found.add(f"{path.relative_to(ROOT).as_posix()}: {context}{sentence.strip()}")
                before = sentence.strip()
    return sorted(found)


def main() -> None:
    """Print seed, number of sentences, and the drawn ones."""
    seed = int(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 40
    pool = sentences()
    sys.stdout.write(f"seed {seed}, {len(pool):,} sentences\n")
    for number, sentence in enumerate(random.Random(seed).sample(pool, count), 1):
        sys.stdout.write(f"{number:>2}. {sentence}\n")


if __name__ == "__main__":
    main()
