"""The command's streams and exit codes, where somebody does not read or write as usual."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import cli.__main__ as command
from cli.__main__ import _stopping, main
from cli.files import Source
from cli.formats import Result
from client import Score, ServiceError
from client.replies import score_of

SCORE = score_of(
    {"id": None, "model": "m", "version": 1, "mse": 0.1, "threshold": 0.2, "alpha": 0.1, "p_value": 0.5,
     "is_anomaly": False, "reason": None}
)  # fmt: skip


class Scorer:
    """Scores without a service: each image by its name, as a test says."""

    def __init__(self, outcome: Callable[[str], Score | ServiceError] = lambda _: SCORE) -> None:
        self.outcome = outcome

    def results(self, sources: Iterator[Source]) -> Iterator[Result]:
        """Yield the result of each source."""
        for source in sources:
            yield Result(source.name, self.outcome(source.name))

    def close(self) -> None:
        """Hold nothing."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a runner of `main` that gives the exit code."""

    def run(*arguments: str | Path, scorer: Scorer | None = None) -> int:
        monkeypatch.setattr(sys, "argv", ["anomaly", *map(str, arguments)])
        monkeypatch.setattr(command, "_scorer", lambda *_: scorer or Scorer())
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, int)
        return end.value.code

    return run


def unread() -> io.TextIOWrapper:
    """Return a stream whose reader is gone."""
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
    """The code is never that of an anomaly, and nothing is left that would fail at exit."""
    with stream() as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run(*arguments) == 2
        stdout.flush()


@pytest.mark.parametrize("stream", [unread, full, lambda: None], ids=["unread", "full", "closed"])
def test_words_that_nobody_reads_change_no_code(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, stream: Callable[[], io.TextIOWrapper | None]
) -> None:
    """An error stream that is closed or full leaves the exit code as it is."""

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
    """The handler asks for the end, whatever becomes of its words."""

    def broken(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", broken)
    asked: list[int] = []
    with _stopping([signal.SIGTERM], lambda: asked.append(1)):
        signal.raise_signal(signal.SIGTERM)
    assert asked == [1]


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_need_not_be_utf8(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str, encoding: str
) -> None:
    """A name with a byte that is no UTF-8 is written as JSON writes it, and the run goes on."""
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
