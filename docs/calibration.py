"""Draw docs/images/calibration.png and write the table of docs/calibration.md, from the default model's version.

python docs/calibration.py            # after a change of either
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from app.models.repository import Artifact, Repository
from training.evaluation.calibrate import count_band

ROOT = Path(__file__).parent.parent
PAGE, PICTURE = ROOT / "docs" / "calibration.md", ROOT / "docs" / "images" / "calibration.png"
BEGIN, END = "<!-- table: docs/calibration.py writes it -->\n", "<!-- end of the table -->\n"
NAME = "zero"
ALPHAS = (0.1, 0.05, 0.01, 0.002)
FRESH = 10_000
"""Number of new normal images for which the table counts the false positives."""
WORSE = 40
"""Number of calibration scores at least as high as the score in the picture."""


def shipped() -> Artifact:
    """Return the current version of the model that the page describes."""
    repository = Repository(ROOT / "model_store")
    return repository.open(NAME, repository.current(NAME) or 0)


def example(artifact: Artifact) -> float:
    """Return the score whose p-value the picture shows."""
    return round(artifact.calibration.scores[-WORSE], 3)


def table(artifact: Artifact) -> str:
    """Return the Markdown table of false-positive rates."""
    calibration, n = artifact.calibration, len(artifact.calibration.scores)
    points = {point["alpha"]: point for point in artifact.manifest.metrics["operating_points"]}
    version = f"{artifact.manifest.name}`, version {artifact.manifest.version}"
    lines = [
        f"For the model `{version}, n is {n:,}:",
        "",
        f"| alpha | rank of the threshold | threshold | false positives among {FRESH:,} normal images, 95 % interval "
        "| measured false-positive rate | measured recall |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for alpha in ALPHAS:
        rank = calibration.rank(alpha)
        low, high = count_band(n, rank, FRESH, 0.95)
        measured = [f"{100 * points[alpha][key]['rate']:.1f} %" if alpha in points else "" for key in _MEASURED]
        lines.append(
            f"| {alpha:g} | {rank} of {n} | {calibration.threshold(alpha):.4f} "
            f"| {low} to {high} | {measured[0]} | {measured[1]} |"
        )
    return "\n".join(lines) + "\n"


def picture(artifact: Artifact) -> Figure:
    """Return the histogram of the calibration scores with thresholds, and below it the scores that a p-value counts."""
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    calibration, n = artifact.calibration, len(artifact.calibration.scores)
    # A few normal images have far higher scores than the others: they are counted in the last bin.
    end = 1.25 * calibration.threshold(0.01)
    bins = np.linspace(min(calibration.scores), end, 61)
    shown = np.minimum(calibration.scores, end)
    for axes in (above, below):
        axes.hist(shown, bins, color="#9ecae1")
        axes.set_ylabel("normal images")
    for alpha, colour in zip((0.05, 0.01), ("#e6850e", "#b3261e"), strict=True):
        at = calibration.threshold(alpha)
        more = sum(score > at for score in calibration.scores)
        above.axvline(at, color=colour, label=f"alpha {alpha:g}: threshold {at:.3f}, {more} of {n} lie above")
    above.set_title(
        "Choosing a threshold: alpha is the share of normal images above it, the false-positive rate", fontsize=10
    )
    above.legend(fontsize=8)
    _p_value(below, artifact, bins)
    below.set_xlabel("mse of normal images that the model did not learn from; the last bar includes all higher scores")
    return figure


def _p_value(axes: Axes, artifact: Artifact, bins: np.ndarray) -> None:
    scores, n = np.asarray(artifact.calibration.scores), len(artifact.calibration.scores)
    at = example(artifact)
    worse = scores[scores >= at]
    p = artifact.calibration.p_value(at)
    axes.hist(np.minimum(worse, bins[-1]), bins, color="#2171b5")
    axes.axvline(at, color="#1b1f24", linestyle="--")
    axes.set_title(
        f"p-value: {len(worse)} of {n} normal images have a score of at least {at:g}; "
        f"p = ({len(worse)} + 1) / ({n} + 1) = {p:.3f}",
        fontsize=10,
    )


def main() -> int:
    """Write the table and the picture."""
    artifact = shipped()
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table(artifact) + END + rest.split(END)[1])
    picture(artifact).savefig(PICTURE, dpi=110, metadata={"Software": None})
    return 0


_MEASURED = ("false_alarms", "detections")

if __name__ == "__main__":
    sys.exit(main())
