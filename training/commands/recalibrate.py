"""The command `calibrate`: a new threshold for an existing model."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import typer
from rich.table import Table

from app.models.manifest import Manifest, Preparation
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
from training.commands.preparing import Crop, Fit, Invert, parse_preparation, prepare_folder
from training.data.dataset import DataError
from training.data.pictures import Folder
from training.publishing import publish
from training.publishing.files import PublishError, check_writable

# SciPy and matplotlib take seconds to import, and other commands do not need them.
if TYPE_CHECKING:
    from training.pipeline.make import DraftVersion


def calibrate(
    model: Annotated[str, typer.Argument(help="Model: `name` for its current version, or `name@version`.")],
    *,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of normal images that were not used for training. Default: the version's calibration scores.",
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
    fit: Fit = None,
    invert: Invert = None,
    crop: Crop = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Publish nothing: test whether the scores of --data-dir differ from the calibration scores. The exit "
            "code is 1 if they do.",
        ),
    ] = False,
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
        if dry_run and data_dir is None:
            raise DataError("--dry-run tests the images of --data-dir; add it")
        if dry_run and promote:
            raise DataError("--dry-run publishes no version; omit --promote")
        if not dry_run:
            check_writable(model_store, model_store / origin.name)
        folder, preparation = _read(data_dir, origin, fit, invert, crop)
        print_ignored(data_dir, preparation=preparation)
        if folder is not None:
            print_copies(folder.copies)
        version = recalibrate(
            repository,
            origin,
            None if folder is None else folder.images,
            alpha=alpha,
            confidence=confidence,
            preparation=preparation,
            names=() if folder is None else [path.name for path in folder.paths],
        )
        if dry_run:
            print_guard_counts(version.manifest)
            _print_change(origin, version.manifest)
            _warn_of_few(version.manifest)
            raise typer.Exit(_print_comparison(repository, origin, version))
        manifest = version.publish(model_store, promote=promote)
        print_guard_counts(manifest)
        _print_change(origin, manifest)
        if folder is not None:
            _warn_of_few(manifest)
            console.print(
                "images with the highest scores: "
                f"{model_store / manifest.name / str(manifest.version) / 'report' / 'highest.png'}"
            )
        print_published(manifest, promote)


def _read(
    data_dir: Path | None,
    origin: Manifest,
    fit: Literal["strict", "mnist", "resize"] | None,
    invert: bool | None,
    crop: str | None,
) -> tuple[Folder | None, Preparation]:
    """Read the folder as the options say, or as the version was trained."""
    chosen = fit is not None or invert is not None or crop is not None
    if data_dir is None:
        if chosen:
            raise DataError("--fit, --invert and --crop are for the images of --data-dir; add it")
        return None, origin.preparation
    if chosen:
        return prepare_folder(data_dir, parse_preparation(fit, invert, crop), invert)
    # The inversion is that of the version; the new images do not decide on it.
    return prepare_folder(data_dir, origin.preparation, origin.preparation.invert)


def _print_comparison(repository: Repository, origin: Manifest, version: DraftVersion) -> int:
    """Print whether a recalibration is needed, and return the exit code."""
    import numpy as np

    from training.evaluation.comparison import LEVEL, compare

    old, rank = repository.calibration(origin).scores, origin.calibration.rank
    new = np.load(io.BytesIO(version.files["calibration.npy"]))
    found = compare(np.asarray(old, np.float32), rank, new)
    size = f"{len(new):,} images against {len(old):,} calibration images"
    console.print(
        f"{size}: number above the threshold p = {found.rate_p:.2g}, distribution of the scores "
        f"p = {found.shape_p:.2g}, both together p = {found.p_value:.2g}"
    )
    if found.is_needed:
        console.print(f"recalibration needed: the scores differ (p below {LEVEL:g}); nothing was published")
    else:
        console.print("no recalibration needed: the test finds no difference; nothing was published")
    return int(found.is_needed)


def _print_change(origin: Manifest, manifest: Manifest) -> None:
    from training.report.recalibrated_card import recall_range

    before, summary = manifest.metrics["before"], manifest.calibration
    console.print(
        f"{summary.n:,} normal images; {percent(before['flagged']['rate'])} of them are above the threshold "
        f"{origin.threshold:.6g} of {origin.name}@{origin.version}"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("", "alpha", "threshold", f"false-positive rate ({100 * summary.band_level:g} % band)", "recall"):
        table.add_column(column)
    for label, of, recall in (("before", origin, before["recall"]), ("after", manifest, manifest.metrics["recall"])):
        band = of.calibration.band
        shown = "-" if recall is None else recall_range(recall)
        rate = f"{percent(band[0])} to {percent(band[1])}"
        table.add_row(label, f"{of.alpha:g}", f"{of.threshold:.6g}", rate, shown)
    console.print(table)
    if manifest.metrics["recall"] is not None:
        console.print(f"recall: on the anomalies of the test of version {manifest.metrics['tested_version']}")


def _warn_of_few(manifest: Manifest) -> None:
    enough = math.ceil(2 / manifest.alpha)
    if manifest.calibration.n < enough:
        console.print(
            f"warning: with fewer than {enough:,} images (2 / alpha), a few odd images decide the threshold, and the "
            "recall may fall by tens of percent; look at the images with the highest scores",
            style="yellow",
        )


def _find(repository: Repository, reference: str) -> Manifest:
    name, at, version = reference.partition("@")
    number = repository.current(publish.check_name(name)) if not at else int(version) if is_version(version) else None
    if number is None:
        raise PublishError(f"there is no version {reference} in {repository.root}")
    publish.check_exists(repository.root, name, number)
    return repository.manifest(name, number)
