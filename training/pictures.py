"""Draw the report's pictures as small PNGs.

Knows: matplotlib. Does not know: models, data sets, files. No global state: every picture has its own figure.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

_INK, _MUTED = "#1f2933", "#7b8794"
_NORMAL, _ANOMALOUS, _THRESHOLD = "#2f6fb0", "#d9572b", "#1f2933"
_DPI = 110


@dataclass(frozen=True)
class Example:
    """One image beside what the model made of it.

    Attributes:
        title: what it is.
        image: uint8 [28, 28].
        reconstruction: float32 [28, 28] in 0..1.
        error_map: float32 [28, 28].
        mse: its score.
        flagged: whether that is above the threshold.
    """

    title: str
    image: NDArray[np.uint8]
    reconstruction: NDArray[np.float32]
    error_map: NDArray[np.float32]
    mse: float
    flagged: bool


def loss(losses: Sequence[float]) -> bytes:
    """Draw the mean training loss of each epoch."""
    figure, axes = _figure(6.0, 3.4)
    epochs = range(1, len(losses) + 1)
    axes.plot(epochs, losses, color=_NORMAL, linewidth=2, marker="o", markersize=3.5)
    axes.annotate(
        f"{losses[-1]:.4f}",
        (len(losses), losses[-1]),
        xytext=(0, 8),
        textcoords="offset points",
        ha="right",
        color=_INK,
    )
    axes.set(xlabel="epoch", ylabel="mean squared error", title="Training loss")
    axes.margins(y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _png(figure)


def reconstructions(examples: Sequence[Example], threshold: float) -> bytes:
    """Draw each example in a column: the input, its reconstruction, its error map, its score and verdict."""
    figure = Figure(figsize=(1.75 * len(examples) + 0.7, 6.3), dpi=_DPI, layout="constrained")
    rows = ("input", "reconstruction", "error map")
    grid = figure.subplots(3, len(examples), squeeze=False)
    brightest = max(float(np.quantile(example.error_map, 0.995)) for example in examples)
    for column, example in enumerate(examples):
        grid[0][column].imshow(example.image, cmap="gray", vmin=0, vmax=255)
        grid[1][column].imshow(example.reconstruction, cmap="gray", vmin=0, vmax=1)
        grid[2][column].imshow(example.error_map, cmap="inferno", vmin=0, vmax=brightest)
        grid[0][column].set_title(example.title, fontsize=10, color=_INK)
        verdict = "anomaly" if example.flagged else "normal"
        color = _ANOMALOUS if example.flagged else _NORMAL
        grid[2][column].set_xlabel(f"mse {example.mse:.4g}\n{verdict}", fontsize=10, color=color, fontweight="bold")
    for row, name in enumerate(rows):
        grid[row][0].set_ylabel(name, fontsize=10, color=_MUTED)
        for axes in grid[row]:
            axes.set(xticks=[], yticks=[])
            for side in axes.spines.values():
                side.set_visible(False)
    figure.suptitle(f"What the model redraws (anomaly: mse above {threshold:.4g})", fontsize=11, color=_INK)
    return _png(figure)


def histogram(bins: Mapping[str, Sequence[float]], threshold: float, alpha: float, normal_class: str) -> bytes:
    """Draw how the scores of both kinds spread, as shares, with the threshold."""
    figure, axes = _figure(6.8, 3.9)
    edges = np.asarray(bins["edges"])
    kinds = (("normal", f"normal: {normal_class}", _NORMAL), ("anomalous", "anomalous: everything else", _ANOMALOUS))
    for key, label, color in kinds:
        counts = np.asarray(bins[key], float)
        if counts.sum() > 0:
            axes.stairs(100 * counts / counts.sum(), edges, fill=True, alpha=0.45, color=color, label=label)
            axes.stairs(100 * counts / counts.sum(), edges, color=color, linewidth=1.2)
    axes.axvline(
        threshold,
        color=_THRESHOLD,
        linestyle="--",
        linewidth=1.4,
        label=f"threshold at alpha {alpha:g}",
    )
    axes.set(xlabel="mse (the last bin takes everything above)", ylabel="% of images", title="Scores of unseen images")
    axes.set_xlim(edges[0], edges[-1])
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _png(figure)


def roc(curve: Mapping[str, Sequence[float]], auroc: float, points: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw detections against false alarms, with the usual operating points."""
    figure, axes = _figure(4.6, 4.4)
    axes.plot([0, 100], [0, 100], color=_MUTED, linestyle=":", linewidth=1)
    axes.plot(
        100 * np.asarray(curve["false_alarms"]), 100 * np.asarray(curve["detections"]), color=_NORMAL, linewidth=2
    )
    for point in points:
        x, y = 100 * point["false_alarms"]["rate"], 100 * point["detections"]["rate"]
        axes.plot([x], [y], "o", color=_ANOMALOUS, markersize=5)
        axes.annotate(
            f"alpha {point['alpha']:g}", (x, y), xytext=(8, -4), textcoords="offset points", fontsize=9, color=_INK
        )
    axes.set(xlabel="false alarms, % of normal", ylabel="detections, % of anomalous", title=f"ROC, AUROC {auroc:.4f}")
    axes.set_xlim(-1, 101)
    axes.set_ylim(-1, 101)
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelcolor=_INK)
    axes.title.set_color(_INK)
    return figure, axes


def _png(figure: Figure) -> bytes:
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", facecolor="white")
    # 128 colours are enough for curves and grey digits, and shrink a version to a third.
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(packed, format="PNG", optimize=True)
    return packed.getvalue()
