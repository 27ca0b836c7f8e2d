"""The commands that use a service or score offline: `score`, `watch`, `models`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from anomaly import Score, ServiceError
from anomaly.cli.checkout import NotInstalled
from anomaly.cli.formats import STREAMING, WRITERS, Result, console_of, printable
from anomaly.cli.lots import LotError, summary, with_discoveries
from anomaly.cli.messages import explain
from anomaly.cli.options import (
    DEFAULT_URL,
    Alpha,
    Concurrency,
    FalseDiscoveryRate,
    Fitting,
    KeyFile,
    Model,
    ModelStore,
    Output,
    Patience,
    Url,
    existing_folder,
)
from anomaly.cli.scoring import Connection, Scorer, Verdict, open_scorer
from anomaly.cli.signals import StopFlag, interrupt, stop_on
from anomaly.cli.sources import Source, sources
from anomaly.cli.streams import discard_stdout, write_message
from anomaly.cli.watching import Arrivals, FolderAway
from anomaly.client.errors import InvalidParameter
from anomaly.image_files import PNG_ONLY, PREPARED, Kind

NORMAL, ANOMALY, ERROR = 0, 1, 2
INTERRUPTED = 130
_WATCH_PATIENCE = 2.0
"""Seconds. Short, because `watch` retries an image at its next poll, and must end soon after Ctrl-C."""


class Interrupted(typer.Exit):
    """The end of a command of this module by Ctrl-C. The training commands handle Ctrl-C themselves."""


def score(
    files: Annotated[list[str], typer.Argument(help="PNG files, folders of PNG files, or `-` for standard input.")],
    *,
    url: Url = DEFAULT_URL,
    key_file: KeyFile = None,
    model_store: ModelStore = None,
    model: Model = None,
    alpha: Alpha = None,
    fit: Fitting = None,
    fdr: FalseDiscoveryRate = None,
    output: Output = "table",
    concurrency: Concurrency = 8,
    patience: Patience = 30.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Score images.

    Example: `anomaly score photos/ --format csv > scores.csv`
    """
    with plain_errors(), stop_on([signal.SIGINT], interrupt):
        if not all(files):
            raise typer.BadParameter("a file name is empty")
        if fdr is not None and not 1e-9 <= fdr < 1:
            raise typer.BadParameter("--fdr must be at least 1e-9 and below 1")
        code = NORMAL
        with closing(
            _open(model_store, Connection(url, key_file, concurrency, patience), Verdict(model, alpha, fit))
        ) as scorer:
            wanted, found = sources(files, _suffixes(scorer))
            if ignored := found.summary():
                write_message(ignored)
            if not wanted:
                formats = "PNG" if scorer.fit == "strict" else "PNG, JPEG or WebP"
                raise typer.BadParameter(f"there is no {formats} file in {printable(', '.join(files))}")
            results = _with_progress(scorer.results(wanted), len(wanted), show=not quiet)
            if fdr is not None:
                results = _discoveries(scorer, results, fdr)
            with closing(WRITERS[output](sys.stdout)) as writer:
                for result in results:
                    writer.add(result)
                    code = max(code, _exit_code(result))
        raise typer.Exit(code)


def _discoveries(scorer: Scorer, results: Iterator[Result], rate: float) -> Iterator[Result]:
    """Yield all results with their discoveries, once the last image is scored."""
    try:
        found = with_discoveries(list(results), rate)
    except LotError as error:
        raise typer.BadParameter(str(error)) from None
    yield from found
    score = next((result.outcome for result in found if isinstance(result.outcome, Score)), None)
    if score is not None:
        write_message(summary(found, rate, scorer.calibration_size(score.model, score.version)))


def watch(
    folder: Annotated[Path, typer.Argument(parser=existing_folder, metavar="FOLDER", help="Folder to watch.")],
    *,
    url: Url = DEFAULT_URL,
    key_file: KeyFile = None,
    model_store: ModelStore = None,
    model: Model = None,
    alpha: Alpha = None,
    fit: Fitting = None,
    output: Output = "table",
    concurrency: Concurrency = 8,
    existing: Annotated[bool, typer.Option("--existing", help="Also score the images that are in the folder.")] = False,
    interval: Annotated[float, typer.Option(min=0.05, max=86_400, help="Seconds between two polls.")] = 1.0,
) -> None:
    """Score the images that arrive in a folder, until Ctrl-C.

    An image is scored when two polls in a row find it unchanged, so a partially written file is not read. While the
    service is not available, `watch` waits and then scores the images that arrived during the wait. If unchanged images
    are still not scored at the end, the exit code is 2.
    """
    connection = Connection(url, key_file, concurrency, _WATCH_PATIENCE)
    stop = StopFlag()
    with (
        plain_errors(),
        stop_on([signal.SIGINT, signal.SIGTERM], stop.set),
        closing(_open(model_store, connection, Verdict(model, alpha, fit))) as scorer,
    ):
        writer = STREAMING[output](sys.stdout)
        arrivals = Arrivals(folder, _suffixes(scorer))
        if not existing:
            arrivals.skip_present()
        write_message(f"watching {folder}; press Ctrl-C to end")
        code, trouble, pending = NORMAL, "", 0
        reported: set[Kind] = set()
        while not stop.is_set:
            try:
                ready = arrivals.poll()
                _report_ignored(arrivals, reported)
                pending = len(ready)
                for result in scorer.results(Source(str(path), path) for path in ready):
                    writer.add(result)
                    arrivals.mark_done(Path(result.file))
                    code = max(code, _exit_code(result))
                    pending -= 1
                    if stop.is_set:
                        break
                if not pending:
                    trouble = ""
            except InvalidParameter:
                raise  # waiting does not make the value of an option valid
            except (ServiceError, FolderAway) as error:
                if str(error) != trouble:
                    write_message(f"waiting: {error}")
                trouble = str(error)
            stop.wait(interval)
        raise typer.Exit(ERROR if trouble or pending else code)


def models(url: Url = DEFAULT_URL, key_file: KeyFile = None) -> None:
    """List the models of a service."""
    with plain_errors():
        from rich.table import Table

        from anomaly import Client
        from anomaly.client.environment import api_key

        try:
            with Client(url, api_key=api_key(key_file)) as service:
                found = service.models()
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        except ServiceError as error:
            raise explain(error) from error
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("model", "current", "default", "normal class", "alpha", "threshold", "versions"):
            table.add_column(column)
        for each in found:
            table.add_row(
                printable(each.name),
                "-" if each.current is None else str(each.current),
                "yes" if each.is_default else "",
                printable(each.normal_class or each.problem or ""),
                "" if each.alpha is None else f"{each.alpha:g}",
                "" if each.threshold is None else f"{each.threshold:.4g}",
                ", ".join(str(version) for version in each.versions),
            )
        console_of(sys.stdout).print(table)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Write an expected error as one line, with its hint on a second one, and set the exit code."""
    try:
        yield
    except NotInstalled as error:
        write_message(f"error: {error}")
        raise typer.Exit(ERROR) from error
    except ServiceError as error:
        write_message(f"error: {error}")
        hint = getattr(error, "hint", "")
        if hint:
            write_message(f"hint: {hint}")
        raise typer.Exit(ERROR) from error
    except KeyboardInterrupt as error:
        raise Interrupted(INTERRUPTED) from error
    except BrokenPipeError as error:
        discard_stdout()  # the reader of the results has ended
        raise typer.Exit(ERROR) from error


def _open(model_store: Path | None, connection: Connection, verdict: Verdict) -> Scorer:
    try:
        return open_scorer(model_store, connection, verdict)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _suffixes(scorer: Scorer) -> frozenset[str]:
    return PNG_ONLY if scorer.fit == "strict" else PREPARED


def _report_ignored(arrivals: Arrivals, reported: set[Kind]) -> None:
    """Write the ignored entries of the last poll if a kind of them is new."""
    kinds = {kind for kind, count in arrivals.found.ignored.items() if count}
    if not kinds <= reported:
        write_message(arrivals.found.summary())
        reported |= kinds


def _exit_code(result: Result) -> int:
    return {"normal": NORMAL, "anomalous": ANOMALY, "not scored": ERROR}[result.verdict]


def _with_progress(results: Iterator[Result], total: int, *, show: bool) -> Iterator[Result]:
    if not show or total == 1 or not sys.stderr.isatty():
        yield from results
        return
    from rich.progress import track

    yield from track(results, "scoring", total=total, console=console_of(sys.stderr), transient=True)
