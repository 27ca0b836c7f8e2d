"""The command's streams and exit codes if a reader or writer of a stream is closed, blocked or full."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest

from anomaly import Score, UnreadableImage
from anomaly.cli.__main__ import main
from anomaly.cli.formats import Csv, Lines, Result, Table, Writer
from anomaly.cli.signals import stop_on
from tests.cli.conftest import SCORE, Scorer


def unread() -> io.TextIOWrapper:
    """Return a stream whose reader is closed."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", encoding="utf-8")


def full() -> io.TextIOWrapper:
    """Return a stream on a full disk."""
    return Path("/dev/full").open("w", encoding="utf-8")


@pytest.mark.parametrize(
    "arguments",
    [("score", "a.png", "-f", form) for form in ("table", "json", "jsonl", "csv")] + [("--help",), ("score", "--help")],
    ids=" ".join,
)
@pytest.mark.parametrize("stream", [unread, full])
def test_results_that_nobody_reads_are_an_error(
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    stream: Callable[[], io.TextIOWrapper],
    arguments: tuple[str, ...],
) -> None:
    """The exit code is never that of an anomaly, and no unwritten output causes an error at exit."""
    with stream() as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run(*arguments) == 2
        stdout.flush()


@pytest.mark.parametrize("stream", [unread, full, lambda: None], ids=["unread", "full", "closed"])
def test_words_that_nobody_reads_change_no_code(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, stream: Callable[[], io.TextIOWrapper | None]
) -> None:
    """A closed or full standard error does not change the exit code."""

    def broken(_: str) -> Score:
        raise RuntimeError

    monkeypatch.setattr(sys, "stderr", stream())
    assert run("score", "a.png", scorer=Scorer(broken)) == 2
    assert run("score", "a.png") == 0
    monkeypatch.setattr(sys, "stdout", None)
    assert run("score", "a.png") == 0
    for each in (sys.stdout, sys.stderr):
        with suppress(OSError):
            each.close()


def test_a_signal_stops_where_nobody_reads_that_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler stops the command even if its message cannot be written."""

    def broken(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", broken)
    asked: list[int] = []
    with stop_on([signal.SIGTERM], lambda: asked.append(1)):
        signal.raise_signal(signal.SIGTERM)
    assert asked == [1]


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_need_not_be_utf8(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str, encoding: str
) -> None:
    """A file name that is not UTF-8 is written with a JSON escape, and the run continues."""
    for name in (b"\xff.png", "ü.png".encode()):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert run("score", tmp_path, "-f", form) == 0
    assert b"\\udcff.png" in written.getvalue()
    if form == "jsonl":
        assert {Path(json.loads(line)["file"]).name for line in written.getvalue().splitlines()} == {
            "\udcff.png",
            "ü.png",
        }


@pytest.mark.parametrize("writer", [Table, Lines])
def test_a_name_does_not_command_the_terminal(writer: Callable[[TextIO], Writer]) -> None:
    """Control characters of a file name and of an error message are written as escapes."""
    stream = io.StringIO()
    lines = writer(stream)
    lines.add(Result("\x1b[31mred\n\u202e.png", UnreadableImage("\x1b]0;title\x07")))
    lines.close()
    assert "\\x1b[31mred\\n\\u202e.png" in stream.getvalue()
    assert "\\x1b]0;title\\x07" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_a_spreadsheet_does_not_run_a_name() -> None:
    """A text that begins like a formula is quoted in CSV; the name `-` of the standard input is not."""
    stream = io.StringIO()
    lines = Csv(stream)
    names = ["=1+2.png", "+a.png", "-a.png", "@a.png", "\ta.png", "a=b.png", "-"]
    for name in names:
        lines.add(Result(name, SCORE))
    read = [row["file"] for row in csv.DictReader(io.StringIO(stream.getvalue()))]
    assert read == [f"'{name}" for name in names[:5]] + names[5:]


def test_a_proxy_that_needs_more_is_not_taken_for_an_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without socksio, the message is that of httpx, without the hint about offline scoring."""
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setattr(sys, "argv", ["anomaly", "score", "a.png", "--url", "http://service.invalid"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "socksio" in said
    assert "--model-store" not in said
