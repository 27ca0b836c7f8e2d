"""The model card of a trained version, in Markdown; every figure is from the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.models.manifest import Manifest
from training.evaluation.probes import KINDS
from training.report.sections import (
    confidence_option,
    interval,
    limits_section,
    origin_section,
    percent,
    pictures_section,
    ranking_sentence,
    table,
    threshold_section,
    use_section,
    warning_paragraphs,
)


def model_card(manifest: Manifest, label_names: Sequence[str], files: Sequence[str]) -> str:
    """Return the model card.

    Args:
        manifest: manifest of the version; `version` is not used, because publishing sets it later.
        label_names: name of each label.
        files: names of the report's other files.
    """
    parts = (
        _head(manifest),
        limits_section(manifest, label_names),
        use_section(manifest),
        _metrics(manifest.metrics, label_names),
        *(_further_test(name, metrics) for name, metrics in manifest.metrics["also"].items()),
        threshold_section(manifest),
        pictures_section(files),
        _probes(manifest.metrics["probes"]),
        origin_section(manifest),
        _command(manifest),
    )
    return "\n".join(parts)


def _head(manifest: Manifest) -> str:
    metrics = manifest.metrics
    point = next(point for point in metrics["operating_points"] if point["alpha"] == manifest.alpha)
    rates = f"the false-positive rate is {percent(point['false_alarms'])}"
    if metrics["auroc"] is not None:
        rates = (
            f"the recall (the share of anomalous images that are found) is {percent(point['detections'])}, and\n{rates}"
        )
    auroc = "" if metrics["auroc"] is None else f"\nThe AUROC on test images is **{metrics['auroc']:.4f}**."
    return f"""# Model card: {manifest.name}

This model was trained on {manifest.normal_class} only. It reconstructs an image; the mean squared error of the
reconstruction (`mse`) is the anomaly score. An image is anomalous if its score is strictly above
**{manifest.threshold:.6g}**.{auroc} At this threshold {rates}.
{warning_paragraphs(manifest)}"""


def _metrics(metrics: Mapping[str, Any], label_names: Sequence[str]) -> str:
    rows = (
        (
            f"{label_names[int(label)]}{' (normal)' if of_label['normal'] else ''}",
            f"{of_label['flagged']['of']:,}",
            f"{of_label['mean_mse']:.4g}",
            "" if of_label["auroc"] is None else f"{of_label['auroc']:.4f}",
            interval(of_label["flagged"]),
        )
        for label, of_label in metrics["labels"].items()
    )
    columns = ("label", "images", "mean mse", "AUROC against normal", f"anomalous at alpha {metrics['alpha']:g}")
    return f"""## Metrics on test images

Test images are neither training nor calibration images: {metrics["test"]}.
Intervals are exact binomial intervals ({100 * metrics["interval_level"]:g} %). "Expected" is the interval of the number
of false positives, with probability {100 * metrics["band_level"]:g} %.

{ranking_sentence(metrics)}

{_operating_points(metrics)}
{table(columns, rows)}"""


def _further_test(name: str, metrics: Mapping[str, Any]) -> str:
    return f"""## Further test: {name}

{ranking_sentence(metrics)}

{_operating_points(metrics)}"""


def _operating_points(metrics: Mapping[str, Any]) -> str:
    rows = (
        (
            f"{point['alpha']:g}",
            f"{point['threshold']:.6g}",
            interval(point["false_alarms"]),
            "{} ({} to {})".format(point["false_alarms"]["count"], *point["false_alarms_expected"]),
            interval(point["detections"]),
        )
        for point in metrics["operating_points"]
    )
    return table(("alpha", "threshold", "false-positive rate", "false positives (expected)", "recall"), rows)


def _probes(probes: Sequence[Mapping[str, Any]]) -> str:
    if not probes:
        return "## Probes\n\nThere are no normal test images to derive probes from.\n"
    alphas = list(probes[0]["flagged"])
    parts = ["## Probes\n\nChanged normal images, and images outside the class, with the share of anomalous images.\n"]
    columns = ("probe", "images", *(f"at alpha {alpha}" for alpha in alphas), "rejected by a guard")
    for kind, meaning in KINDS.items():
        rows = (
            (
                probe["name"],
                f"{probe['images']}",
                *(f"{100 * probe['flagged'][alpha]:.1f} %" for alpha in alphas),
                ", ".join(
                    f"`{name}` {100 * count / probe['images']:.0f} %" for name, count in probe["reasons"].items()
                ),
            )
            for probe in probes
            if probe["kind"] == kind
        )
        parts.append(f"{meaning[0].upper()}{meaning[1:]}.\n\n{table(columns, rows)}")
    return "\n".join(parts)


def _command(manifest: Manifest) -> str:
    normal = ",".join(str(label) for label in manifest.data.normal)
    parameters = manifest.recipe.parameters
    epochs = f" --epochs {parameters['epochs']}" if "epochs" in parameters else ""
    folders = ""
    if manifest.data.name == "folder":
        folders = " --data-dir FOLDER_OF_NORMAL_PNGS"
        folders += " --anomalies-dir FOLDER_OF_ANOMALOUS_PNGS" if manifest.data.test_anomalous else ""
    if manifest.data.name == "idx":
        folders = " --data-dir FOLDER_OF_IDX_FILES"
    return f"""## Reproduction

    anomaly train --recipe {manifest.recipe.name} --normal {normal} --name {manifest.name} \\
        --data {manifest.data.name}{folders} \\
        --seed {manifest.recipe.seed} --alpha {manifest.alpha!r}{confidence_option(manifest)}{epochs} \\
        --device {manifest.device.partition(" ")[0]} --threads {parameters["threads"]}

The SHA-256 of the data's pixels and labels is `{manifest.data.sha256}`.
The same command on the same machine gives the same scores. Parameters:
{", ".join(f"{key} {value}" for key, value in parameters.items())}.
"""
