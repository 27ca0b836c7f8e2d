"""Write results: as a table for people; as JSON, JSON Lines or CSV for programs."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TextIO

from anomaly import Problem, Score, ServiceError
from anomaly.cli.messages import in_one_line

Format = Literal["table", "json", "jsonl", "csv"]
COLUMNS = (
    "file", "verdict", "mse", "threshold", "alpha", "p_value", "reason", "model", "version", "id", "problem", "detail",
    "q_value", "discovery",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """The result of one image.

    Attributes:
        file: name of the file, `-` for standard input.
        outcome: the score, or the reason why there is none.
        q_value: the smallest false-discovery rate at which the image is a discovery; None without `--fdr`.
        is_discovery: whether that is at most the requested rate; None without `--fdr`.
    """

    file: str
    outcome: Score | ServiceError
    q_value: float | None = None
    is_discovery: bool | None = None

    @property
    def verdict(self) -> str:
        """`normal`, `anomalous`, or `not scored`."""
        if isinstance(self.outcome, Score):
            return "anomalous" if self.outcome.is_anomaly else "normal"
        return "not scored"

    def document(self) -> dict[str, Any]:
        """Return the members of the score or of the problem, and the file."""
        if isinstance(self.outcome, Score):
            lot = {} if self.q_value is None else {"q_value": self.q_value, "discovery": self.is_discovery}
            return {"file": self.file, **self.outcome.document, **lot}
        return {"file": self.file, "problem": _problem(self.outcome)}

    def row(self) -> dict[str, Any]:
        """Return the values of the columns of a CSV file."""
        flat = {name: value for name, value in self.document().items() if name in COLUMNS and name != "problem"}
        if isinstance(self.outcome, ServiceError):
            flat |= {"problem": _problem(self.outcome)["type"], "detail": in_one_line(self.outcome)}
        return {"verdict": self.verdict, **flat}


class Writer(Protocol):
    """Writes results to a stream."""

    def add(self, result: Result) -> None:
        """Add a result."""

    def close(self) -> None:
        """Write the rest of the output."""


class JsonLines:
    """Writes each result at once, as one JSON document per line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def add(self, result: Result) -> None:
        """Write one line."""
        self._stream.write(json.dumps(result.document(), ensure_ascii=not _is_utf8(self._stream)) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Do nothing: every result is written already."""


class Json:
    """Writes one JSON list at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._documents: list[dict[str, Any]] = []

    def add(self, result: Result) -> None:
        """Add a result to the list."""
        self._documents.append(result.document())

    def close(self) -> None:
        """Write the list."""
        self._stream.write(json.dumps(self._documents, indent=2, ensure_ascii=not _is_utf8(self._stream)) + "\n")
        self._stream.flush()


class Csv:
    """Writes each result at once, as a line of comma-separated values below a header."""

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
        """Do nothing: every result is written already."""


class Table:
    """Writes a coloured table and a line with the counts at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._results: list[Result] = []

    def add(self, result: Result) -> None:
        """Add a result to the table."""
        self._results.append(result)

    def close(self) -> None:
        """Write the table."""
        if not self._results:
            return
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=None, header_style="bold", pad_edge=False)
        is_lot = any(result.q_value is not None for result in self._results)
        for column in (
            "file",
            "verdict",
            "mse",
            "threshold",
            "p-value",
            "model",
            "",
            *(["q-value", "discovery"] * is_lot),
        ):
            numbers = column in {"mse", "threshold", "p-value", "q-value"}
            table.add_column(column, justify="right" if numbers else "left", overflow="fold", no_wrap=numbers)
        for result in self._results:
            table.add_row(
                Text(printable(result.file)),
                Text(result.verdict, _STYLES[result.verdict]),
                *_cells(result.outcome),
                *(_lot_cells(result) if is_lot else ()),
            )
        console = console_of(self._stream)
        console.print(table)
        console.print(Text(_count(self._results)))


class Lines:
    """Writes each result at once, as a line for people."""

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
        """Do nothing: every result is written already."""


WRITERS: dict[Format, Callable[[TextIO], Writer]] = {"table": Table, "json": Json, "jsonl": JsonLines, "csv": Csv}
STREAMING: dict[Format, Callable[[TextIO], Writer]] = {**WRITERS, "table": Lines, "json": JsonLines}

_STYLES = {"normal": "green", "anomalous": "bold red", "not scored": "yellow"}


def console_of(stream: TextIO) -> Any:
    """Return a rich console for a stream. Without a terminal its lines may have 240 characters."""
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else 240)


def printable(text: str) -> str:
    """Escape the characters that are not printable, so that a file name cannot control the terminal."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _no_formula(value: Any) -> Any:
    """Quote a text that a spreadsheet would evaluate as a formula. `-` alone is not a formula."""
    return f"'{value}" if isinstance(value, str) and re.match(r"[=+\-@\t\r].", value, re.DOTALL) else value


def _is_utf8(stream: TextIO) -> bool:
    return (stream.encoding or "").lower() in {"utf-8", "utf8"}


def _cells(outcome: Score | ServiceError) -> list[Any]:
    from rich.text import Text

    if isinstance(outcome, ServiceError):
        return [*(Text("") for _ in range(4)), Text(printable(in_one_line(outcome)))]
    numbers = (f"{outcome.mse:.4g}", f"{outcome.threshold:.4g}", f"{outcome.p_value:.3g}")
    model, reason = f"{outcome.model}@{outcome.version}", (outcome.reason or "").replace("_", " ")
    return [Text(printable(cell)) for cell in (*numbers, model, reason)]


def _lot_cells(result: Result) -> tuple[str, str]:
    if result.q_value is None:
        return "", ""
    return f"{result.q_value:.3g}", "yes" if result.is_discovery else "no"


def _count(results: list[Result]) -> str:
    counts = {verdict: sum(result.verdict == verdict for result in results) for verdict in _STYLES}
    return f"{len(results)} image{'s' * (len(results) > 1)}: " + ", ".join(
        f"{count} {verdict}" for verdict, count in counts.items() if count
    )


def _problem(error: ServiceError) -> dict[str, Any]:
    if isinstance(error, Problem):
        document = {"type": error.type, "title": error.title, "status": error.status}
        return {**document, **{name: text for name in ("detail", "hint") if (text := getattr(error, name))}}
    return {"type": f"client:{type(error).__name__}", "title": str(error)}  # the service never saw the image
