"""The gateway as a process: HAProxy with the shipped configuration, in front of a service on this machine."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, free_port
from tests.waiting import wait_until

GATEWAY = ROOT / "deploy" / "gateway"
LIMITS = dict(re.findall(r"\b([A-Z_]+)=(\d+)", (GATEWAY / "Dockerfile").read_text()))
"""The limits of the image."""


class Gateway:
    """HAProxy with deploy/gateway/haproxy.cfg. Paths, ports and the addresses of the replicas are those of the test.

    Args:
        folder: made by `make_secrets`; gets its configuration.
        port: the port of the service.
        key: the API key that its clients send.
        limits: environment variables that differ from those of the image.

    Attributes:
        metrics_port: port of its metrics and of its health check.
    """

    def __init__(self, folder: Path, port: int, key: str, **limits: str) -> None:
        self.folder = folder
        self.port, health, control = free_port(), free_port(), free_port()
        self.url = f"https://localhost:{self.port}"
        self.key = key
        self.keys = folder / "keys" / "api_keys"
        self.certificate = folder / "certificate.pem"
        self.context = ssl.create_default_context(cafile=self.certificate)
        self.metrics_port = health
        self._environment = {"PATH": "/usr/sbin:/usr/bin:/bin", "CORS_ORIGINS": "none", **LIMITS, **limits}
        text = (GATEWAY / "haproxy.cfg").read_text()
        for shipped, own in (
            ("/tmp/", f"{folder}/"),  # first: the folder itself may be in /tmp
            ("bind :8443", f"bind 127.0.0.1:{self.port}"),
            ("bind :8405", f"bind 127.0.0.1:{health}"),
            ("ipv4@127.0.0.1:8406", f"ipv4@127.0.0.1:{control}"),
            ("/run/tls/tls.pem", f"{folder}/tls/tls.pem"),
            ("/run/keys/api_keys", str(self.keys)),
            ("program keys\n    command start watch\n", ""),
            (" resolvers docker init-addr last,none", ""),
            ("server-template replica 16 api:8000", f"server replica1 127.0.0.1:{port}"),
        ):
            assert shipped in text, f"haproxy.cfg has no {shipped!r}"
            text = text.replace(shipped, own)
        self._configuration = folder / "haproxy.cfg"
        self._configuration.write_text(text)
        self._process: subprocess.Popen[bytes] | None = None

    def check(self) -> str:
        """Return HAProxy's errors in the configuration; empty if it is valid."""
        done = subprocess.run(
            ["haproxy", "-c", "-f", self._configuration], env=self._environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        return done.stderr if done.returncode else ""

    def start(self) -> Gateway:
        """Start the process, and return when it has found the service ready."""
        with (self.folder / "haproxy.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["haproxy", "-db", "-f", self._configuration], env=self._environment, stdout=log, stderr=log
            )
        wait_until(self._is_up, 30, describe=self.log)
        return self

    def log(self) -> str:
        """Return the output of the process so far."""
        return (self.folder / "haproxy.log").read_text()

    def logged_name(self, request_id: str) -> str | None:
        """Return the name of the key of a request, from the log; None if its key was rejected."""
        lines: list[str] = []

        def find() -> list[str]:
            lines[:] = [line for line in self.log().splitlines() if f'"request_id":"{request_id}"' in line]
            return lines

        wait_until(find, describe=self.log)
        name = str(json.loads(lines[0])["key_name"])
        return name if name != "-" else None

    def client(self, **options: object) -> httpx.Client:
        """Return a client that trusts the certificate and sends the key."""
        return httpx.Client(base_url=self.url, verify=self.context, headers={"x-api-key": self.key}, **options)  # type: ignore[arg-type]

    def connect(self, timeout: float = 10) -> ssl.SSLSocket:
        """Open a TLS connection for requests written by hand."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout)
        return self.context.wrap_socket(plain, server_hostname="localhost")

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def _is_up(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.log()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self.metrics_port}/up", trust_env=False).status_code == 200
        return False


def make_secrets(folder: Path) -> str:
    """Make a certificate and a file with one API key, and return the key."""
    environment = {"PATH": "/usr/bin:/bin", "SECRETS": str(folder)}
    command = [ROOT / "deploy" / "secrets"]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return made.stdout.strip().rpartition(" ")[2]


@contextlib.contextmanager
def gateway(folder: Path, port: int, key: str, **limits: str) -> Iterator[Gateway]:
    """Run a gateway before the service on `port`, or skip the test if HAProxy is not installed."""
    if shutil.which("haproxy", path="/usr/sbin:/usr/bin:/bin") is None:
        pytest.skip("haproxy is not installed")
    created = Gateway(folder, port, key, **limits)
    try:
        yield created.start()
    finally:
        created.stop()
