"""The command `calibrate`: a new threshold for an existing model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from app.models.manifest import Manifest
from app.models.repository import Repository, is_version
from training.commands.console import (
    console,
    exit_on_error,
    percent,
    print_copies,
    print_guard_counts,
    print_ignored,
    print_published,
)
from training.commands.options import DATA_DIR_VARIABLE, MODEL_STORE, ModelStore, Promote
from training.data.pngs import read_pngs
from training.publishing import publish
from training.publishing.files import PublishError, check_writable


def calibrate(
    model: Annotated[str, typer.Argument(help="Model: `name` for its current version, or `name@version`.")],
    *,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of normal PNGs that were not used for training. Default: the version's calibration scores.",
            envvar=DATA_DIR_VARIABLE,
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="False-positive rate of the threshold. Default: that of the version.")
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(help="Probability with which the rate is at most alpha. Default: that of the version."),
    ] = None,
    promote: Promote = False,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Recalibrate the threshold of a model without training, and publish the next version.

    For another camera, pen or scanner: give a folder of normal images from it. The autoencoder does not change.

    Example: `anomaly calibrate mine --data-dir photos/new-camera --promote`
    """
    with exit_on_error():
        from training.pipeline.recalibrate import recalibrate

        torch.set_num_threads(1)
        repository = Repository(model_store)
        origin = _find(repository, model)
        check_writable(model_store, model_store / origin.name)
        print_ignored(data_dir)
        images, copies = (None, 0) if data_dir is None else read_pngs(data_dir)
        print_copies(copies)
        version = recalibrate(repository, origin, images, alpha=alpha, confidence=confidence)
        manifest = version.publish(model_store, promote=promote)
        print_guard_counts(manifest)
        before, summary = manifest.metrics["before"], manifest.calibration
        console.print(
            f"{summary.n:,} normal images; {percent(before['flagged']['rate'])} of them are above the threshold "
            f"{origin.threshold:.6g} of {origin.name}@{origin.version}"
        )
        console.print(
            f"alpha {manifest.alpha:g}: threshold {manifest.threshold:.6g}; false-positive rate between "
            f"{percent(summary.band[0])} and {percent(summary.band[1])} with probability {100 * summary.band_level:g} %"
        )
        print_published(manifest, promote)


def _find(repository: Repository, reference: str) -> Manifest:
    name, at, version = reference.partition("@")
    number = repository.current(publish.check_name(name)) if not at else int(version) if is_version(version) else None
    if number is None:
        raise PublishError(f"there is no version {reference} in {repository.root}")
    return repository.manifest(name, number)
