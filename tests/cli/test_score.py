"""`anomaly score` and similar commands, as a process: exit codes, formats, offline and by URL."""

from __future__ import annotations

import ast
import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageOps
from typer.main import get_command

from anomaly import UnreadableImage
from anomaly.client.images import read
from tests.cli.conftest import Anomaly, environment
from tests.conftest import EXAMPLES, MODEL_STORE, ROOT, Server, free_port
from training.__main__ import app as training

ZERO, SIX = EXAMPLES / "zero.png", EXAMPLES / "six.png"
STORE = ("--model-store", MODEL_STORE)
ARTICLE = ("--model", "zero-article@1")
STRICT = ("--alpha", "0.2")
"""At this rate the article's model calls the six anomalous and the zero normal."""


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ((ZERO,), 0),
        ((ZERO, SIX), 1),
        ((SIX, ROOT / "pyproject.toml"), 2),
        ((ZERO, ROOT / "nothing.png"), 2),
        ((ROOT / "training",), 2),
    ],
    ids=["normal", "anomaly", "no png", "missing", "empty folder"],
)
def test_the_exit_code_is_the_verdict(anomaly: Anomaly, files: tuple[Path, ...], code: int) -> None:
    """Exit code 0: all normal; 1: an anomaly was found; 2: a file could not be scored. Offline and by URL."""
    done = anomaly("score", *files, *STORE, *ARTICLE, *STRICT)
    assert done.returncode == code, done.stderr


def test_what_cannot_be_looked_at_is_not_scored(
    run: Callable[..., int],
    tmp_path: Path,
    zero: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A folder or file that the operating system cannot open is a separate result, and other files are scored."""
    (tmp_path / "below").mkdir()
    (tmp_path / "shown").mkdir()
    for path in (tmp_path / "z.png", tmp_path / "shown" / "a.png"):
        path.write_bytes(zero)
    scandir, stat = os.scandir, Path.stat

    def refused(path: str) -> object:
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    def unknown(path: Path, **options: bool) -> os.stat_result:
        if path.name == "a.png":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "scandir", refused)
    monkeypatch.setattr(Path, "stat", unknown)
    long = "x" * 300
    assert run("score", tmp_path, long, "-f", "jsonl") == 0
    names = [json.loads(line)["file"] for line in capsys.readouterr().out.splitlines()]
    assert names == [str(tmp_path / "below"), str(tmp_path / "shown" / "a.png"), str(tmp_path / "z.png"), long]
    for name in (tmp_path / "below", long):
        with pytest.raises(UnreadableImage):
            read(Path(name))


def test_an_empty_name_is_refused(run: Callable[..., int], tmp_path: Path) -> None:
    """An empty argument, which shells pass for an unset variable, does not mean the working directory."""
    assert run("score", "") == 2
    assert run("watch", "") == 2
    assert run("watch", tmp_path, "--interval", "inf") == 2


def test_the_service_gives_the_same_codes(in_process: Anomaly, server: Server) -> None:
    """The exit codes by URL are those offline."""
    ask = ("--url", server.url, *ARTICLE, *STRICT)
    codes = [in_process("score", *files, *ask).returncode for files in ((ZERO,), (ZERO, SIX), (SIX, ROOT / "LICENSE"))]
    assert codes == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--alpha", "1e-9"), "needs at least 999999999 calibration images"),
        (("--model", "nobody"), "The model version does not exist"),
        (("--model", "zero-article@999"), "The model version does not exist"),
        (("--model", "zero-article@v9"), "An option is not valid: model"),
        (("--model", "zero-article@"), "An option is not valid: model"),
        (("--alpha", "2"), "An option is not valid: alpha"),
        (("--fit", "sideways"), "sideways"),
        (("--format", "xml"), "xml"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_an_error(
    in_process: Anomaly, server: Server, options: tuple[str, ...], words: str
) -> None:
    """Invalid options end with code 2 and a message on standard error, offline and by URL."""
    for where in (STORE, ("--url", server.url)):
        done = in_process("score", ZERO, *where, *options)
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


def test_nobody_listens(in_process: Anomaly) -> None:
    """An unreachable service causes one line and exit code 2."""
    done = in_process("score", ZERO, "--url", f"http://127.0.0.1:{free_port()}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("url", ["http://[::1", "http://host:port", "http://a..b", "http://\u2400", "ftp://host", ""])
@pytest.mark.parametrize("command", ["score", "models"])
def test_what_is_no_url_is_an_error(in_process: Anomaly, command: str, url: str) -> None:
    """An invalid address causes a message and exit code 2, without a traceback."""
    done = in_process(command, *([ZERO] if command == "score" else []), "--url", url, TERMINAL_WIDTH="200")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.process
def test_what_nobody_foresaw_is_one_line(tmp_path: Path) -> None:
    """Any error ends with exit code 2 and one line, so that it differs from the exit code of an anomaly."""
    code = (
        "import sys, anomaly.cli.__main__ as command\n"
        "from anomaly.cli import commands\n"
        "def broken(*given): raise RuntimeError('first line\\nsecond')\n"
        "commands.sources = broken\n"
        f"sys.argv = ['anomaly', 'score', {str(ZERO)!r}, '--model-store', {str(MODEL_STORE)!r}]\n"
        "command.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: RuntimeError: first line second\n"


def test_a_damaged_version_is_refused_offline(in_process: Anomaly, tmp_path: Path) -> None:
    """Offline scoring also rejects a module whose checksum differs from the manifest."""
    source = MODEL_STORE / "zero-article"
    for path in source.rglob("*"):
        if path.is_file():
            target = tmp_path / "zero-article" / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes() + (b"x" if path.name == "model.pt" else b""))
    done = in_process("score", ZERO, "--model-store", tmp_path, *ARTICLE)
    assert done.returncode == 2
    assert "model.pt is not the file that was published" in done.stderr


def test_json_is_the_services_reply_with_the_file(in_process: Anomaly, server: Server) -> None:
    """JSON and JSON lines contain all members of the service's reply, and the name of the file."""
    for where in (STORE, ("--url", server.url)):
        done = in_process("score", ZERO, ROOT / "LICENSE", *where, "--format", "json")
        score, refusal = json.loads(done.stdout)
        assert score["file"] == str(ZERO)
        assert {"id", "model", "version", "mse", "threshold", "alpha", "p_value", "is_anomaly", "reason"} < set(score)
        assert refusal["problem"]["type"] == "/problems/not-a-png"
        lines = in_process("score", ZERO, ROOT / "LICENSE", *where, "-f", "jsonl").stdout.splitlines()
        again = [json.loads(line) for line in lines]
        for document in (score, again[0]):
            document.pop("id")
            document.pop("reconstruction")
        assert again == [score, refusal]


def test_csv_is_one_line_a_file(in_process: Anomaly) -> None:
    """CSV has a head line, one line for each file, and the exact numbers."""
    done = in_process("score", EXAMPLES, ROOT / "LICENSE", *STORE, *ARTICLE, *STRICT, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(Path(row["file"]).name, row["verdict"]) for row in rows] == [
        ("six.png", "anomalous"),
        ("zero.png", "normal"),
        ("LICENSE", "not scored"),
    ]
    assert rows[2]["problem"] == "/problems/not-a-png"
    document = json.loads(in_process("score", SIX, *STORE, *ARTICLE, "-f", "jsonl").stdout)
    assert float(rows[0]["mse"]) == document["mse"]


def test_the_table_is_readable(in_process: Anomaly) -> None:
    """The table lists every file with its verdict, and totals; without a terminal, no cell is truncated."""
    done = in_process("score", EXAMPLES, ROOT / "LICENSE", *STORE, *ARTICLE, *STRICT)
    assert f"{SIX}" in done.stdout
    assert "The file is not a PNG" in done.stdout
    assert done.stdout.splitlines()[-1] == "3 images: 1 normal, 1 anomalous, 1 not scored"
    assert "\x1b" not in done.stdout


def test_the_standard_input(anomaly: Anomaly, zero: bytes) -> None:
    """`-` scores the image on the standard input like the file itself."""
    piped = json.loads(anomaly("score", "-", *STORE, "-f", "jsonl", stdin=zero).stdout)
    named = json.loads(anomaly("score", ZERO, *STORE, "-f", "jsonl").stdout)
    assert piped == {**named, "file": "-"}


def test_a_folder_is_searched_through(in_process: Anomaly, tmp_path: Path, zero: bytes) -> None:
    """Subfolders count, hidden files and other suffixes do not, and the order is that of the names."""
    for name in ("b.PNG", "deep/er/a.png", ".hidden.png", ".cache/c.png", "note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(zero)
    lines = in_process("score", tmp_path, *STORE, "-f", "jsonl").stdout.splitlines()
    assert [json.loads(line)["file"] for line in lines] == [str(tmp_path / "b.PNG"), str(tmp_path / "deep/er/a.png")]


@pytest.mark.process
def test_a_reader_that_leaves(thousand_digits: Path) -> None:
    """`anomaly score ... | head -1` ends without a traceback, and not with the code of an anomaly."""
    command = [
        sys.executable,
        "-m",
        "anomaly.cli",
        "score",
        thousand_digits,
        "--model-store",
        MODEL_STORE,
        "-f",
        "jsonl",
    ]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["mse"] > 0
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(60) == 2
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


@pytest.mark.process
def test_ctrl_c_ends_although_the_service_hangs(tmp_path: Path, thousand_digits: Path) -> None:
    """The command does not wait for pending replies, which a hanging service would never send."""
    server = Server(tmp_path).start()
    assert server.process is not None
    command = [sys.executable, "-m", "anomaly.cli", "score", str(thousand_digits), "--url", server.url, "-f", "jsonl"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert json.loads(process.stdout.readline())["mse"] > 0
            server.process.send_signal(signal.SIGSTOP)
            process.send_signal(signal.SIGINT)
            assert b"press Ctrl-C again" in process.stderr.readline()
            assert process.wait(5) == 130
        finally:
            process.kill()
            server.process.send_signal(signal.SIGCONT)
            server.stop()


def test_a_thousand_digits_score_the_same_offline(anomaly: Anomaly, server: Server, thousand_digits: Path) -> None:
    """Offline and by URL, 1,000 digits get the same mse to the last bit, and with it threshold, p-value, verdict."""
    offline = anomaly("score", thousand_digits, *STORE, "-f", "jsonl")
    online = anomaly("score", str(thousand_digits), "--url", server.url, "--concurrency", "1", "-f", "jsonl")
    documents = []
    for done in (offline, online):
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(lines) == 1000, done.stderr
        documents.append([{k: v for k, v in line.items() if k not in {"id", "reconstruction"}} for line in lines])
    assert documents[0] == documents[1]
    assert offline.returncode == online.returncode
    assert len({line["mse"] for line in documents[0]}) > 900


def test_several_at_a_time_differ_by_rounding_only(in_process: Anomaly, server: Server, thousand_digits: Path) -> None:
    """Micro-batches of several images change a score only by rounding, and the output keeps its order."""
    alone = in_process("score", thousand_digits, *STORE, "-f", "jsonl")
    together = in_process("score", str(thousand_digits), "--url", server.url, "--concurrency", "16", "-f", "jsonl")
    pairs = list(zip(*(map(json.loads, done.stdout.splitlines()) for done in (alone, together)), strict=True))
    assert [a["file"] for a, _ in pairs] == [b["file"] for _, b in pairs]
    assert [a["mse"] for a, _ in pairs] == pytest.approx([b["mse"] for _, b in pairs], rel=5e-6)


def test_an_image_of_any_size_fits_offline_as_by_url(in_process: Anomaly, server: Server, tmp_path: Path) -> None:
    """With `--fit mnist` a large dark-on-bright digit gets the service's score and the service's account of the fit."""
    photo = Image.new("L", (400, 300), 240)
    with Image.open(SIX) as six:
        photo.paste(ImageOps.invert(six).resize((140, 140)).point(lambda grey: grey * 240 // 255), (130, 60))
    photo.save(tmp_path / "photo.png")
    Image.new("L", (90, 90), 200).save(tmp_path / "wall.png")
    documents = []
    for where in (STORE, ("--url", server.url)):
        done = in_process("score", tmp_path, *where, *ARTICLE, "--fit", "mnist", "-f", "json")
        score, blank = json.loads(done.stdout)
        assert blank["problem"]["type"] == "/problems/blank-image"
        assert score["fitted"]["inverted"] is True
        documents.append({name: value for name, value in score.items() if name not in {"id", "reconstruction"}})
        assert in_process("score", tmp_path, *where).returncode == 2
    assert documents[0] == documents[1]


def test_asking_a_service_never_imports_torch(server: Server) -> None:
    """Scoring by URL loads neither torch nor numpy nor the service's code, so that the command starts quickly."""
    code = (
        "import sys; from anomaly.cli.__main__ import app\n"
        f"try: app(['score', {str(ZERO)!r}, '--url', {server.url!r}])\n"
        "except SystemExit as end: print('code', end.code)\n"
        "print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[-2] == "code 0"
    assert set(lines[-1].split()).isdisjoint({"torch", "numpy", "PIL", "app", "training", "fastapi", "matplotlib"})


def test_a_key_comes_from_file_or_environment_only(anomaly: Anomaly, tmp_path: Path) -> None:
    """No option takes the key itself, where every user of the machine could read it; a bad key file is an error."""
    help_text = anomaly("score", "--help").stdout
    assert "--key-file" in help_text
    assert "--key " not in help_text
    assert "--api-key" not in help_text
    (tmp_path / "key").write_text("\n")
    for file, words in ((tmp_path / "key", "empty"), (tmp_path / "none", "cannot be read")):
        done = anomaly("score", ZERO, "--key-file", file, TERMINAL_WIDTH="200")
        assert done.returncode == 2
        assert words in done.stderr


def test_the_models_of_a_service(anomaly: Anomaly, server: Server) -> None:
    """`anomaly models` lists what the service serves."""
    done = anomaly("models", "--url", server.url)
    assert done.returncode == 0
    assert "zero-article" in done.stdout
    assert "the digit 0" in done.stdout


def test_training_is_mounted(anomaly: Anomaly, in_process: Anomaly, tmp_path: Path) -> None:
    """`anomaly list` and similar commands are those of the training command, with its options and exit codes."""
    assert "zero-article" in anomaly("list", "--model-store", MODEL_STORE).stdout
    assert "--anomalies-dir" in in_process("train", "--help").stdout
    listed = in_process("--help").stdout
    for command in get_command(training).commands:
        assert f" {command} " in listed
    assert "anomaly all " in in_process("all", "--help").stdout
    assert in_process("promote", "zero-article", "1", "--model-store", tmp_path / "none").returncode == 2


@pytest.mark.parametrize("command", ["score", "watch", "bulk", "pull", "serve", "review", "validity"])
def test_the_help_has_no_broken_lines(in_process: Anomaly, command: str) -> None:
    """A line of a paragraph ends only where the next word does not fit."""
    above, _, boxes = in_process(command, "--help").stdout.partition("╭")
    width = 1 + len(boxes.splitlines()[0])
    lines = [line.strip() for line in above.splitlines()]
    pairs = [(line, below.split()[0]) for line, below in itertools.pairwise(lines) if line and below]
    assert len(lines) > 3
    assert [line for line, word in pairs if len(line) + len(word) + 1 <= width - 2] == []


def test_the_shell_completes(anomaly: Anomaly) -> None:
    """The completion that `--install-completion` installs offers commands and options."""
    ask = {"_ANOMALY_COMPLETE": "complete_bash", "_TYPER_COMPLETE_TESTING": "1"}
    commands = anomaly(COMP_WORDS="anomaly ", COMP_CWORD="1", **ask).stdout.split()
    assert {"score", "watch", "models", "train"} <= set(commands)
    options = anomaly(COMP_WORDS="anomaly score --fo", COMP_CWORD="2", **ask).stdout.split()
    assert options == ["--format"]


def test_the_shell_that_starts_the_service_may_know_its_url(server: Server, anomaly: Anomaly) -> None:
    """The command's own variables do not keep the service, or the offline command, from starting."""
    own = {"ANOMALY_URL": server.url, "ANOMALY_KEY": "k", "ANOMALY_KEY_FILE": "LICENSE"}
    assert anomaly("score", ZERO, *STORE, **own).returncode == 0
    own.pop("ANOMALY_KEY_FILE")
    assert anomaly("score", ZERO, **own).returncode == 0


@pytest.mark.process
def test_a_version_without_a_required_signature_is_not_scored_with(in_process: Anomaly, tmp_path: Path) -> None:
    """Offline scoring rejects what a service with the same settings rejects."""
    key = tmp_path / "publisher.pub"
    subprocess.run(
        "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 | openssl pkey -pubout -out " + str(key),
        shell=True, check=True, capture_output=True,
    )  # fmt: skip
    rules = {"ANOMALY_MODEL_SIGNATURE": "require", "ANOMALY_MODEL_PUBLIC_KEY_FILE": str(key)}
    done = in_process("score", ZERO, *STORE, **rules)
    assert (done.returncode, done.stdout) == (2, "")
    assert "signature" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_keeps_the_order_of_the_layers() -> None:
    """Of the command's modules, only two import the service's code, and only two import training."""
    users: dict[str, set[str]] = {"app": set(), "training": set(), "torch": set()}
    for path in (ROOT / "anomaly" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if (package := name.partition(".")[0]) in users:
                    users[package].add(path.stem)
    assert users == {"app": {"offline", "pull"}, "training": {"pull", "service"}, "torch": set()}
