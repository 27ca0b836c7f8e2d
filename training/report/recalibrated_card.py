"""The model card of a recalibrated version, in Markdown; every figure is from the manifest."""

from __future__ import annotations

from collections.abc import Sequence

from app.models.manifest import Manifest, Recalibration
from training.report.sections import (
    confidence_option,
    interval,
    limits_section,
    origin_section,
    pictures_section,
    ranking_sentence,
    threshold_section,
    use_section,
    warning_paragraphs,
)


def recalibrated_card(manifest: Manifest, files: Sequence[str]) -> str:
    """Return the model card.

    Args:
        manifest: manifest of the version; `version` is not used, because publishing sets it later.
        files: names of the report's other files.
    """
    parts = (
        _head(manifest),
        limits_section(manifest, ()),
        use_section(manifest),
        _not_measured(manifest),
        threshold_section(manifest),
        pictures_section(files),
        origin_section(manifest),
        _command(manifest),
    )
    return "\n".join(parts)


def _head(manifest: Manifest) -> str:
    before, version = manifest.metrics["before"], _origin(manifest).version
    return f"""# Model card: {manifest.name}

This is the model of version {version}, trained on {manifest.normal_class}, with a recalibrated threshold: an image is
anomalous if its score (`mse`) is strictly above **{manifest.threshold:.6g}**.

Version {version} has the threshold {before["threshold"]:.6g}, for alpha {before["alpha"]:g}. Of the calibration images
of this version, {interval(before["flagged"])} are above it.
{warning_paragraphs(manifest)}"""


def _not_measured(manifest: Manifest) -> str:
    version, tested = _origin(manifest).version, manifest.metrics["tested_version"]
    return f"""## What was measured

* The model is that of version {version}, byte for byte. {ranking_sentence(manifest.metrics)} These metrics are from the
  test of version {tested} ({manifest.metrics["test"]}), and do not apply to images made in another way.
* All images were used for the calibration, so the false-positive rate was not measured; the guarantee below applies.
* The recall at the new threshold was not measured.
* Pictures, probes and the metrics of each label are in the model card of version {tested}, at its own threshold.
"""


def _command(manifest: Manifest) -> str:
    origin, confidence = _origin(manifest), confidence_option(manifest)
    folder = " --data-dir FOLDER_OF_NORMAL_PNGS" if origin.sha256 else ""
    pixels = f"\nThe SHA-256 of the images' pixels, in the order of their names, is `{origin.sha256}`.\n"
    return f"""## Reproduction

    anomaly calibrate {manifest.name}@{origin.version}{folder} --alpha {manifest.alpha!r}{confidence}
{pixels if origin.sha256 else ""}"""


def _origin(manifest: Manifest) -> Recalibration:
    assert manifest.calibration.recalibrated is not None
    return manifest.calibration.recalibrated
