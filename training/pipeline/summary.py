"""The table of the results of a series."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

_ALPHAS = (0.01, 0.05)


def summary_table(results: Iterable[dict[str, Any]], label_names: Sequence[str]) -> Table:
    """Return one row for each normal class, averaged over its seeds, and one with the mean of all results."""
    by_class: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: (result["normal"], result["seed"])):
        by_class.setdefault(",".join(label_names[label] for label in result["normal"]), []).append(result)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("normal")
    titles = [f"{metric} at {100 * alpha:g} %" for alpha in _ALPHAS for metric in ("false positives", "recall")]
    for title in ("seeds", "AUROC %", "lowest", *titles):
        table.add_column(title, justify="right")
    for name, of_class in by_class.items():
        table.add_row(name, str(len(of_class)), *_cells(of_class))
    everything = [result for of_class in by_class.values() for result in of_class]
    if len(by_class) > 1:
        table.add_section()
        table.add_row("mean", str(len(everything)), *_cells(everything), style="bold")
    return table


def _cells(results: Sequence[dict[str, Any]]) -> list[str]:
    aurocs = [100 * result["auroc"] for result in results]
    cells = [f"{_mean(aurocs):.2f}", f"{min(aurocs):.2f}"]
    for alpha in _ALPHAS:
        points = [point for result in results for point in result["operating_points"] if point["alpha"] == alpha]
        cells += [
            f"{100 * _mean([point[metric]['rate'] for point in points]):.1f} %" if points else "-"
            for metric in ("false_alarms", "detections")
        ]
    return cells


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
