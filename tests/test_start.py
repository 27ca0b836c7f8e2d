"""Starting the service: `make serve`, errors before the start, variables of Kubernetes, a clone with CRLF, the log."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from app import process, settings
from app.http import listening
from app.models.repository import Repository
from app.settings import SettingsError
from app.telemetry.logs import AccessLog, JsonFormatter, RecordFormatter, TextRenderer, iso_time
from app.telemetry.writer import LineWriter
from tests import model_stores
from tests.conftest import ROOT, Server

PNG = {"content-type": "image/png"}
INDEX = "https://download.pytorch.org/whl/cpu"
(TORCH,) = re.findall(r"(?m)^torch==(\S+)$", (ROOT / "constraints.txt").read_text())
ISO = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
MakeServer = Callable[..., Server]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Return once a condition holds; fail if it does not hold in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def refusal(server: Server) -> str:
    """Start a service that must not start, and return its only line."""
    server.start(wait=False)
    assert server.process is not None
    assert server.process.wait(60) == 2
    (line,) = server.log().splitlines()
    assert line.startswith("cannot start: ")
    return line


# --- make serve


class Tree:
    """A folder with the Makefile, and a PATH that contains only the given interpreters and basic tools."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs = folder / "tree", folder / "bin"
        self.calls = folder / "calls"
        for path in (self.folder, self.programs):
            path.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.folder)
        for name in ("make", "sh", "touch", "test", "mkdir", "cp", "echo", "cat", "chmod", "grep", "sed", "awk"):
            (self.programs / name).symlink_to(shutil.which(name) or pytest.skip(f"needs {name}"))

    def put(self, name: str, *, supported: bool = True, index: bool = True, configured: str = TORCH) -> None:
        """Add an interpreter that creates an environment with a recording pip and python.

        Args:
            name: of the program.
            supported: whether it has a supported version.
            index: whether the environment's pip can reach an index that is named on its command line.
            configured: versions of torch in the index that the environment's pip is configured for.
        """
        pip = f"""
case "$*" in
*versions*--index-url*) echo "Available versions: {TORCH + "+cpu" if index else "none"}, 2.0.0" ;;
*versions*) echo "Available versions: 9.9.9, {configured}, 2.0.0" ;;
*) echo "pip $*" >> {self.calls} ;;
esac"""
        service = f'echo "python $* port=$ANOMALY_PORT workers=$ANOMALY_WORKERS" >> {self.calls}'
        self._script(self.programs / f"{name}.pip", pip)
        self._script(self.programs / f"{name}.python", service)
        body = f"""
if [ "$1" = -c ]; then exit {int(not supported)}; fi
echo "{name} $*" >> {self.calls}
mkdir -p .venv/bin
cp {self.programs}/{name}.pip .venv/bin/pip
cp {self.programs}/{name}.python .venv/bin/python"""
        self._script(self.programs / name, body)

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run make."""
        environment = {"PATH": str(self.programs), **variables}
        return subprocess.run(
            ["make", *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )

    def called(self) -> list[str]:
        """Return the calls of interpreters and pip so far, without the options that all calls of pip have."""
        common = "--disable-pip-version-check install --constraint constraints.txt "
        return [line.replace(common, "") for line in self.calls.read_text().splitlines()] if self.calls.exists() else []

    def _script(self, path: Path, body: str) -> None:
        path.write_text(f"#!{self.programs}/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Return a folder to run make in."""
    return Tree(tmp_path)


def test_make_serve_installs_only_what_serving_needs(tree: Tree) -> None:
    """`make serve` installs CPU torch from its index, then the extra `serve`; `make test` installs the rest."""
    tree.put("python3")
    done = tree.make("serve")
    assert done.returncode == 0, done.stderr
    assert tree.called() == [
        "python3 -m venv .venv",
        f"pip --no-deps --retries 1 --index-url {INDEX} torch",
        "pip --quiet --editable .[serve]",
        "python -m app port= workers=",
    ]
    steps = [line for line in done.stdout.splitlines() if line.startswith("Step ")]
    assert [re.sub(r"\D", "", line)[:2] for line in steps] == ["12", "22"]
    assert all(re.search(r"\d+ MB.*(second|minute)", line) for line in steps)
    assert tree.make("serve", "PORT=8001", "WORKERS=2").returncode == 0
    assert tree.called()[4:] == ["python -m app port=8001 workers=2"]
    assert tree.make("check", "-o", "ruff").returncode != 0  # the stub of an environment has no ruff
    assert tree.called()[5:] == ["pip --quiet pip>=25.1", "pip --quiet --editable .[train,bulk,otel] --group dev"]


def test_the_index_of_torch_is_that_of_the_image(tree: Tree) -> None:
    """Makefile and Dockerfile have the same variable with the same default."""
    pattern = r"(?m)^(?:ARG )?TORCH_INDEX ?\??= ?(\S+)$"
    assert re.findall(pattern, (ROOT / "Makefile").read_text()) == [INDEX]
    assert re.findall(pattern, (ROOT / "Dockerfile").read_text()) == [INDEX]


@pytest.mark.parametrize(
    ("configured", "install", "warned"),
    [
        (TORCH, "pip torch", True),
        (f"{TORCH}+cu130", "pip torch", True),
        (f"{TORCH}+cu130, {TORCH}+cpu, {TORCH}", f"pip --no-deps torch=={TORCH}+cpu", False),
    ],
)
def test_an_index_that_cannot_be_reached_is_replaced_by_that_of_pip(
    tree: Tree, configured: str, install: str, warned: bool
) -> None:
    """If the index fails, the index of pip is used: its build for CPUs, else the other one, whose size is printed."""
    tree.put("python3", index=False, configured=configured)
    done = tree.make("serve", f"TORCH_INDEX={INDEX}/none")
    assert done.returncode == 0
    assert tree.called()[1:3] == [install, "pip --quiet --editable .[serve]"]
    assert f"{INDEX}/none cannot be reached, or has no torch {TORCH}" in done.stdout
    assert ("GB to download" in done.stdout, "TORCH_INDEX=" in done.stdout) == (warned, warned)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    lines = [line for line in done.stdout.splitlines() if "of pip" in line or "Ctrl-C" in line]
    assert len(lines) == 1 + 2 * warned
    assert all(f"\n{line.replace(f'{INDEX}/none', INDEX)}\n" in page for line in lines)


def test_no_index_is_torch_with_cuda(tree: Tree) -> None:
    """`TORCH_INDEX=` installs torch from the index of pip."""
    tree.put("python3")
    done = tree.make("serve", "TORCH_INDEX=")
    assert tree.called()[1:3] == ["pip torch", "pip --quiet --editable .[serve]"]
    assert "CUDA" in done.stdout


@pytest.mark.parametrize("version", ["13", "12", "11"])
def test_an_older_or_newer_python3_is_passed_over(tree: Tree, version: str) -> None:
    """Where `python3` has no supported version, one of the supported names is used."""
    tree.put("python3", supported=False)
    tree.put(f"python3.{version}")
    assert tree.make("serve").returncode == 0
    assert tree.called()[0] == f"python3.{version} -m venv .venv"


def test_no_supported_python_is_one_line(tree: Tree) -> None:
    """Without Python 3.11 to 3.13, make stops with one line and exit code 2."""
    tree.put("python3", supported=False)
    done = tree.make("serve")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no Python 3.11, 3.12 or 3.13 found: install one, or set PYTHON=" in line
    assert tree.called() == []


# --- errors before the start


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_in_use_stops_the_start_at_once(make_server: MakeServer, workers: str) -> None:
    """Before torch is imported, one line names the port and both ways to choose another."""
    server = make_server(ANOMALY_WORKERS=workers, ANOMALY_DEVICE="none-such")
    with socket.create_server(("127.0.0.1", server.port)):
        line = refusal(server)
    assert f"port {server.port} is in use" in line
    assert "PORT=" in line
    assert "ANOMALY_PORT" in line


def test_the_probe_port_in_use_stops_the_start_at_once(make_server: MakeServer) -> None:
    """The line names its setting, and no option that sets the other port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(make_server(ANOMALY_PROBE_PORT=str(port), ANOMALY_DEVICE="none-such"))
    assert line.endswith(f"port {port} is in use; choose another with ANOMALY_PROBE_PORT")


def test_the_probe_port_is_another_port(make_server: MakeServer) -> None:
    """With the same port twice, the service does not start."""
    server = make_server()
    line = refusal(make_server(ANOMALY_PORT=str(server.port), ANOMALY_PROBE_PORT=str(server.port)))
    assert line.endswith(f"ANOMALY_PROBE_PORT: must not be the port {server.port} of ANOMALY_PORT")


def test_a_port_that_is_taken_while_models_load_stops_the_start(make_server: MakeServer) -> None:
    """If another process listens first, the line and the exit code are the same."""
    server = make_server()
    server.start(wait=False)
    assert server.process is not None
    maps = Path(f"/proc/{server.process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text())
    with socket.create_server(("127.0.0.1", server.port)):
        assert server.process.wait(60) == 2
    assert [line for line in server.log().splitlines() if not line.startswith("{")] == [
        f"cannot start: {listening.explain(OSError(98, ''), '', server.port)}"
    ]


@pytest.mark.parametrize(
    ("host", "words"),
    [("203.0.113.7", "this machine does not have the address '203.0.113.7'"), ("host.invalid", "is unknown")],
)
def test_an_address_of_another_machine_stops_the_start(make_server: MakeServer, host: str, words: str) -> None:
    """One line names the address and the setting."""
    line = refusal(make_server(ANOMALY_HOST=host))
    assert words in line
    assert "ANOMALY_HOST" in line


def _no_store(folder: Path) -> str:
    return "there is no model store"


def _an_empty_store(folder: Path) -> str:
    folder.mkdir()
    return "is empty"


def _no_models(folder: Path) -> str:
    (folder / "photos").mkdir(parents=True)
    return "contains no model"


@pytest.mark.parametrize("prepare", [_no_store, _an_empty_store, _no_models])
def test_nothing_to_serve_stops_the_start(
    make_server: MakeServer, tmp_path: Path, prepare: Callable[[Path], str]
) -> None:
    """One line has the absolute path, also of a relative setting, and the setting that allows the start."""
    words = prepare(tmp_path / "store")
    line = refusal(make_server(ANOMALY_MODEL_STORE=os.path.relpath(tmp_path / "store", ROOT)))
    assert words in line
    assert re.search(rf"(?<=\s)/\S*{re.escape(tmp_path.name)}/store\b", line)
    assert "ANOMALY_ALLOW_EMPTY=true" in line


def test_models_may_arrive_later_if_allowed(make_server: MakeServer, tmp_path: Path) -> None:
    """With ANOMALY_ALLOW_EMPTY the service starts unready, and serves a model once it is there."""
    store = tmp_path / "store"
    chosen = {"ANOMALY_MODEL_STORE": str(store), "ANOMALY_DEFAULT_MODEL": "zero-article", "ANOMALY_ALLOW_EMPTY": "true"}
    server = make_server(**chosen, ANOMALY_WATCH_SECONDS="0.1").start(wait=False)
    server.wait_ready("/livez")
    assert server.get("/readyz").status_code == 503
    model_stores.copy(store, 1)
    server.wait_ready()


def test_compose_and_the_volume_of_kubernetes_may_be_empty() -> None:
    """Where models are copied into a volume, the service starts without them."""
    for name in ("docker-compose.yml", "deploy/kubernetes/components/models-volume/kustomization.yaml"):
        assert re.search(r'ANOMALY_ALLOW_EMPTY(: |, value: )"true"', (ROOT / name).read_text()), name


@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_address_serves_ipv4_and_ipv6(make_server: MakeServer, workers: str) -> None:
    """ANOMALY_HOST=:: accepts both, with any number of workers."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    server = make_server(ANOMALY_HOST="::", ANOMALY_WORKERS=workers).start()
    for host in ("127.0.0.1", "[::1]"):
        assert httpx.get(f"http://{host}:{server.port}/livez", timeout=20).status_code == 200
    assert f'"url": "http://127.0.0.1:{server.port}"' in server.log()


def test_a_name_is_bound_on_each_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sockets of a name have the same port; an address that the machine lacks is left out."""
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
        for address in ("127.0.0.2", "203.0.113.7", "127.0.0.3")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    sockets = listening.bind("some-name", 0)
    names = [each.getsockname() for each in sockets]
    for each in sockets:
        each.close()
    assert [name[0] for name in names] == ["127.0.0.2", "127.0.0.3"]
    assert names[0][1] == names[1][1] != 0


def test_the_address_in_the_log_can_be_opened() -> None:
    """Wildcards become loopback, IPv6 has brackets."""
    assert [listening.url(host, 1) for host in ("0.0.0.0", "::", "::1", "localhost")] == [
        "http://127.0.0.1:1", "http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1",
    ]  # fmt: skip


def test_a_port_chosen_by_the_system_is_in_the_log(make_server: MakeServer, tmp_path: Path) -> None:
    """With port 0, the line of the start has the port that was chosen."""
    server = make_server(ANOMALY_PORT="0").start(wait=False)
    wait_for(lambda: '"event": "started"' in server.log())
    (line,) = [line for line in map(json.loads, server.log().splitlines()) if line["event"] == "started"]
    wait_for(lambda: httpx.get(f"{line['url']}/livez").status_code == 200)


def run_app(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m app` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments], cwd=ROOT, env={**os.environ, **variables}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip


def test_arguments_start_nothing() -> None:
    """`--help` prints the usage, which names the page of the settings; any other argument is one line, exit code 2."""
    for arguments in (("--help",), ("-h",), ("--port", "1", "--help")):
        done = run_app(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "docs/configuration.md" in done.stdout
    for arguments in (("--port", "8001"), ("serve",), ("",)):
        done = run_app(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert repr(arguments[0]) in done.stderr


def test_the_usage_has_the_defaults_of_the_settings() -> None:
    """Each variable that the usage names is a setting, with its default."""
    rows = re.findall(r"ANOMALY_(\w+) .*Default: (\S+)\.\n", run_app("--help").stdout)
    assert len(rows) == 4
    for name, default in rows:
        assert str(settings.Settings.model_fields[name.lower()].default) == default


def test_the_health_check_of_the_image_follows_the_port(make_server: MakeServer) -> None:
    """The command of HEALTHCHECK succeeds on the service's port and fails on another; other values mean 8000."""
    text = (ROOT / "Dockerfile").read_text()
    found = re.search(r"HEALTHCHECK [^\n]*\\\n +CMD (\[.*\])\n", text)
    assert found is not None
    _, *command = json.loads(found[1])
    server = make_server().start()
    for port, code in ((str(server.port), 0), ("1", 1), ("tcp://10.0.0.1:80", None)):
        done = subprocess.run(
            [sys.executable, *command], env={"ANOMALY_PORT": port}, capture_output=True, text=True, check=False
        )
        assert "ValueError" not in done.stderr
        assert code is None or done.returncode == code


# --- variables of Kubernetes

LINKS = {
    "ANOMALY_SERVICE_HOST": "10.0.0.1",
    "ANOMALY_SERVICE_PORT": "8000",
    "ANOMALY_SERVICE_PORT_HTTP": "8000",
    "ANOMALY_PORT": "tcp://10.0.0.1:8000",
    "ANOMALY_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "ANOMALY_PORT_8000_TCP_ADDR": "10.0.0.1",
    "ANOMALY_PORT_8000_TCP_PORT": "8000",
    "ANOMALY_PORT_8000_TCP_PROTO": "tcp",
    "ANOMALY_PROBE_PORT": "tcp://10.0.0.1:8001",
    "ANOMALY_API_SERVICE_HOST": "fd00::1",
    "ANOMALY_API_SERVICE_PORT": "80",
    "ANOMALY_API_PORT": "udp://[fd00::1]:53",
    "ANOMALY_API_PORT_53_UDP": "udp://[fd00::1]:53",
}


def test_variables_of_kubernetes_services_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of Kubernetes do not change settings; the operator's own port is used."""
    for name, value in LINKS.items():
        monkeypatch.setenv(name, value)
    assert settings.service_links() == sorted(LINKS)
    assert (settings.from_environment().port, settings.from_environment().probe_port) == (8000, None)
    monkeypatch.setenv("ANOMALY_PORT", "8001")
    assert settings.from_environment().port == 8001


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ANOMALY_API_PORT", "8000"),
        ("ANOMALY_SERVICE_HOSTS", "x"),
        ("ANOMALY_PORT_HTTP", "80"),
        ("ANOMALY_SERVICE", ""),
    ],
)
def test_other_variables_still_stop_the_start(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A variable that Kubernetes does not set is unknown as before, also next to those that it sets."""
    for known, content in {**LINKS, name: value}.items():
        monkeypatch.setenv(known, content)
    with pytest.raises(SettingsError, match=f"^unknown setting {name};"):
        settings.from_environment()


def test_ignored_variables_are_one_line_of_the_log(make_server: MakeServer) -> None:
    """One line lists them, also with several workers."""
    links = {name: value for name, value in LINKS.items() if name != "ANOMALY_PORT"}
    server = make_server(**links, ANOMALY_WORKERS="2").start()
    lines = [json.loads(line) for line in server.log().splitlines()]
    assert [line["variables"] for line in lines if "variables" in line] == [sorted(links)]


# --- a clone with core.autocrlf=true


def test_a_clone_with_crlf_has_the_same_bytes(tmp_path: Path) -> None:
    """With core.autocrlf=true, scripts parse, and each shipped version has the digests of its manifest."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
    for arguments in (("init", "-q"), ("add", "-A"), ("commit", "-q", "--no-verify", "-m", "x")):
        subprocess.run([*git, *arguments], cwd=source, check=True)
    clone = tmp_path / "clone"
    subprocess.run(["git", "-c", "core.autocrlf=true", "clone", "-q", str(source), str(clone)], check=True)
    scripts = 0
    for path in clone.rglob("*"):
        if path.is_file() and ".git" not in path.relative_to(clone).parts:
            content = path.read_bytes()
            name = path.relative_to(clone)
            assert content == (source / name).read_bytes(), name
            shell = re.match(rb"#!.*\b(ba)?sh\b", content)
            if shell:
                scripts += 1
                subprocess.run([shell[0].split()[-1].rpartition(b"/")[2].decode(), "-n", path], check=True)
    assert scripts >= 5
    repository = Repository(clone / "model_store")
    for model in ("zero", "zero-article"):
        manifest = repository.open(model, 1).manifest
        for file in manifest.files:
            repository.read(manifest, file)


# --- the log


def test_every_line_of_the_log_has_the_same_schema(make_server: MakeServer, zero: bytes) -> None:
    """Requests and events begin with time, level, event and logger; the time is ISO 8601 with milliseconds."""
    server = make_server().start()
    server.post("/score", content=zero, headers={**PNG, "x-request-id": "find-me"})
    server.stop()
    lines = [json.loads(line) for line in server.log().splitlines()]
    for line in lines:
        assert list(line)[:4] == ["time", "level", "event", "logger"]
        assert ISO.fullmatch(line["time"]), line
    (scored,) = [line for line in lines if line["event"] == "request"]
    assert (scored["level"], scored["logger"], scored["request_id"]) == ("info", "app.access", "find-me")
    assert {"version serves", "started", "stopped"} <= {line["event"] for line in lines}
    (started,) = [line for line in lines if line["event"] == "started"]
    assert started["url"] == server.url


async def test_the_time_of_a_request_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The access log's own time format equals that of log records, also when the second changes."""
    reads, writes = os.pipe()
    log = AccessLog(LineWriter(writes))
    times = [1764352799.0, 1764352799.0005, 1764352799.9994, 1764352800.25, 1764438000.75]
    for seconds in times:
        with monkeypatch.context() as context:
            context.setattr(time, "time", lambda now=seconds: now)
            log.write({"n": 1})
    log.flush()
    await asyncio.sleep(0.06)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        lines = [json.loads(line) for line in pipe]
    assert [line["time"] for line in lines] == [iso_time(seconds) for seconds in times]
    assert lines[0]["time"] == "2025-11-28T17:59:59.000Z"


class Terminal:
    """A pseudo-terminal as standard output of a service."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        os.set_blocking(self._master, False)
        self._text = b""

    def text(self) -> str:
        """Return the output so far."""
        try:
            while chunk := os.read(self._master, 65536):
                self._text += chunk
        except OSError:
            pass
        return self._text.decode()

    def close(self) -> None:
        """Close both ends."""
        os.close(self._master)
        os.close(self.slave)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """Yield a pseudo-terminal."""
    opened = Terminal()
    yield opened
    opened.close()


def test_a_terminal_gets_readable_lines(make_server: MakeServer, terminal: Terminal, zero: bytes) -> None:
    """On a terminal, the start has an address to click, requests are one short line, and nothing is JSON."""
    server = make_server(TERM="xterm", NO_COLOR="").start(output=terminal.slave)
    server.post("/score", content=zero, headers=PNG)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0
    shown = terminal.text()
    plain = re.sub(r"\x1b\[\d*m", "", shown)
    assert shown != plain
    assert re.search(rf"(?m)^\d\d:\d\d:\d\d\.\d{{3}} started {server.url} ", plain)
    assert re.search(r"(?m)^\d\d:\d\d:\d\d\.\d{3} 200 POST /score \d+\.\d ms model=zero ", plain)
    assert plain.rstrip().endswith("stopped")
    assert "{" not in plain
    assert server.log() == ""


@pytest.mark.parametrize(("log_format", "is_json"), [("json", True), ("text", False)])
def test_the_format_can_be_chosen(make_server: MakeServer, terminal: Terminal, log_format: str, is_json: bool) -> None:
    """`json` is JSON also on a terminal; `text` has no colours without a terminal."""
    server = make_server(ANOMALY_LOG_FORMAT=log_format)
    server.start(output=terminal.slave if is_json else None)
    server.get("/models")
    server.stop()
    text = terminal.text() if is_json else server.log()
    lines = text.splitlines()
    assert len(lines) >= 3
    assert "\x1b" not in text
    assert [line.startswith("{") for line in lines] == [is_json] * len(lines)


def test_text_escapes_control_characters() -> None:
    """A value with control characters cannot change the terminal or begin a line."""
    line = TextRenderer(colors=False)({"time": "", "level": "error", "event": "a\x1b[2Jb", "logger": "x", "n": "1\n2"})
    assert line == b' error "a\\u001b[2Jb" n="1\\n2"'
    assert issubclass(JsonFormatter, RecordFormatter)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_closed_standard_output_prints_no_traceback(make_server: MakeServer, workers: str, zero: bytes) -> None:
    """If the reader of the log closes the pipe, as `head` does, lines are lost, and the service continues."""
    server = make_server(ANOMALY_WORKERS=workers)
    reads, writes = os.pipe()
    server.start(wait=False, output=writes)
    os.close(writes)
    os.close(reads)
    server.wait_ready()
    assert server.post("/score", content=zero, headers=PNG, timeout=20).status_code == 200
    assert server.stop() == 0
    assert server.log() == ""


def test_without_standard_output_the_log_goes_into_no_file(make_server: MakeServer, zero: bytes) -> None:
    """If descriptor 1 is closed at the start, no file of the service, such as its database, takes its place."""
    server = make_server().start(prefix=["sh", "-c", 'exec "$@" >&-', "sh"])
    assert server.post("/score", content=zero, headers=PNG, timeout=20).json()["id"] is not None
    assert server.process is not None
    assert Path(f"/proc/{server.process.pid}/fd/1").readlink() == Path("/dev/null")
    server.stop()
    assert server.log() == ""


# --- the folder of the metrics


def test_the_metrics_folder_of_a_killed_supervisor_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start removes the folder of a process that was killed, and leaves that of a running one."""
    code = "from app.process import make_metrics_folder as make; print(make(), flush=True); input()"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    folders = []
    for each in started:
        assert each.stdout is not None
        folders.append(Path(each.stdout.readline().strip()))
    assert all(folder.is_dir() for folder in folders)
    (folders[0] / "gauge_1.db").write_bytes(b"x")
    started[0].kill()
    started[0].wait(10)
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path))
    mine = Path(process.make_metrics_folder())
    assert sorted(tmp_path.iterdir()) == sorted([folders[1], mine])
    started[1].kill()
    for each in started:
        each.communicate()


@pytest.mark.long
@pytest.mark.parametrize(("workers", "stuck"), [("1", False), ("1", True), ("2", True)])
def test_a_failed_start_of_the_application_is_exit_code_2(
    make_server: MakeServer, tmp_path: Path, workers: str, stuck: bool
) -> None:
    """If loading the models fails for a reason that no check foresees, the process ends with 2, and logs the error.

    A supervisor sees the end of its workers at once, not after the 15 s that a worker has for a reply.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "from app.inference.registry import Registry\n"
        "async def start(self):\n    raise OSError\n"
        "async def aclose(self, timeout=None):\n    return False\n"
        f"Registry.start = start\nif {stuck}:\n    Registry.aclose = aclose\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    server = make_server(ANOMALY_WORKERS=workers, PYTHONPATH=path).start(wait=False)
    assert server.process is not None
    assert server.process.wait(60) == process.EXIT_CANNOT_START
    assert "the service failed to start or to stop" in server.log()
    if workers == "2":
        times = {
            line["event"]: datetime.fromisoformat(line["time"]) for line in map(json.loads, server.log().splitlines())
        }
        seen = times["the first workers cannot start"] - times["Application startup failed. Exiting."]
        assert seen.total_seconds() < 12
