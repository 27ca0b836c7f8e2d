"""The command `bulk`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from anomaly.cli.checkout import service_code
from anomaly.cli.commands import ERROR, NORMAL, plain_errors
from anomaly.cli.formats import console_of
from anomaly.cli.options import Alpha, Fitting, Model, existing_folder
from anomaly.cli.signals import interrupt, stop_on
from anomaly.cli.streams import write_message


def bulk(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="Folder or file, local or a URL: PNG or JPEG images, tar or zip archives, Parquet, npy or IDX files.",
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder for the Parquet files, local or a URL.")],
    *,
    model_store: Annotated[Path, typer.Option(parser=existing_folder, metavar="FOLDER", help="Model store.")] = Path(
        "model_store"
    ),
    model: Model = None,
    alpha: Alpha = None,
    fit: Fitting = "strict",
    image_column: Annotated[str, typer.Option(help="Column of the images in Parquet files.")] = "image",
    q_values: Annotated[
        bool, typer.Option("--q-values", help="Add the Benjamini-Hochberg adjusted p-value of each image.")
    ] = False,
    reconstructions: Annotated[
        bool, typer.Option("--reconstructions", help="Add the reconstruction of each image, as PNG.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of threads, or of Ray actors. Default: the number of cores.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster: `auto`, `HOST:PORT` or `ray://HOST:10001`; `local` starts one on this machine. "
            "Default: score in this process."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Score a backlog of images into Parquet files.

    The same command again scores only the images that have no row yet. Rows of different model versions are never
    mixed in a folder. Images that cannot be scored become rows with the reason.

    Exit codes: 0 every image has a row, 2 an error, or no image could be scored.

    Example: `anomaly bulk images/ scores/ --model zero`
    """
    with plain_errors(), stop_on([signal.SIGINT, signal.SIGTERM], interrupt):
        with service_code("`anomaly bulk`", None, "bulk"):
            from anomaly.bulk.locations import BulkError
            from anomaly.bulk.runs import Request, execute
        request = Request(
            source, output, model_store, model, alpha, fit, image_column, q_values, reconstructions, workers, address
        )
        try:
            with _progress(show=not quiet and address is None) as on_rows:
                summary = execute(request, on_rows)
        except BulkError as error:
            write_message(f"error: {error}")
            raise typer.Exit(ERROR) from error
        if summary.ignored:
            write_message(f"ignored {summary.ignored} files of other formats")
        total = summary.normal + summary.anomalous + summary.not_scored
        speed = f", {summary.new / summary.seconds:,.0f} images per second" if summary.new and summary.seconds else ""
        sys.stdout.write(
            f"{total:,} rows: {summary.normal:,} normal, {summary.anomalous:,} anomalous, "
            f"{summary.not_scored:,} not scored; {summary.new:,} new in {summary.seconds:.1f} s{speed}\n"
        )
        raise typer.Exit(ERROR if total == summary.not_scored else NORMAL)


@contextmanager
def _progress(*, show: bool) -> Iterator[Callable[[int], None]]:
    """Show the number of rows and the rate on a terminal."""
    if not show or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} images"), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console_of(sys.stderr), transient=True) as bar:
        task, lock = bar.add_task("scoring", total=None, rate=""), threading.Lock()

        def on_rows(count: int) -> None:
            with lock:
                bar.advance(task, count)
                speed = bar.tasks[0].speed
                bar.update(task, rate=f"{speed:,.0f} images per second" if speed else "")

        yield on_rows
