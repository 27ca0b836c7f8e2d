"""The command `anomaly`: score images, watch a folder, train.

Knows: options, words for a person, exit codes. Does not know: how anything is done.

Exit codes: 0 all normal, 1 at least one anomaly, 2 at least one image or the whole run could not be scored.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Annotated

import typer

from anomaly import Fit, ServiceError
from anomaly.cli.files import Arrivals, FolderAway, Source, sources
from anomaly.cli.formats import STREAMING, WRITERS, Format, Result, console_of, printable
from anomaly.cli.scorers import Ask, Scorer, Verdict
from anomaly.client.errors import InvalidParameter

NORMAL, ANOMALY, ERROR = 0, 1, 2
INTERRUPTED = 130

app = typer.Typer(
    help="Say how badly an autoencoder redraws an image, and whether that is an anomaly.",
    epilog="Exit codes: 0 all normal, 1 at least one anomaly, 2 at least one error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Url = Annotated[str, typer.Option(envvar="ANOMALY_URL", help="The service, with its path prefix if it has one.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(envvar="ANOMALY_KEY_FILE", help="File with the API key. The key itself goes into ANOMALY_KEY."),
]
ModelStore = Annotated[
    Path | None, typer.Option(help="Score offline with a version of this model store; no service is asked.")
]
Model = Annotated[str | None, typer.Option(help="`name` or `name@version`; else the default model.")]
Alpha = Annotated[float | None, typer.Option(help="Another false-alarm rate for the verdicts, as in 0.001.")]
Fitting = Annotated[Fit, typer.Option(help="`mnist` makes an image of any size into a digit as MNIST has them.")]
Output = Annotated[Format, typer.Option("--format", "-f", help="How results are written.")]
Concurrency = Annotated[int, typer.Option(min=1, max=64, help="Most requests under way at once.")]
Patience = Annotated[float, typer.Option(min=0, help="Seconds to go on trying while the service is busy or away.")]
URL = "http://127.0.0.1:8000"


def _folder(text: str) -> Path:
    with suppress(OSError):
        if text and Path(text).is_dir():
            return Path(text)
    raise typer.BadParameter(f"there is no folder {text!r}")


_WATCH_PATIENCE = 2.0
"""Seconds; a watch asks again at its next look anyway, and must end soon after Ctrl-C."""


@app.command()
def score(
    files: Annotated[list[str], typer.Argument(help="PNG files, folders of them, or `-` for the standard input.")],
    *,
    url: Url = URL,
    key_file: KeyFile = None,
    model_store: ModelStore = None,
    model: Model = None,
    alpha: Alpha = None,
    fit: Fitting = "strict",
    output: Output = "table",
    concurrency: Concurrency = 8,
    patience: Patience = 30.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Score images.

    Example: `anomaly score photos/ --format csv > scores.csv`
    """
    with _plain_errors(), _stopping([signal.SIGINT], _interrupt):
        if not all(files):
            raise typer.BadParameter("an empty name is no file and no folder")
        wanted = list(sources(files))
        if not wanted:
            raise typer.BadParameter(f"there is no PNG file in {printable(', '.join(files))}")
        ask = Ask(url, key_file, concurrency, patience)
        code = NORMAL
        with (
            closing(_scorer(model_store, ask, Verdict(model, alpha, fit))) as scorer,
            closing(WRITERS[output](sys.stdout)) as writer,
        ):
            for result in _with_bar(scorer.results(wanted), len(wanted), show=not quiet):
                writer.add(result)
                code = max(code, _code(result))
        raise typer.Exit(code)


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(parser=_folder, metavar="FOLDER", help="The folder that images arrive in.")],
    *,
    url: Url = URL,
    key_file: KeyFile = None,
    model_store: ModelStore = None,
    model: Model = None,
    alpha: Alpha = None,
    fit: Fitting = "strict",
    output: Output = "table",
    concurrency: Concurrency = 8,
    existing: Annotated[bool, typer.Option("--existing", help="Score what is there already, too.")] = False,
    interval: Annotated[float, typer.Option(min=0.05, max=86_400, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Score what arrives in a folder, until Ctrl-C.

    A file is taken when it has not changed between two looks, so none is read half-written. While the service is away
    nothing is lost: what arrived meanwhile is scored when it is back. If the end comes first, the
    exit code is 2.
    """
    ask = Ask(url, key_file, concurrency, _WATCH_PATIENCE)
    stop = _Stop()
    with (
        _plain_errors(),
        _stopping([signal.SIGINT, signal.SIGTERM], stop.ask),
        closing(_scorer(model_store, ask, Verdict(model, alpha, fit))) as scorer,
    ):
        writer = STREAMING[output](sys.stdout)
        arrivals = Arrivals(folder)
        if not existing:
            arrivals.pass_over()
        _say(f"watching {folder}; Ctrl-C ends it")
        code, trouble = NORMAL, ""
        while not stop.asked:
            try:
                ready = arrivals.look()
                left = len(ready)
                for result in scorer.results(Source(str(path), path) for path in ready):
                    writer.add(result)
                    arrivals.done(Path(result.file))
                    code = max(code, _code(result))
                    left -= 1
                    if stop.asked:
                        break
                if not left:
                    trouble = ""
            except InvalidParameter:
                raise  # an option's value does not become valid by waiting
            except (ServiceError, FolderAway) as error:
                if str(error) != trouble:
                    _say(f"waiting: {error}")
                trouble = str(error)
            stop.wait(interval)
        raise typer.Exit(ERROR if trouble else code)


@app.command()
def models(url: Url = URL, key_file: KeyFile = None) -> None:
    """List what a service serves."""
    with _plain_errors():
        from rich.table import Table

        from anomaly import Client
        from anomaly.cli.remote import api_key

        try:
            with Client(url, api_key=api_key(key_file)) as service:
                found = service.models()
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("model", "answers", "default", "normal class", "alpha", "threshold", "versions"):
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


def _train(context: typer.Context) -> None:
    try:
        from training.__main__ import app as training
    except ImportError as error:
        _say(f"error: {context.info_name} needs the extra `train` ({error.name} is not installed)")
        raise typer.Exit(ERROR) from error
    training(args=[str(context.info_name), *context.args], prog_name="anomaly")


_TRAINING = {
    "train": "Learn a normal class from images, and publish the next version of a model.",
    "all": "Make one model of each label, and print the figures of all.",
    "calibrate": "Choose the threshold of a model anew, without training.",
    "publish": "Publish a version that lies in another model store.",
    "list": "List every version of every model in a model store.",
    "promote": "Let a version answer.",
    "rollback": "Let an older version answer again.",
    "verify": "Open versions as the service does.",
}
for _name, _help in _TRAINING.items():
    # Their options are training's own: nothing of torch is imported before one of them is asked for.
    app.command(
        _name,
        help=_help,
        add_help_option=False,
        rich_help_panel="Models",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_train)


def _scorer(model_store: Path | None, ask: Ask, verdict: Verdict) -> Scorer:
    if model_store is not None:
        return _offline(model_store, verdict)
    from anomaly.cli.remote import Remote

    try:
        return Remote(ask, verdict)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _offline(model_store: Path, verdict: Verdict) -> Scorer:
    try:
        from anomaly.cli.offline import Offline
    except ImportError as error:
        raise typer.BadParameter(f"--model-store needs the extra `serve`: {error.name} is not installed") from error
    try:
        return Offline(model_store, verdict)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _code(result: Result) -> int:
    return {"normal": NORMAL, "anomalous": ANOMALY, "not scored": ERROR}[result.verdict]


def _with_bar(results: Iterator[Result], total: int, *, show: bool) -> Iterator[Result]:
    if not show or total == 1 or not sys.stderr.isatty():
        yield from results
        return
    from rich.progress import track

    yield from track(results, "scoring", total, console=console_of(sys.stderr), transient=True)


class _Stop:
    """A wait that a signal handler may end.

    A `threading.Event` must not be set by one: it waits for a lock, for ever where the handler interrupts the very
    thread that holds it. A `SimpleQueue` is made for this.

    Attributes:
        asked: whether the end has been asked for.
    """

    def __init__(self) -> None:
        self.asked = False
        self._told: SimpleQueue[None] = SimpleQueue()

    def ask(self) -> None:
        """Ask for the end."""
        self.asked = True
        self._told.put(None)

    def wait(self, seconds: float) -> None:
        """Return when the end is asked for, or after this long."""
        with suppress(Empty):
            self._told.get(timeout=seconds)


@contextmanager
def _stopping(signals: Iterable[int], stop: Callable[[], object]) -> Iterator[None]:
    """Have `stop` called by the first of these signals, and say so. A second one ends the process at once.

    Signals that are ignored stay so: a shell has them ignored by what it runs in the background.
    """
    previous = {number: signal.getsignal(number) for number in signals}
    heeded = [number for number, handler in previous.items() if handler != signal.SIG_IGN]

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for each in heeded:
            signal.signal(each, signal.SIG_DFL)
        with suppress(OSError):
            os.write(2, b"stopping; once more ends at once\n")  # `sys.stderr` may be in use where the signal interrupts
        stop()

    for number in heeded:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, previous[number])


class _Interrupted(typer.Exit):
    """The end of a command of this module by Ctrl-C; training ends by itself, and has to clean up."""


def _interrupt() -> None:
    raise KeyboardInterrupt


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except ServiceError as error:
        _say(f"error: {error}")
        hint = getattr(error, "hint", "")
        if hint:
            _say(f"hint: {hint}")
        raise typer.Exit(ERROR) from error
    except KeyboardInterrupt as error:
        raise _Interrupted(INTERRUPTED) from error
    except BrokenPipeError as error:
        _leave_stdout()  # whoever read the results has seen enough
        raise typer.Exit(ERROR) from error


def _say(words: str) -> None:
    with suppress(OSError):  # the exit code must be right where nobody can read the words, too
        sys.stderr.write(printable(words) + "\n")


def _leave_stdout() -> None:
    """Keep Python from failing, with an exit code of its own, when it flushes what could not be written."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Make the standard streams such that every name can be written, and that each of them is there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The next file or connection would take the number of a stream that is closed.
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        # A file's name need not be UTF-8. What Python makes of such a byte is written as JSON writes it, \udcff: so
        # JSON stays JSON, and whoever reads it gets the name back. The raw byte would make a line that nobody reads.
        sys.stdout.reconfigure(errors="backslashreplace")


def _end_now() -> None:
    """End without waiting, as Python would, for threads to whom a silent service owes a reply."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(INTERRUPTED)


def main() -> None:
    """Run the command `anomaly`. Whatever goes wrong, the exit code is not that of an anomaly."""
    _open_streams()
    try:
        app(prog_name="anomaly")
    except SystemExit as end:
        # typer and rich end with 1 of their own accord, where nobody reads; a command ends with typer's Exit.
        anomaly = isinstance(end.__context__, typer.Exit)
        if isinstance(end.__context__, _Interrupted):
            _end_now()
        sys.exit(ERROR if end.code == ANOMALY and not anomaly else end.code)
    except Exception as error:
        words = " ".join(str(error).split())
        _say(f"error: {type(error).__name__}: {words}" if words else f"error: {type(error).__name__}")
        _leave_stdout()
        sys.exit(ERROR)


if __name__ == "__main__":
    main()
