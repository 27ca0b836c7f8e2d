"""The shipped configuration of the gateway in a HAProxy of this machine, in front of one server process."""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.conftest import ROOT, free_port
from tests.waiting import wait_until

GATEWAY = ROOT / "deploy" / "gateway"
KEY = "trial-key"


@dataclass(frozen=True)
class Gateway:
    """A running gateway.

    Attributes:
        url: its address.
        certificate: the file of its own certificate.
    """

    url: str
    certificate: Path

    def client(self, key: str = KEY) -> httpx.Client:
        """Return a client of the gateway."""
        headers = {"x-api-key": key} if key else {}
        context = ssl.create_default_context(cafile=self.certificate)
        return httpx.Client(base_url=self.url, verify=context, headers=headers)


def write_keys(folder: Path) -> Path:
    """Write the file of API keys with the one trial key, and return its path."""
    path = folder / "api_keys"
    path.write_text(f"{hashlib.sha256(KEY.encode()).hexdigest()} trial\n")
    return path


def _configuration(folder: Path, port: int, metrics: int, server: int, limits: dict[str, str]) -> str:
    """Return the shipped configuration, with addresses and files of this machine in place of those of the container."""
    text = (GATEWAY / "haproxy.cfg").read_text()
    for pattern, replacement in (
        (r"^program keys\n    command start watch\n", ""),
        (r"^    (stats socket|server-state-file|load-server-state-from-file) .*\n", ""),
        (r"bind :8443 ssl crt \S+", f"bind 127.0.0.1:{port} ssl crt {folder}/tls.pem"),
        (r"bind :8405", f"bind 127.0.0.1:{metrics}"),
        (r"/run/keys/api_keys", f"{folder}/api_keys"),
        (r"^resolvers docker\n(    .*\n)+", ""),
        (r" resolvers docker init-addr last,none", ""),
        (r"server-template replica 16 api:8000", f"server replica1 127.0.0.1:{server}"),
        (r'"\$\{(\w+)\}"', lambda found: limits[found[1]]),
    ):
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        assert count, f"the gateway's configuration does not contain {pattern}"
    return text


@contextmanager
def running_gateway(folder: Path, server: int, *, metrics: int | None = None, **limits: str) -> Iterator[Gateway]:
    """Run HAProxy inside the block, with a certificate of its own.

    Args:
        folder: contains `api_keys`, and gets configuration, certificate and log.
        server: port of the service.
        metrics: port of the gateway's metrics. Default: a free one.
        limits: replacements of the image's limits.
    """
    tls, port = folder / "tls.pem", free_port()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", str(tls), "-out", str(folder / "certificate.pem"), "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    with tls.open("a") as file:
        file.write((folder / "certificate.pem").read_text())
    chosen = {**dict(re.findall(r"\b([A-Z_]+)=(\d+)", (GATEWAY / "Dockerfile").read_text())), **limits}
    configuration = folder / "haproxy.cfg"
    configuration.write_text(_configuration(folder, port, metrics or free_port(), server, chosen))
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            ["haproxy", "-db", "-f", configuration], stdout=log, stderr=log, env={**os.environ, **chosen}
        )
        gateway = Gateway(f"https://localhost:{port}", folder / "certificate.pem")
        try:
            with gateway.client() as client:

                def passes() -> bool:
                    assert process.poll() is None, (folder / "gateway.log").read_text()
                    try:
                        return client.get("/v2").status_code == 200
                    except httpx.TransportError:
                        return False

                wait_until(passes)
            yield gateway
        finally:
            process.kill()
            process.wait(10)
