"""The figures of a series in one table.

Knows: result rows, rich. Does not know: how they were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

_ALPHAS = (0.01, 0.05)


def summary_table(rows: Iterable[dict[str, Any]], label_names: Sequence[str]) -> Table:
    """Return one line for each normal class, averaged over its seeds, and one with the mean of all."""
    by_class: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["normal"], row["seed"])):
        by_class.setdefault(",".join(label_names[label] for label in row["normal"]), []).append(row)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("normal")
    titles = [f"{what} at {100 * alpha:g} %" for alpha in _ALPHAS for what in ("false alarms", "caught")]
    for title in ("seeds", "AUROC %", "lowest", *titles):
        table.add_column(title, justify="right")
    for name, found in by_class.items():
        table.add_row(name, str(len(found)), *_cells(found))
    everything = [row for found in by_class.values() for row in found]
    if len(by_class) > 1:
        table.add_section()
        table.add_row("mean", str(len(everything)), *_cells(everything), style="bold")
    return table


def _cells(rows: Sequence[dict[str, Any]]) -> list[str]:
    aurocs = [100 * row["auroc"] for row in rows]
    cells = [f"{_mean(aurocs):.2f}", f"{min(aurocs):.2f}"]
    for alpha in _ALPHAS:
        points = [point for row in rows for point in row["operating_points"] if point["alpha"] == alpha]
        cells += [
            f"{100 * _mean([point[what]['rate'] for point in points]):.1f} %" if points else "-"
            for what in ("false_alarms", "detections")
        ]
    return cells


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
