"""Draws quantiles of scores as a small chart, an inline SVG without its own scripts and styles."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_MARGIN = 0.07
"""Part of the width that stays free on each side, for the labels of the axis."""
_ROW, _TOP, _AXIS = 40, 26, 22
"""Heights in pixels: of a row, from the top to the first bar, of the axis. The width is that of the page."""
_MAX_TICKS = 6


class Row(NamedTuple):
    """Quantiles of scores.

    Attributes:
        label: words above the bar.
        quantiles: the scores at 0.1, 0.5, 0.9 and 0.99, all positive; empty without scores.
    """

    label: str
    quantiles: Mapping[float, float]


def score_chart(rows: Sequence[Row], threshold: float) -> str:
    """Return a figure, HTML, with a bar per row on one logarithmic axis, and the threshold.

    Args:
        rows: at least one of them with quantiles.
        threshold: if it is not positive, there is no chart: the axis is logarithmic.
    """
    if threshold <= 0:
        return ""
    values = [threshold, *(value for row in rows for value in row.quantiles.values())]
    low, high = math.log(min(values)), math.log(max(values))
    if high - low < math.log(2):
        low, high = (low + high - math.log(2)) / 2, (low + high + math.log(2)) / 2

    def at(value: float) -> str:
        share = _MARGIN + (1 - 2 * _MARGIN) * (math.log(value) - low) / (high - low)
        return f"{100 * share:.2f}%"

    bottom = _ROW * len(rows)
    parts = [
        f'<line class="axis" x1="0" x2="100%" y1="{bottom}" y2="{bottom}"/>',
        *(f'<text class="tick" x="{at(tick)}" y="{bottom + 16}">{tick:g}</text>' for tick in _ticks(low, high)),
        f'<line class="threshold" x1="{at(threshold)}" x2="{at(threshold)}" y1="0" y2="{bottom}"/>',
    ]
    for number, row in enumerate(rows):
        top = _ROW * number
        parts.append(f'<text x="0" y="{top + 13}">{html.escape(row.label)}</text>')
        if row.quantiles:
            parts += _bar({level: at(value) for level, value in row.quantiles.items()}, top + _TOP)
    caption = f"Bar: 10 % to 90 % of the scores. Dot: median. Tick: 99 %. Dashed line: threshold {threshold:.3g}."
    return (
        f'<figure class="scores">\n<svg role="img" aria-label="{html.escape(_words(rows, threshold))}" '
        f'width="100%" height="{bottom + _AXIS}">{"".join(parts)}</svg>\n'
        f"<figcaption>{caption}</figcaption>\n</figure>\n"
    )


def _bar(at: Mapping[float, str], y: int) -> list[str]:
    return [
        f'<line class="rest" x1="{at[0.9]}" x2="{at[0.99]}" y1="{y}" y2="{y}"/>',
        f'<line class="bar" x1="{at[0.1]}" x2="{at[0.9]}" y1="{y}" y2="{y}"/>',
        f'<line class="rest" x1="{at[0.99]}" x2="{at[0.99]}" y1="{y - 5}" y2="{y + 5}"/>',
        f'<circle cx="{at[0.5]}" cy="{y}" r="5"/>',
    ]


def _ticks(low: float, high: float) -> list[float]:
    """Return round scores between two logarithms, at most `_MAX_TICKS` of them."""
    decades = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,)):
        found = [step * 10.0**decade for decade in decades for step in steps]
        found = [tick for tick in found if low <= math.log(tick) <= high]
        if len(found) <= _MAX_TICKS:
            return found
    return found[:: math.ceil(len(found) / _MAX_TICKS)]


def _words(rows: Sequence[Row], threshold: float) -> str:
    described = [
        f"{row.label}: " + (", ".join(f"{100 * level:g} % {value:.3g}" for level, value in row.quantiles.items()))
        for row in rows
        if row.quantiles
    ]
    return ". ".join(["Quantiles of the scores", *described, f"Threshold: {threshold:.3g}"])
