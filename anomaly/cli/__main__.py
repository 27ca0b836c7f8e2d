"""The entry point of the command `anomaly`.

Exit codes: 0 all images are normal, 1 at least one anomaly, 2 at least one image was not scored, or an error.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

from anomaly.cli import bulk, commands, pull, review, service, validity
from anomaly.cli.streams import discard_stdout, prepare_streams, write_message

app = typer.Typer(
    help="Score images with an autoencoder: how large the reconstruction error is, and whether that is an anomaly.",
    epilog="Exit codes: 0 all images are normal, 1 at least one anomaly, 2 at least one image was not scored.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(commands.score)
app.command()(commands.watch)
app.command()(commands.models)
app.command()(validity.validity)
app.command()(review.review)
app.command(rich_help_panel="Commands of a checkout")(bulk.bulk)
app.command(rich_help_panel="Commands of a checkout")(pull.pull)
app.command(rich_help_panel="Commands of a checkout")(service.serve)
for _name, _help in service.TRAINING.items():
    # The options belong to the training. Its modules, and torch with them, are imported only when a command runs.
    app.command(
        _name,
        help=_help,
        add_help_option=False,
        rich_help_panel="Commands of a checkout",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(service.training)


def _print_version(wanted: bool) -> None:
    if wanted:
        from anomaly import __version__

        sys.stdout.write(f"anomaly {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Accept the options before a command."""


def _exit_interrupted() -> None:
    """End without joining threads, which may wait for the reply of a silent service."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(commands.INTERRUPTED)


def main() -> None:
    """Run the command `anomaly`. An unexpected error never ends with the exit code of an anomaly."""
    prepare_streams()
    try:
        app(prog_name="anomaly")
    except SystemExit as end:
        # typer and rich exit with 1 if standard output cannot be written; a command of this package raises typer.Exit.
        by_command = isinstance(end.__context__, typer.Exit)
        if isinstance(end.__context__, commands.Interrupted):
            _exit_interrupted()
        sys.exit(commands.ERROR if end.code == commands.ANOMALY and not by_command else end.code)
    except Exception as error:
        text = " ".join(str(error).split())
        write_message(f"error: {type(error).__name__}: {text}" if text else f"error: {type(error).__name__}")
        discard_stdout()
        sys.exit(commands.ERROR)


if __name__ == "__main__":
    main()
