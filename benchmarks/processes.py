"""Server processes and what they cost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """Return a port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running server."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    start_seconds: float

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        """Return user and system time of the process and its children so far."""
        times = [process.cpu_times() for process in self._tree()]
        return sum(each.user + each.system for each in times)

    def memory_mb(self) -> tuple[float, float]:
        """Return RSS and PSS in MB: shared pages count fully in the first, by their share in the second."""
        found = [process.memory_full_info() for process in self._tree()]
        return sum(each.rss for each in found) / 1e6, sum(each.pss for each in found) / 1e6

    def stop(self) -> None:
        """End it and wait."""
        self.process.terminate()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _tree(self) -> list[psutil.Process]:
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]


def start(name: str, command: list[str], folder: Path, port: int, ready: str, **environment: str) -> Server:
    """Start a server and wait until `ready` answers anything below 500.

    Raises:
        RuntimeError: it did not come up within a minute.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("ANOMALY_")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    began = time.perf_counter()
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)
    while time.perf_counter() - began < 60 and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}{ready}", timeout=5).status_code < 500:
                return Server(name, port, process, time.perf_counter() - began)
        except httpx.TransportError:
            time.sleep(0.02)  # a refused connection does not tell the client when to retry
    process.kill()
    raise RuntimeError(f"{name} did not start:\n{log.read_text()[-2000:]}")


def service(folder: Path, name: str = "service", command: Sequence[str] = ("app",), **settings: str) -> Server:
    """Start the service with its SQLite store in `folder`, as `make serve` does; its log goes to a file there.

    BENCH_DEVICE names its device; the CPU where it is not set. `command` is the module to run, with its arguments.
    """
    port = free_port()
    chosen = {
        "ANOMALY_PORT": str(port),
        "ANOMALY_DEVICE": os.environ.get("BENCH_DEVICE", "cpu"),
        "ANOMALY_STORE_URL": f"sqlite:///{folder}/{name}.db",
        **settings,
    }
    return start(name, [sys.executable, "-m", *command], folder, port, "/readyz", **chosen)


def peer(name: str, folder: Path, **environment: str) -> Server:
    """Start one of `benchmarks.servers` on uvicorn, configured as the service configures it."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", f"benchmarks.servers:{name}", "--port", str(port)]
    command += ["--no-access-log", "--no-server-header", "--no-date-header", "--log-level", "error"]
    return start(name, command, folder, port, "/", **environment)
