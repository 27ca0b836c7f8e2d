"""Output of the commands: console, error lines with exit codes, progress bars, summaries of a version."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.inference.detector import DetectorError
from app.inference.device import DeviceError
from app.models.calibration import CalibrationError
from app.models.manifest import STRICT, Manifest, Preparation
from app.models.provenance import ProvenanceConfigurationError
from app.models.repository import RepositoryError
from training.data.dataset import DataError
from training.publishing.export import ExportError
from training.publishing.files import PublishError
from training.recipes.contract import TrainingError

_EXPECTED = (
    CalibrationError,
    DataError,
    DetectorError,
    DeviceError,
    ExportError,
    ProvenanceConfigurationError,
    PublishError,
    RepositoryError,
    TrainingError,
)
# Paths can contain brackets, which are not markup.
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
console = Console(**_PLAIN, width=None if sys.stdout.isatty() else 160)
error_console = Console(**_PLAIN, stderr=True)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn expected errors into one line and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except _EXPECTED as error:
        error_console.print(f"error: {error}", style="red")
        raise typer.Exit(2) from error
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        error_console.print(f"error: {message}", style="red")
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        error_console.print("interrupted; no incomplete files were left behind")
        raise typer.Exit(130) from error


def progress_bars(description: str = "{task.description}") -> Progress:
    """Return progress bars that are shown in a terminal only."""
    columns: tuple[ProgressColumn, ...] = (
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not sys.stdout.isatty())


def print_metrics(manifest: Manifest) -> None:
    """Print AUROC, and a table of the operating points with counts and intervals, of a version."""
    metrics = manifest.metrics
    for description, of_test in {metrics["test"]: metrics, **metrics["also"]}.items():
        auroc = (
            "no AUROC, which needs anomalous images," if of_test["auroc"] is None else f"AUROC {of_test['auroc']:.4f}"
        )
        counts = f"{of_test['test_normal']:,} normal and {of_test['test_anomalous']:,} anomalous images"
        console.print(f"{auroc} on {description} ({counts})")
    level = f"{100 * metrics['interval_level']:g} %"
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("alpha", "threshold", "false positives", f"rate ({level})", "anomalies found", f"recall ({level})"):
        table.add_column(title, justify="right")
    for point in metrics["operating_points"]:
        found = [text for key in ("false_alarms", "detections") for text in _proportion(point[key])]
        table.add_row(f"{point['alpha']:g}", f"{point['threshold']:.6g}", *found)
    console.print(table)
    for warning in manifest.warnings:
        console.print(f"warning: {warning}", style="yellow")


def _proportion(proportion: Mapping[str, Any]) -> tuple[str, str]:
    """Return the count, and the rate with its interval."""
    if proportion["rate"] is None:
        return "no images", "-"
    rate = f"{percent(proportion['rate'])} ({100 * proportion['low']:.1f} to {100 * proportion['high']:.1f})"
    return f"{proportion['count']:,} of {proportion['of']:,}", rate


def print_copies(copies: int) -> None:
    """Print the number of copies that were left out, if any."""
    if copies:
        console.print(f"copies left out: {copies:,} (images with the same pixels as an earlier one)")


def print_ignored(*folders: Path | None, preparation: Preparation = STRICT) -> None:
    """Print what the folders contain besides images, one line for each folder that contains anything else."""
    from training.data.pictures import content_of

    for folder in folders:
        if folder is not None and (summary := content_of(folder, preparation).summary()):
            console.print(f"{folder}: {summary}", highlight=False, markup=False)


def print_guard_counts(manifest: Manifest) -> None:
    """Print the number of calibration images that guards rejected, if any."""
    counts = manifest.metrics.get("calibration_caught")
    if counts:
        from training.evaluation.calibrate import describe_guard_counts

        console.print(f"{describe_guard_counts(counts, manifest.calibration.n)}; they are false positives")


def print_published(manifest: Manifest, promoted: bool) -> None:
    """Print name and number of a new version, and how to promote it."""
    state = "current" if promoted else f"to serve it: anomaly promote {manifest.name} {manifest.version}"
    console.print(f"published {manifest.name}@{manifest.version} ({state})")


def percent(rate: float | None) -> str:
    """Return a rate as a percentage."""
    return "-" if rate is None else f"{100 * rate:.2f} %"
