"""The shipped stack on a real engine: building it, talking to it from outside, putting load on it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import EXAMPLES
from tests.containers.images import run
from tests.waiting import wait_until

CONNECTIONS = 16
PNG = {"content-type": "image/png"}
PROJECT = "anomaly-test"
BATCH_MAX_BYTES = 4 << 20
TRAIN = ("-p", f"{PROJECT}-train", "--profile", "train", "run", "--rm", "-T")
SCAN = """
import errno, json, select, socket, sys, time

targets = [(host, port) for host, ports in json.loads(sys.argv[1]) for port in (ports or range(1, 65536))]
found = []
while targets:
    poll, waiting, end = select.poll(), {}, time.monotonic() + 1
    for target in targets[:500]:
        probe = socket.socket()
        probe.setblocking(False)
        if probe.connect_ex(target) in (0, errno.EINPROGRESS):
            waiting[probe.fileno()] = probe, target
            poll.register(probe, select.POLLOUT)
    del targets[:500]
    while waiting and time.monotonic() < end:
        for number, _ in poll.poll(100):
            probe, target = waiting.pop(number)
            poll.unregister(number)
            if probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                found.append(target)
print(json.dumps(found))
"""
"""Prints which of the targets [address, ports] accept a connection; no ports means all."""


@dataclass
class Load:
    """The results of the requests during one fault: the number sent, the failures, the times of replies without id."""

    sent: int = 0
    failures: list[str] = field(default_factory=list)
    without_id: list[float] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)


class Logs:
    """Follows the log of every container of the project from its start, so that removing it loses nothing.

    Args:
        docker: the engine's command.
        folder: gets one file for each start of a container.
    """

    def __init__(self, docker: str, folder: Path) -> None:
        self._docker = docker
        self.folder = folder
        folder.mkdir()
        chosen = ("--filter", "event=start", "--filter", f"label=com.docker.compose.project={PROJECT}")
        shown = '{{.Actor.ID}} {{index .Actor.Attributes "com.docker.compose.service"}}'
        since = ("--since", str(int(time.time())))
        self._events = subprocess.Popen(
            (docker, "events", *since, *chosen, "--format", shown), stdout=subprocess.PIPE, text=True
        )
        self._followers: list[subprocess.Popen[bytes]] = []
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        assert self._events.stdout is not None
        for number, line in enumerate(self._events.stdout):
            container, service = line.split()
            with (self.folder / f"{service}.{number}.log").open("wb") as log:
                command = (self._docker, "logs", "--follow", container)
                self._followers.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    def texts(self) -> dict[str, str]:
        """Return the logs so far, by `<service>.<number>.log`."""
        return {path.name: path.read_text(errors="replace") for path in sorted(self.folder.iterdir())}

    def close(self) -> None:
        """Stop following."""
        self._events.terminate()
        self._thread.join(10)
        for process in (self._events, *self._followers):
            process.terminate()
            process.wait(10)
        assert self._events.stdout is not None
        self._events.stdout.close()


class Stack:
    """One running copy of docker-compose.yml.

    Args:
        folder: where its secrets are made.
        port: the one port that it publishes.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.docker = os.environ["DOCKER"]
        self.port = port
        self.secrets = folder / "secrets"
        self.environment = {
            "SECRETS": str(self.secrets),
            "GATEWAY_PORT": str(port),
            "COMPOSE_PROJECT_NAME": PROJECT,
            "RATE_PER_KEY": "1000000",
            "RATE_PER_ADDRESS": "1000000",
            "BATCH_MAX_BYTES": str(BATCH_MAX_BYTES),
        }
        self.key = self.secret_tool()
        self.written = Logs(self.docker, folder / "logs")

    def secret_tool(self, *arguments: str) -> str:
        """Run deploy/secrets and return the API key that it shows."""
        said = run("deploy/secrets", *arguments, SECRETS=str(self.secrets)).stdout
        return said.strip().rpartition(" ")[2]

    def compose(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `docker compose`."""
        return run(self.docker, "compose", *arguments, **{**self.environment, **environment})

    def up(self, *arguments: str, **environment: str) -> None:
        """Run `docker compose up` and return when all that it started is healthy."""
        options = ("-d", "--no-build", "--pull", "never", "--wait", "--wait-timeout", "120")
        self.compose("up", *options, *arguments, **environment)

    def inside(self, program: str, *arguments: str) -> str:
        """Run a Python program in one of the replicas, which is inside the stack's network, and return its output."""
        return self.execute(self.containers("api")[0], "python", "-c", program, *arguments)

    def containers(self, service: str) -> list[str]:
        """Return the ids of the running containers of a service."""
        return self.compose("ps", "-q", service).stdout.split()

    def inspect(self, name: str) -> dict[str, Any]:
        """Return the engine's description of a container or image."""
        return json.loads(run(self.docker, "inspect", name).stdout)[0]

    def execute(self, container: str, *command: str, check: bool = True) -> str:
        """Run a command inside a container and return its output."""
        done = run(self.docker, "exec", container, *command, check=check)
        return done.stdout + done.stderr

    def logs(self, container: str) -> str:
        """Return the output of a container."""
        done = run(self.docker, "logs", container)
        return done.stdout + done.stderr

    def logged(self, service: str, text: str) -> str:
        """Return the first line with `text` in the logs of a service; it may be written a moment after the reply."""
        found: list[str] = []

        def look() -> bool:
            for name, written in self.written.texts().items():
                if name.startswith(f"{service}."):
                    found.extend(line for line in written.splitlines() if text in line)
            return bool(found)

        wait_until(look, describe=lambda: f"no line of {service} contains {text!r}")
        return found[0]

    def connect(self, timeout: float = 30) -> http.client.HTTPSConnection:
        """Open a TLS connection to the gateway that trusts the trial certificate and nothing else."""
        context = ssl.create_default_context(cafile=str(self.secrets / "certificate.pem"))
        return http.client.HTTPSConnection("localhost", self.port, context=context, timeout=timeout)

    def ask(
        self, method: str, path: str, body: Any = None, key: str | None = "", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request through the gateway; `key` None sends no key. Returns status, headers and body."""
        connection = self.connect()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            sent["x-api-key"] = key or self.key
        try:
            # A rejection may arrive before the body is sent, and the gateway then closes the connection.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
                connection.request(method, path, body, sent)
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def score(self, **headers: str) -> tuple[int, dict[str, str], Any]:
        """Score the shipped zero through the gateway."""
        status, given, body = self.ask("POST", "/score", (EXAMPLES / "zero.png").read_bytes(), **{**PNG_, **headers})
        return status, given, json.loads(body)

    def readiness(self, container: str, times: int = 1) -> list[tuple[int, dict[str, Any]]]:
        """Return the replies to several requests of /readyz from inside a replica, 0.1 s apart."""
        # The pauses spread the requests over time, so that a state that changes between them is visible.
        program = (
            "import http.client as h, json, sys, time\n"
            "for _ in range(int(sys.argv[1])):\n"
            "    c = h.HTTPConnection('127.0.0.1', 8000); c.request('GET', '/readyz'); r = c.getresponse()\n"
            "    print(json.dumps([r.status, json.loads(r.read())])); time.sleep(0.1)"
        )
        said = self.execute(container, "python", "-c", program, str(times))
        return [(status, state) for status, state in map(json.loads, said.splitlines())]

    @contextlib.contextmanager
    def under_load(self, before: float = 1.5, after: float = 2.0) -> Iterator[Load]:
        """Keep 16 connections busy with scores around a block. A failure: no connection, no answer, or not 200."""
        load, lock, stop = Load(), threading.Lock(), threading.Event()
        image = (EXAMPLES / "zero.png").read_bytes()

        def client() -> None:
            connection = self.connect()
            while not stop.is_set():
                began = time.monotonic()
                try:
                    connection.request("POST", "/score", image, {**PNG, "x-api-key": self.key})
                    response = connection.getresponse()
                    body, problem = response.read(), None if response.status == 200 else f"status {response.status}"
                    if response.getheader("connection") == "close":
                        connection.close()
                except (OSError, http.client.HTTPException) as error:
                    body, problem = b"{}", f"{type(error).__name__}: {error}"
                    connection.close()
                reply = json.loads(body)
                with lock:
                    load.sent += 1
                    load.seconds.append(time.monotonic() - began)
                    if problem is not None:
                        load.failures.append(problem)
                    elif reply["id"] is None:
                        load.without_id.append(time.monotonic())
                    else:
                        load.ids.append(reply["id"])
                        load.versions.add(reply["version"])
            connection.close()

        threads = [threading.Thread(target=client) for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        try:
            time.sleep(before)  # the load must run for a while before the fault
            yield load
            time.sleep(after)  # include later effects of the fault: a deadline is 2 s
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)


PNG_ = {"content_type": "image/png"}
