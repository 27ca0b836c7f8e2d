"""Prepare the standard streams, and write messages to standard error."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from anomaly.cli.formats import printable


def write_message(text: str) -> None:
    """Write one line to standard error. A stream that cannot be written to does not change the exit code."""
    with suppress(OSError):
        sys.stderr.write(printable(text) + "\n")


def discard_stdout() -> None:
    """Redirect standard output to nowhere, because Python fails at exit if it cannot flush the stream."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_streams() -> None:
    """Open the standard streams that are closed, and let standard output accept every file name."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The next file or connection would get the number of the closed stream.
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        # File names need not be UTF-8. Python represents such a byte as a surrogate, which is written as JSON does:
        # \udcff. JSON output then stays valid, and its reader gets the name back.
        sys.stdout.reconfigure(errors="backslashreplace")
