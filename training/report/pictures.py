"""The pictures of a report as small PNGs, drawn by matplotlib without its global state."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

_INK, _MUTED = "#1f2933", "#7b8794"
_NORMAL, _ANOMALOUS, _THRESHOLD = "#2f6fb0", "#d9572b", "#1f2933"
_DPI = 110


@dataclass(frozen=True)
class Example:
    """An image with its reconstruction.

    Attributes:
        title: title of the column.
        image: uint8 [28, 28].
        reconstruction: float32 [28, 28] in 0..1.
        error_map: float32 [28, 28].
        mse: score.
        flagged: whether the score is above the threshold.
        guarded: whether a guard rejected the image.
        reference: reconstruction by a reference model, float32 [28, 28] in 0..1, if there is one.
    """

    title: str
    image: NDArray[np.uint8]
    reconstruction: NDArray[np.float32]
    error_map: NDArray[np.float32]
    mse: float
    flagged: bool
    guarded: bool = False
    reference: NDArray[np.float32] | None = None


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


def gallery(examples: Sequence[Example], title: str) -> bytes:
    """Draw a column for each example: input, reconstruction, error map, verdict, and the reference's reconstruction."""
    rows = ["input", "reconstruction", "error map"]
    if examples[0].reference is not None:
        rows.append("the article's\nreconstruction")
    cell, size = (1.6, 10) if len(examples) < 7 else (1.18, 9)
    gap, left, verdict = 0.09, 0.42, 0.45
    titles = [textwrap.fill(example.title, 15) for example in examples]
    top = 0.4 + 0.17 * max(name.count("\n") + 1 for name in titles)
    tops = [top + row * (cell + gap) + (verdict if row > 2 else 0) for row in range(len(rows))]
    width = max(left + len(examples) * (cell + gap), 0.09 * len(title))
    height = tops[-1] + cell + (gap if len(rows) > 3 else verdict)
    # All images share one pair of axes, in inches from the top left. A pair per image takes three times as long.
    figure = Figure(figsize=(width, height), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    maps = [example.error_map for example in examples if not example.guarded] or [np.ones((1, 1), np.float32)]
    # The square root makes small errors visible; the scale is the same for all columns.
    error_scale = PowerNorm(0.5, 0.0, max(float(np.quantile(each, 0.995)) for each in maps), clip=True)
    grey: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
    styles: list[dict[str, Any]] = [{**grey, "vmax": 255}, grey, {"cmap": "inferno", "norm": error_scale}, grey]
    for column, (example, name) in enumerate(zip(examples, titles, strict=True)):
        x = left + column * (cell + gap)
        middle = x + cell / 2
        images: list[NDArray[Any]] = [example.image, example.reconstruction, example.error_map]
        if example.reference is not None:
            images.append(example.reference)
        for y, image, style in zip(tops, images, styles, strict=False):
            axes.imshow(image, extent=(x, x + cell, y + cell, y), **style)
        axes.text(middle, top - 0.06, name, fontsize=size, color=_INK, ha="center", va="bottom")
        caption = (
            f"{example.mse:.3g}\n{'guard: ' if example.guarded else ''}{'anomalous' if example.flagged else 'normal'}"
        )
        color, y = _ANOMALOUS if example.flagged else _NORMAL, tops[2] + cell + 0.05
        axes.text(middle, y, caption, fontsize=size, color=color, fontweight="bold", ha="center", va="top")
    for y, name in zip(tops, rows, strict=True):
        axes.text(left - 0.08, y + cell / 2, name, rotation=90, fontsize=10, color=_MUTED, ha="right", va="center")
    axes.text(width / 2, 0.08, title, fontsize=11, color=_INK, ha="center", va="top")
    axes.set(xlim=(0, width), ylim=(height, 0))
    return _png(figure)


def histogram(
    bins: Mapping[str, Sequence[float]],
    threshold: float,
    alpha: float,
    normal_class: str,
    title: str = "Scores of test images",
) -> bytes:
    """Draw the distribution of the scores of both classes, in percent, with the threshold."""
    figure, axes = _figure(6.8, 3.9)
    edges = np.asarray(bins["edges"])
    classes = (("normal", f"normal: {normal_class}", _NORMAL), ("anomalous", "anomalous: all others", _ANOMALOUS))
    for key, label, color in classes:
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
    axes.set(xlabel="mse (the last bin contains all higher scores)", ylabel="% of images", title=title)
    axes.set_xlim(edges[0], edges[-1])
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _png(figure)


def roc(curve: Mapping[str, Sequence[float]], auroc: float, points: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw recall against the false-positive rate, with the operating points."""
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
    axes.set(xlabel="false-positive rate in %", ylabel="recall in %", title=f"ROC, AUROC {auroc:.4f}")
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
    png = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)  # untyped in matplotlib
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # 128 colours are enough for curves and grey digits; the files are a third as large.
    drawn.quantize(128, dither=Image.Dither.NONE).save(png, format="PNG", optimize=True)
    return png.getvalue()
