"""How results are written: a table for people; JSON, JSON lines and CSV for programs. Knows: results, streams."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TextIO

from anomaly import Problem, Score, ServiceError

Format = Literal["table", "json", "jsonl", "csv"]
COLUMNS = (
    "file", "verdict", "mse", "threshold", "alpha", "p_value", "reason", "model", "version", "id", "problem", "detail",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What became of one file."""

    file: str
    outcome: Score | ServiceError

    @property
    def verdict(self) -> str:
        """`normal`, `anomalous`, or `not scored`."""
        if isinstance(self.outcome, Score):
            return "anomalous" if self.outcome.is_anomaly else "normal"
        return "not scored"

    def document(self) -> dict[str, Any]:
        """Return it as the service would say it: the score's or the problem's members, and the file."""
        if isinstance(self.outcome, Score):
            return {"file": self.file, **self.outcome.document}
        return {"file": self.file, "problem": _problem(self.outcome)}

    def row(self) -> dict[str, Any]:
        """Return it flat, one value a column."""
        flat = {name: value for name, value in self.document().items() if name in COLUMNS and name != "problem"}
        if isinstance(self.outcome, ServiceError):
            flat |= {"problem": _problem(self.outcome)["type"], "detail": str(self.outcome)}
        return {"verdict": self.verdict, **flat}


class Writer(Protocol):
    """Takes results one by one."""

    def add(self, result: Result) -> None:
        """Take the next result."""

    def close(self) -> None:
        """Write what has not been written yet."""


class JsonLines:
    """One JSON document a line, as each result comes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def add(self, result: Result) -> None:
        """Write one line."""
        self._stream.write(json.dumps(result.document(), ensure_ascii=not _is_utf8(self._stream)) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is held back."""


class Json:
    """One JSON list at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._documents: list[dict[str, Any]] = []

    def add(self, result: Result) -> None:
        """Keep the result for the list."""
        self._documents.append(result.document())

    def close(self) -> None:
        """Write the list."""
        self._stream.write(json.dumps(self._documents, indent=2, ensure_ascii=not _is_utf8(self._stream)) + "\n")
        self._stream.flush()


class Csv:
    """Comma-separated values with a head line, as each result comes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        self._writer.writeheader()

    def add(self, result: Result) -> None:
        """Write one line."""
        row = result.row()
        self._writer.writerow({name: _no_formula(value) for name, value in row.items()})
        self._stream.flush()

    def close(self) -> None:
        """Nothing is held back."""


class Table:
    """A table with colours at the end, and a line that counts."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._results: list[Result] = []

    def add(self, result: Result) -> None:
        """Keep the result for the table."""
        self._results.append(result)

    def close(self) -> None:
        """Write the table."""
        if not self._results:
            return
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=None, header_style="bold", pad_edge=False)
        for column in ("file", "verdict", "mse", "threshold", "p-value", "model", ""):
            numbers = column in {"mse", "threshold", "p-value"}
            table.add_column(column, justify="right" if numbers else "left", overflow="fold", no_wrap=numbers)
        for result in self._results:
            table.add_row(
                Text(printable(result.file)), Text(result.verdict, _STYLES[result.verdict]), *_cells(result.outcome)
            )
        console = console_of(self._stream)
        console.print(table)
        console.print(Text(_count(self._results)))


class Lines:
    """A line for people, as each result comes: the table of a run that does not end."""

    def __init__(self, stream: TextIO) -> None:
        self._console = console_of(stream)

    def add(self, result: Result) -> None:
        """Write one line."""
        from rich.text import Text

        cells = [cell.plain for cell in _cells(result.outcome)]
        words = f"mse {cells[0]}  threshold {cells[1]}  p {cells[2]}" if cells[0] else cells[-1]
        verdict = Text(f"{result.verdict:<10}", _STYLES[result.verdict])
        self._console.print(Text.assemble(verdict, "  ", printable(result.file), "  ", words), soft_wrap=True)

    def close(self) -> None:
        """Nothing is held back."""


WRITERS: dict[Format, Callable[[TextIO], Writer]] = {"table": Table, "json": Json, "jsonl": JsonLines, "csv": Csv}
STREAMING: dict[Format, Callable[[TextIO], Writer]] = {**WRITERS, "table": Lines, "json": JsonLines}

_STYLES = {"normal": "green", "anomalous": "bold red", "not scored": "yellow"}


def console_of(stream: TextIO) -> Any:
    """Return a rich console that writes to a stream; where that is no terminal, lines are as long as they must be."""
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else 240)


def printable(text: str) -> str:
    """Escape what is no character to see: a file's name must not command the terminal."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _no_formula(value: Any) -> Any:
    """Quote what a spreadsheet would run: a file's name may begin as a formula does. `-` alone is none."""
    return f"'{value}" if isinstance(value, str) and re.match(r"[=+\-@\t\r].", value, re.DOTALL) else value


def _is_utf8(stream: TextIO) -> bool:
    return (stream.encoding or "").lower() in {"utf-8", "utf8"}


def _cells(outcome: Score | ServiceError) -> list[Any]:
    from rich.text import Text

    if isinstance(outcome, ServiceError):
        return [*(Text("") for _ in range(4)), Text(printable(str(outcome)))]
    numbers = (f"{outcome.mse:.4g}", f"{outcome.threshold:.4g}", f"{outcome.p_value:.3g}")
    model, reason = f"{outcome.model}@{outcome.version}", (outcome.reason or "").replace("_", " ")
    return [Text(printable(cell)) for cell in (*numbers, model, reason)]


def _count(results: list[Result]) -> str:
    counts = {verdict: sum(result.verdict == verdict for result in results) for verdict in _STYLES}
    return f"{len(results)} image{'s' * (len(results) > 1)}: " + ", ".join(
        f"{count} {verdict}" for verdict, count in counts.items() if count
    )


def _problem(error: ServiceError) -> dict[str, Any]:
    if isinstance(error, Problem):
        document = {"type": error.type, "title": error.title, "status": error.status}
        return {**document, **{name: text for name in ("detail", "hint") if (text := getattr(error, name))}}
    return {"type": f"client:{type(error).__name__}", "title": str(error)}
