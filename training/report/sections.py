"""Sections and formats that the model cards of trained and of recalibrated versions share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from app.models.calibration import needed
from app.models.manifest import LOCAL, Manifest, Preparation
from training.evaluation.calibrate import describe_guard_counts
from training.report.limits import limits


def origin_section(manifest: Manifest) -> str:
    """Return how the version was made, as a table."""
    data, recipe, origin = manifest.data, manifest.recipe, manifest.calibration.recalibrated
    calibrated = f"{data.calibration:,} other normal images"
    if origin is not None:
        calibrated = f"{manifest.calibration.n:,} normal images: {origin.source}; model of version {origin.version}"
    rows = {
        "normal class": manifest.normal_class,
        "data": f"{data.name} ({data.source})",
        "trained on": f"{data.train:,} normal images",
        "calibrated on": calibrated,
        "tested on": f"{manifest.metrics['test']}: {data.test_normal:,} normal and {data.test_anomalous:,} anomalous",
        "recipe": f"`{recipe.name}`, seed {recipe.seed}",
        "space of the squared errors": manifest.score_space,
        "guards": ", ".join(f"`{reason}`" for reason in manifest.reasons if reason != LOCAL) or "none",
        "made": f"{manifest.created_at:%Y-%m-%d %H:%M} UTC on {manifest.device}, torch {manifest.torch_version}, "
        f"code {manifest.code_version}",
    }
    return "## Origin\n\n" + table(("", ""), rows.items())


def threshold_section(manifest: Manifest) -> str:
    """Return the guarantee of the threshold, its conditions, and the command for another population."""
    summary = manifest.calibration
    low, high = summary.band
    guarantee = (
        "on average over calibration draws"
        if summary.confidence is None
        else f"with probability {summary.confidence:g} over calibration draws"
    )
    return f"""## Accuracy of the threshold

The threshold is the score at rank {summary.rank:,} of {summary.n:,} held-out normal images (split-conformal
calibration). It guarantees that at most {100 * manifest.alpha:g} % of normal images are anomalous, {guarantee}.
For these calibration images, the true rate is between {100 * low:.2f} % and {100 * high:.2f} % with probability
{100 * summary.band_level:g} %.{_guards(manifest)}

The guarantee holds for images *made in the same way as the calibration images*. Another camera, scanner, pen, size,
position or contrast is another population, for which the model must first be calibrated again on normal images from it.
Recalibration needs no training, but at least {needed(manifest.alpha, summary.confidence):,} normal images:

    anomaly calibrate {manifest.name} --data-dir FOLDER_OF_NORMAL_PNGS
"""


def pictures_section(files: Sequence[str]) -> str:
    """Return the pictures of the report that are among `files`."""
    titles = {
        "reconstructions.png": "Inputs, reconstructions and error maps",
        "kinds.png": "A typical image of every label",
        "normals.png": "The normal images with the lowest and the highest scores",
        "probes.png": "One image of some probes",
        "highest.png": "The calibration images with the highest scores",
        "histogram.png": "Scores of normal and anomalous images, with the threshold",
        "roc.png": "Recall against false-positive rate",
        "loss.png": "Training loss per epoch",
    }
    shown = (f"![{title}]({name})" for name, title in titles.items() if name in files)
    return "## Pictures\n\n" + "\n\n".join(shown) + "\n"


def limits_section(manifest: Manifest, label_names: Sequence[str]) -> str:
    """Return the limits of the version as a list."""
    return "## Limits\n\n" + "\n".join(f"* {line}" for line in limits(manifest, label_names)) + "\n"


def use_section(manifest: Manifest) -> str:
    """Return commands that score an image with the model."""
    return f"""## How to use

Send a PNG of 28x28 pixels, prepared like the training images, to a service that serves the model. `fit=mnist` prepares
a photo or a scan of a digit.

    curl -F file=@image.png 'http://127.0.0.1:8000/score?model={manifest.name}'
    anomaly score image.png --model {manifest.name}

`is_anomaly` is the verdict at the false-positive rate {manifest.alpha:g}. The parameter `alpha` selects another rate.
"""


def warning_paragraphs(manifest: Manifest) -> str:
    """Return the warnings of a version, each as a paragraph, or nothing."""
    return "".join(f"\n**Warning.** {warning}\n" for warning in manifest.warnings)


def ranking_sentence(metrics: Mapping[str, Any]) -> str:
    """Return AUROC, average precision and the counts of a test set in one sentence."""
    counts = f"{metrics['test_normal']:,} normal and {metrics['test_anomalous']:,} anomalous images"
    if metrics["auroc"] is None:
        return f"{counts}; AUROC needs both."
    return f"AUROC **{metrics['auroc']:.4f}**, average precision {metrics['average_precision']:.4f} ({counts})."


def confidence_option(manifest: Manifest) -> str:
    """Return the option `--confidence` with a leading space, or nothing if the version has no confidence."""
    confidence = manifest.calibration.confidence
    return "" if confidence is None else f" --confidence {confidence!r}"


def percent(proportion: Mapping[str, Any]) -> str:
    """Return a proportion as a percentage."""
    return "none" if proportion["rate"] is None else f"{100 * proportion['rate']:.1f} %"


def interval(proportion: Mapping[str, Any]) -> str:
    """Return a proportion as a percentage with its interval."""
    if proportion["rate"] is None:
        return "no images"
    return f"{100 * proportion['rate']:.1f} % ({100 * proportion['low']:.1f} to {100 * proportion['high']:.1f})"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _guards(manifest: Manifest) -> str:
    counts = manifest.metrics.get("calibration_caught")
    words = counts and describe_guard_counts(counts, manifest.calibration.n)
    return f"\n{words[0].upper()}{words[1:]}; they are false positives." if words else ""


def fit_options(preparation: Preparation) -> str:
    """Return the options that repeat a preparation, with a space in front; nothing for `strict`."""
    if preparation.fit == "strict":
        return ""
    options = f" --fit {preparation.fit}"
    if preparation.fit == "resize":
        options += " --invert" if preparation.invert else " --no-invert"
        options += f" --crop {','.join(f'{share:g}' for share in preparation.crop)}" if preparation.crop else ""
    return options
