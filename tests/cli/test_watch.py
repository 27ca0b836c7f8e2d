"""`anomaly watch`, as a process, on a real folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue

import pytest

from anomaly import Score, ServiceError
from anomaly.cli.signals import StopFlag, stop_on
from anomaly.cli.watching import Arrivals, FolderAway
from anomaly.client.errors import InvalidParameter, Unauthorized
from tests.cli.conftest import SCORE, Scorer, environment
from tests.conftest import MODEL_STORE, ROOT, Server


class Watching:
    """A running watch: its lines and its exit code."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.errors: Queue[str] = Queue()
        self._lines: Queue[str] = Queue()
        self._threads = [
            threading.Thread(target=self._pump, args=pair)
            for pair in ((process.stdout, self._lines), (process.stderr, self.errors))
        ]
        for thread in self._threads:
            thread.start()

    def _pump(self, stream: Iterator[str], lines: Queue[str]) -> None:
        for line in stream:
            lines.put(line)

    def line(self, seconds: float = 30) -> dict[str, object]:
        """Return the next result."""
        found: dict[str, object] = json.loads(self._lines.get(timeout=seconds))
        return found

    def nothing(self, seconds: float) -> bool:
        """Return whether no result arrives for a while."""
        try:
            self._lines.get(timeout=seconds)
        except Empty:
            return True
        return False

    def left(self) -> int:
        """Return the number of results that the test has not read. Call it after `end`."""
        return self._lines.qsize()

    def end(self) -> int:
        """Stop it as Ctrl-C does and return its exit code."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(30)
        for thread in self._threads:
            thread.join()
        return code


@contextmanager
def watching(folder: Path, *options: str) -> Iterator[Watching]:
    """Run a watch that polls often and writes JSON lines."""
    command = [sys.executable, "-m", "anomaly.cli", "watch", str(folder), "--interval", "0.2", "-f", "jsonl", *options]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            watch = Watching(process)
            assert "watching" in watch.errors.get(timeout=60)
            yield watch
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.process
def test_what_arrives_is_scored(tmp_path: Path, zero: bytes, six: bytes) -> None:
    """New and changed files are scored once each, earlier files are not, and the highest exit code is returned."""
    (tmp_path / "old.png").write_bytes(zero)
    options = ("--model-store", str(MODEL_STORE), "--model", "zero-article@1", "--alpha", "0.2")
    with watching(tmp_path, *options) as watch:
        (tmp_path / "a.png").write_bytes(zero)
        first = watch.line()
        assert (first["file"], first["is_anomaly"]) == (str(tmp_path / "a.png"), False)
        (tmp_path / "a.png").write_bytes(six)
        second = watch.line()
        assert (second["file"], second["is_anomaly"]) == (str(tmp_path / "a.png"), True)
        assert watch.nothing(1)
        assert watch.end() == 1


@pytest.mark.process
def test_what_is_there_can_be_scored_too(tmp_path: Path, zero: bytes) -> None:
    """With `--existing` the files that are there already come first."""
    (tmp_path / "old.png").write_bytes(zero)
    with watching(tmp_path, "--model-store", str(MODEL_STORE), "--existing") as watch:
        assert watch.line()["file"] == str(tmp_path / "old.png")
        assert watch.end() == 0


@pytest.mark.process
def test_ctrl_c_waits_for_the_file_under_way_only(thousand_digits: Path) -> None:
    """A signal ends the watch before all images of a full folder are scored, and the exit code says so."""
    with watching(thousand_digits, "--model-store", str(MODEL_STORE), "--existing") as watch:
        watch.line()
        assert watch.end() == 2
        assert 1 + watch.left() < 1000


def test_signals_that_stop() -> None:
    """The first signal of either kind stops the watch, a second one ends the process; ignored signals stay ignored."""
    asked: list[int] = []
    both = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in both]
    with stop_on(both, lambda: asked.append(1)):
        signal.raise_signal(signal.SIGTERM)
        assert asked == [1]
        assert [signal.getsignal(number) for number in both] == [signal.SIG_DFL, signal.SIG_DFL]
    assert [signal.getsignal(number) for number in both] == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on(both, lambda: asked.append(2)):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert asked == [1, 2]


@pytest.mark.process
def test_a_signal_ends_a_wait_wherever_it_comes() -> None:
    """A signal between any two instructions of the wait is handled, without a deadlock on a held lock."""
    program = """
import itertools, signal, sys
from anomaly.cli.signals import StopFlag, stop_on

def traced(frame, event, argument):
    frame.f_trace_opcodes = True
    if next(steps) == at:
        sys.settrace(None)
        signal.raise_signal(signal.SIGTERM)
    return traced

def wait(seconds):
    stop = StopFlag()
    with stop_on([signal.SIGTERM], stop.set):
        sys.settrace(traced)
        stop.wait(seconds)
        sys.settrace(None)
    return stop.is_set

at, steps = -1, itertools.count()
assert not wait(0.001)
instructions = next(steps)
for at in range(instructions):
    steps = itertools.count()
    assert wait(60 if at == 0 else 0.02)
print(instructions)
"""
    command = [sys.executable, "-c", program]
    assert int(subprocess.check_output(command, cwd=ROOT, timeout=60)) > 10


def test_a_file_is_not_read_while_it_grows(tmp_path: Path, zero: bytes) -> None:
    """A file is returned if two polls in a row find it unchanged, and again only after it has changed."""
    arrivals, path = Arrivals(tmp_path), tmp_path / "slow.png"
    path.write_bytes(zero[:50])
    assert arrivals.poll() == []
    path.write_bytes(zero)
    assert arrivals.poll() == []
    assert arrivals.poll() == [path]
    assert arrivals.poll() == [path]
    arrivals.mark_done(path)
    assert arrivals.poll() == []
    path.unlink()
    assert arrivals.poll() == []
    path.write_bytes(zero)
    assert arrivals.poll() == []
    assert arrivals.poll() == [path]


def test_a_folder_that_is_away_is_not_a_folder_without_files(
    tmp_path: Path, zero: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a folder or subfolder cannot be listed, its earlier files and scored files keep their state."""
    folder, other = tmp_path / "in", tmp_path / "other"
    (folder / "below").mkdir(parents=True)
    for path in (folder / "old.png", folder / "below" / "old.png"):
        path.write_bytes(zero)
    arrivals = Arrivals(folder)
    arrivals.skip_present()
    folder.rename(other)
    for _ in range(2):
        with pytest.raises(FolderAway):
            arrivals.poll()
    other.rename(folder)
    assert [arrivals.poll(), arrivals.poll()] == [[], []]
    scandir = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        assert [arrivals.poll(), arrivals.poll()] == [[], [folder / "below"]]
    assert [arrivals.poll(), arrivals.poll()] == [[], []]


def test_one_file_that_cannot_be_scored_does_not_hold_up_the_others(tmp_path: Path, zero: bytes) -> None:
    """A poll begins after the file at which the previous poll ended."""
    paths = [tmp_path / f"{name}.png" for name in "abcd"]
    for path in paths:
        path.write_bytes(zero)
    arrivals = Arrivals(tmp_path)
    arrivals.poll()
    a, b, c, d = paths
    assert arrivals.poll() == [a, b, c, d]
    assert arrivals.poll() == [b, c, d, a]
    arrivals.mark_done(b)
    assert arrivals.poll() == [d, a, c]
    arrivals.mark_done(d)
    assert arrivals.poll() == [c, a]
    d.write_bytes(zero + zero)
    assert arrivals.poll() == [a, c]
    assert arrivals.poll() == [c, d, a]
    arrivals.mark_done(c)
    assert arrivals.poll() == [a, d]


@pytest.mark.parametrize("error", [Unauthorized(401, {}), InvalidParameter(422, {}), OSError("no folder"), None])
def test_a_watch_that_could_not_score_says_so_by_its_code(
    run: Callable[..., int], tmp_path: Path, zero: bytes, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """Images without a score at the end cause exit code 2; an invalid option ends the watch at once."""
    (tmp_path / "a.png").write_bytes(zero)
    looks = []

    def wait(stop: StopFlag, _: float) -> None:
        looks.append(1)
        stop.is_set = len(looks) == 5
        if isinstance(error, OSError) and len(looks) == 1:
            tmp_path.rename(tmp_path.with_name("elsewhere"))

    def outcome(_: str) -> Score:
        if isinstance(error, ServiceError):
            raise error
        return SCORE

    monkeypatch.setattr(StopFlag, "wait", wait)
    assert run("watch", tmp_path, "--existing", scorer=Scorer(outcome)) == (2 if error else 0)
    assert len(looks) == (1 if isinstance(error, InvalidParameter) else 5)


@pytest.mark.parametrize(("last", "code"), [("a.png", 2), ("b.png", 0)])
def test_trouble_is_over_when_all_is_scored(
    run: Callable[..., int], tmp_path: Path, zero: bytes, monkeypatch: pytest.MonkeyPatch, last: str, code: int
) -> None:
    """Ctrl-C during the poll after an error causes exit code 2 only if a file has no score."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(zero)
    asked: list[str] = []

    def outcome(name: str) -> Score:
        asked.append(name)
        if len(asked) == 1:
            raise Unauthorized(401, {})
        if name == last:
            signal.raise_signal(signal.SIGINT)
        return SCORE

    monkeypatch.setattr(Arrivals, "poll", lambda _: sorted(tmp_path.glob("*.png")))
    monkeypatch.setattr(StopFlag, "wait", lambda *_: None)
    assert run("watch", tmp_path, "--existing", scorer=Scorer(outcome)) == code
    assert asked[1:] == (["a.png"] if last == "a.png" else ["a.png", "b.png"])


def test_nothing_is_lost_while_the_service_is_away(
    tmp_path: Path, make_server: Callable[..., Server], zero: bytes
) -> None:
    """Images that arrive while the service is down are scored when it is up again, and `watch` prints that it waits."""
    server = make_server().start()
    folder = tmp_path / "inbox"
    folder.mkdir()
    with watching(folder, "--url", server.url) as watch:
        (folder / "before.png").write_bytes(zero)
        assert watch.line()["file"] == str(folder / "before.png")
        server.stop()
        (folder / "meanwhile.png").write_bytes(zero)
        assert "waiting:" in watch.errors.get(timeout=30)
        server.start()
        assert watch.line()["file"] == str(folder / "meanwhile.png")
        started = time.monotonic()
        assert watch.end() == 0
        assert time.monotonic() - started < 10
