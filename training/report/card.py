"""The model card: a version in plain words, every figure from its manifest.

Knows: Markdown, the manifest. Does not know: models, files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.models.calibration import needed
from app.models.manifest import Manifest, Recalibration
from training.evaluation.calibrate import caught_words
from training.evaluation.probes import KINDS
from training.report.limits import limits


def model_card(manifest: Manifest, label_names: Sequence[str], files: Sequence[str]) -> str:
    """Write the model card.

    Args:
        manifest: of the version; its number is not used, because the card is written before there is one.
        label_names: what each label is called.
        files: the report's other files.
    """
    parts = (
        _head(manifest),
        _made(manifest),
        _threshold(manifest),
        _figures(manifest.metrics, label_names),
        *(_also(words, metrics) for words, metrics in manifest.metrics["also"].items()),
        _probes(manifest.metrics["probes"]),
        _pictures(files),
        _limits(manifest, label_names),
        _again(manifest),
    )
    return "\n".join(parts)


def recalibrated_card(manifest: Manifest, files: Sequence[str]) -> str:
    """Write the model card of a version whose threshold was chosen anew.

    Args:
        manifest: of the version; its number is not used.
        files: the report's other files.
    """
    parts = (
        _recalibrated_head(manifest),
        _made(manifest),
        _threshold(manifest),
        _what_is_not_known(manifest),
        _pictures(files),
        _limits(manifest, ()),
        _calibrated_again(manifest),
    )
    return "\n".join(parts)


def _head(manifest: Manifest) -> str:
    metrics = manifest.metrics
    answer = next(point for point in metrics["operating_points"] if point["alpha"] == manifest.alpha)
    verdicts = f"{_percent(answer['false_alarms'])} of unseen normal images are called anomalous"
    if metrics["auroc"] is not None:
        verdicts = f"{_percent(answer['detections'])} of the anomalous images are caught and\n{verdicts}"
    ranking = (
        "" if metrics["auroc"] is None else f"\nIt ranks unseen images with an AUROC of **{metrics['auroc']:.4f}**."
    )
    return f"""# Model card: {manifest.name}

This model learned {manifest.normal_class} and nothing else. Shown an image, it redraws it; the mean squared error
between the two (`mse`) is the anomaly score, and an image is called anomalous when its score lies strictly above
**{manifest.threshold:.6g}**.{ranking} At that threshold {verdicts}.
"""


def _recalibrated_head(manifest: Manifest) -> str:
    before, version = manifest.metrics["before"], _anew(manifest).version
    return f"""# Model card: {manifest.name}

This is the autoencoder of version {version}, which learned {manifest.normal_class}, with a threshold chosen anew: an
image is called anomalous when its score (`mse`) lies strictly above **{manifest.threshold:.6g}**.

Version {version} answers at the threshold {before["threshold"]:.6g}, for alpha {before["alpha"]:g}. Of the images that
this version was calibrated on, {_interval(before["flagged"])} are above that.
"""


def _what_is_not_known(manifest: Manifest) -> str:
    version, tested = _anew(manifest).version, manifest.metrics["tested_version"]
    return f"""## What is known, and what is not

* The model is that of version {version}, byte for byte. {_ranking(manifest.metrics)} That is of version {tested}'s own
  test ({manifest.metrics["test"]}), and says nothing of images made in another way.
* Every image at hand chose the threshold, and none is left to measure false alarms on: there is only the promise above.
* How many anomalies are caught at the new threshold was not measured.
* Pictures, probes and the figures of each label are in the model card of version {tested}; verdicts there are at its
  own threshold.
"""


def _calibrated_again(manifest: Manifest) -> str:
    anew, confidence = _anew(manifest), _confidence(manifest)
    folder = " --data-dir FOLDER_OF_NORMAL_PNGS" if anew.sha256 else ""
    pixels = f"\nThe SHA-256 of the images' pixels, in the order of their names, is `{anew.sha256}`.\n"
    return f"""## To make it again

    python -m training calibrate {manifest.name}@{anew.version}{folder} --alpha {manifest.alpha!r}{confidence}
{pixels if anew.sha256 else ""}"""


def _anew(manifest: Manifest) -> Recalibration:
    assert manifest.calibration.recalibrated is not None
    return manifest.calibration.recalibrated


def _made(manifest: Manifest) -> str:
    data, recipe, anew = manifest.data, manifest.recipe, manifest.calibration.recalibrated
    calibrated = f"{data.calibration:,} other normal images"
    if anew is not None:
        calibrated = f"{manifest.calibration.n:,} normal images: {anew.source}; the model is version {anew.version}'s"
    rows = {
        "normal class": manifest.normal_class,
        "data": f"{data.name} ({data.source})",
        "learned from": f"{data.train:,} normal images",
        "calibrated on": calibrated,
        "tested on": f"{manifest.metrics['test']}: {data.test_normal:,} normal and {data.test_anomalous:,} anomalous",
        "recipe": f"`{recipe.name}`, seed {recipe.seed}",
        "squared errors of": manifest.score_space,
        "named guards": ", ".join(f"`{reason}`" for reason in manifest.reasons) or "none",
        "made": f"{manifest.created_at:%Y-%m-%d %H:%M} UTC on {manifest.device}, torch {manifest.torch_version}, "
        f"code {manifest.code_version}",
    }
    return "## How it was made\n\n" + _table(("", ""), rows.items())


def _threshold(manifest: Manifest) -> str:
    summary = manifest.calibration
    low, high = summary.band
    guarantee = (
        "on average over calibration draws"
        if summary.confidence is None
        else f"with probability {summary.confidence:g} over calibration draws"
    )
    return f"""## How sure the threshold is

The threshold is the score at rank {summary.rank:,} of {summary.n:,} held-out normal images (split-conformal
calibration). It promises that at most {100 * manifest.alpha:g} % of normal images are called anomalous, {guarantee}.
For this one draw, the true rate lies between {100 * low:.2f} % and {100 * high:.2f} % with probability
{100 * summary.band_level:g} %.{_caught(manifest)}

The promise is about images *made as the calibration images were made*. Another camera, scanner, pen, size, position or
contrast is another population: the promise is void there until the threshold has been calibrated anew on normal images
from it. Recalibrating needs no new training, only at least {needed(manifest.alpha, summary.confidence):,} normal
images for this rate:

    python -m training calibrate {manifest.name} --data-dir FOLDER_OF_NORMAL_PNGS
"""


def _caught(manifest: Manifest) -> str:
    counts = manifest.metrics.get("calibration_caught")
    words = counts and caught_words(counts, manifest.calibration.n)
    return f"\n{words[0].upper()}{words[1:]}: they count among the false alarms." if words else ""


def _figures(metrics: Mapping[str, Any], label_names: Sequence[str]) -> str:
    labels = (
        (
            f"{label_names[int(label)]}{' (normal)' if found['normal'] else ''}",
            f"{found['flagged']['of']:,}",
            f"{found['mean_mse']:.4g}",
            "" if found["auroc"] is None else f"{found['auroc']:.4f}",
            _interval(found["flagged"]),
        )
        for label, found in metrics["labels"].items()
    )
    columns = ("label", "images", "mean mse", "AUROC against normal", f"called anomalous at alpha {metrics['alpha']:g}")
    return f"""## Figures on images never seen before

{metrics["test"][0].upper()}{metrics["test"][1:]}.
Intervals are exact binomial ones ({100 * metrics["interval_level"]:g} %); "expected" is where the number of false
alarms falls with probability {100 * metrics["band_level"]:g} %.

{_ranking(metrics)}

{_points(metrics)}
{_table(columns, labels)}"""


def _also(words: str, metrics: Mapping[str, Any]) -> str:
    return f"""## Beside it: {words}

{_ranking(metrics)}

{_points(metrics)}"""


def _ranking(metrics: Mapping[str, Any]) -> str:
    counts = f"{metrics['test_normal']:,} normal and {metrics['test_anomalous']:,} anomalous images"
    if metrics["auroc"] is None:
        return f"{counts}, so there is nothing to rank."
    return f"AUROC **{metrics['auroc']:.4f}**, average precision {metrics['average_precision']:.4f} ({counts})."


def _points(metrics: Mapping[str, Any]) -> str:
    rows = (
        (
            f"{point['alpha']:g}",
            f"{point['threshold']:.6g}",
            _interval(point["false_alarms"]),
            "{} ({} to {})".format(point["false_alarms"]["count"], *point["false_alarms_expected"]),
            _interval(point["detections"]),
        )
        for point in metrics["operating_points"]
    )
    return _table(("alpha", "threshold", "false alarms", "their number (expected)", "detections"), rows)


def _probes(table: Sequence[Mapping[str, Any]]) -> str:
    if not table:
        return "## Probes\n\nThere are no unseen normal images to make probes of.\n"
    alphas = list(table[0]["flagged"])
    parts = ["## Probes\n\nUnseen normal images, changed; and images of nothing. Share called anomalous.\n"]
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
            for probe in table
            if probe["kind"] == kind
        )
        columns = ("probe", "images", *(f"at alpha {alpha}" for alpha in alphas), "a guard decided")
        parts.append(f"{meaning[0].upper()}{meaning[1:]}.\n\n{_table(columns, rows)}")
    return "\n".join(parts)


def _pictures(files: Sequence[str]) -> str:
    titles = {
        "reconstructions.png": "Inputs, reconstructions and error maps",
        "kinds.png": "A typical image of every kind, and what was made of it",
        "normals.png": "The best and the worst redrawn normal images",
        "probes.png": "One image of some probes",
        "histogram.png": "Scores of normal and anomalous images, with the threshold",
        "roc.png": "Detections against false alarms",
        "loss.png": "Training loss per epoch",
    }
    return (
        "## Pictures\n\n" + "\n\n".join(f"![{title}]({name})" for name, title in titles.items() if name in files) + "\n"
    )


def _limits(manifest: Manifest, label_names: Sequence[str]) -> str:
    return "## Limits\n\n" + "\n".join(f"* {line}" for line in limits(manifest, label_names)) + "\n"


def _again(manifest: Manifest) -> str:
    normal = ",".join(str(label) for label in manifest.data.normal)
    parameters = manifest.recipe.parameters
    epochs = f" --epochs {parameters['epochs']}" if "epochs" in parameters else ""
    folders = ""
    if manifest.data.name == "folder":
        folders = " --data-dir FOLDER_OF_NORMAL_PNGS"
        folders += " --anomalies-dir FOLDER_OF_ANOMALOUS_PNGS" if manifest.data.test_anomalous else ""
    return f"""## To make it again

    python -m training train --recipe {manifest.recipe.name} --normal {normal} --name {manifest.name} \\
        --data {manifest.data.name}{folders} \\
        --seed {manifest.recipe.seed} --alpha {manifest.alpha!r}{_confidence(manifest)}{epochs} \\
        --device {manifest.device.partition(" ")[0]} --threads {parameters["threads"]}

The SHA-256 of the data's pixels and labels is `{manifest.data.sha256}`.
The same command on the same machine gives the same scores. Parameters:
{", ".join(f"{key} {value}" for key, value in parameters.items())}.
"""


def _confidence(manifest: Manifest) -> str:
    confidence = manifest.calibration.confidence
    return "" if confidence is None else f" --confidence {confidence!r}"


def _percent(found: Mapping[str, Any]) -> str:
    return "none" if found["rate"] is None else f"{100 * found['rate']:.1f} %"


def _interval(found: Mapping[str, Any]) -> str:
    if found["rate"] is None:
        return "no images"
    return f"{100 * found['rate']:.1f} % ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def _table(columns: Sequence[str], rows: Any) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
