"""Draw docs/images/calibration.png and write the table of docs/calibration.md, from one published version.

python docs/calibration.py            # after a change of either
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import beta

from app.repository import Artifact, Repository

ROOT = Path(__file__).parent.parent
PAGE, PICTURE = ROOT / "docs" / "calibration.md", ROOT / "docs" / "images" / "calibration.png"
BEGIN, END = "<!-- table: docs/calibration.py writes it -->\n", "<!-- end of the table -->\n"
NAME, VERSION = "zero-article", 1
ALPHAS = (0.1, 0.05, 0.01, 0.002)
EXAMPLE = 0.895
"""The score whose p-value the picture explains."""


def table(artifact: Artifact) -> str:
    """Return the Markdown table of false-alarm rates."""
    calibration, n = artifact.calibration, len(artifact.calibration.scores)
    points = {point["alpha"]: point for point in artifact.manifest.metrics["operating_points"]}
    lines = [
        "| alpha | rank of the threshold | threshold | false alarms among 10,000 normal images, 95 % of the time "
        "| measured on unseen normal images | anomalies found |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for alpha in ALPHAS:
        rank = calibration.rank(alpha)
        low, high = beta.ppf((0.025, 0.975), n + 1 - rank, rank)
        measured = [f"{100 * points[alpha][key]['rate']:.1f} %" if alpha in points else "" for key in _MEASURED]
        lines.append(
            f"| {alpha:g} | {rank} of {n} | {calibration.threshold(alpha):.4f} "
            f"| {10_000 * low:.0f} to {10_000 * high:.0f} | {measured[0]} | {measured[1]} |"
        )
    return "\n".join(lines) + "\n"


def picture(artifact: Artifact) -> Figure:
    """Return the histogram of the calibration scores with thresholds, and below it what a p-value counts."""
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    calibration, n = artifact.calibration, len(artifact.calibration.scores)
    bins = np.linspace(min(calibration.scores), max(calibration.scores), 61)
    for axes in (above, below):
        axes.hist(calibration.scores, bins, color="#9ecae1")
        axes.set_ylabel("normal images")
    for alpha, colour in zip((0.05, 0.01), ("#e6850e", "#b3261e"), strict=True):
        at = calibration.threshold(alpha)
        more = sum(score > at for score in calibration.scores)
        above.axvline(at, color=colour, label=f"alpha {alpha:g}: threshold {at:.3f}, {more} of {n} lie above")
    above.set_title("Choosing a threshold: leave room for the share of false alarms that you accept", fontsize=10)
    above.legend(fontsize=8)
    _p_value(below, artifact, bins)
    below.set_xlabel("mse: how badly the autoencoder redraws a normal image that it has not learned from")
    return figure


def _p_value(axes: Axes, artifact: Artifact, bins: np.ndarray) -> None:
    scores, n = np.asarray(artifact.calibration.scores), len(artifact.calibration.scores)
    worse = scores[scores >= EXAMPLE]
    p = artifact.calibration.p_value(EXAMPLE)
    axes.hist(worse, bins, color="#2171b5")
    axes.axvline(EXAMPLE, color="#1b1f24", linestyle="--")
    axes.set_title(
        f"Reading a p-value: {len(worse)} of {n} normal images score {EXAMPLE:g} or worse; "
        f"p = ({len(worse)} + 1) / ({n} + 1) = {p:.3f}",
        fontsize=10,
    )


def main() -> int:
    """Write both."""
    artifact = Repository(ROOT / "model_store").open(NAME, VERSION)
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table(artifact) + END + rest.split(END)[1])
    picture(artifact).savefig(PICTURE, dpi=110, metadata={"Software": None})
    return 0


_MEASURED = ("false_alarms", "detections")

if __name__ == "__main__":
    sys.exit(main())
