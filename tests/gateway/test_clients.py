"""Real clients get the same scores from `/score` and `/score/batch`, straight and through the gateway."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES
from tests.gateway.conftest import Both
from tests.gateway.recorded import RECORDED, exchange

PROGRAMS = Path(__file__).parent / "programs"
ZERO = EXAMPLES / "zero.png"
COMMANDS = {
    "curl": ["sh", "with_curl.sh"],
    "requests": [sys.executable, "with_requests.py"],
    "httpx": [sys.executable, "with_httpx.py"],
    "aiohttp": [sys.executable, "with_aiohttp.py"],
    "fetch": ["node", "with_fetch.mjs"],
    "axios": ["node", "with_axios.mjs"],
    "java": ["java", "-XX:TieredStopAtLevel=1", "WithJava.java"],
}


@pytest.fixture(scope="session")
def expected(both: Both) -> float:
    """Return the score of the image by a plain request."""
    headers = {"content-type": "image/png", "x-api-key": both.key}
    reply = both.service.post("/score", content=ZERO.read_bytes(), headers=headers)
    assert reply.status_code == 200
    score: float = reply.json()["mse"]
    return score


def skip_without(client: str) -> None:
    """Skip the test if its program or package is not installed; install the npm packages of the lock file."""
    program = {"fetch": "node", "axios": "npm"}.get(client, client)
    found = importlib.util.find_spec(program) if program in ("requests", "httpx", "aiohttp") else shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    if client == "java" and shutil.which("javac") is None:
        pytest.skip("java runs a source file only with the compiler of a JDK")
    if client == "axios":
        # One of several test processes installs: `npm ci` first removes the files that the others read.
        with (PROGRAMS / "package-lock.json").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (PROGRAMS / "node_modules" / ".package-lock.json").exists():
                command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
                subprocess.run(command, cwd=PROGRAMS, check=True, timeout=120)


def check_replies(texts: list[str], expected: float) -> None:
    """Assert that replies come in groups of three, raw, form with a field, and batch, and have one score."""
    assert len(texts) % 3 == 0
    for raw, form, batch in zip(texts[::3], texts[1::3], texts[2::3], strict=True):
        assert json.loads(raw)["mse"] == expected, raw
        assert json.loads(form)["mse"] == expected, form
        assert json.loads(form)["alpha"] == 0.05
        assert [item["mse"] for item in json.loads(batch)["items"]] == [expected, expected], batch


@pytest.mark.parametrize("client", COMMANDS)
def test_a_client_gets_the_same_scores_everywhere(both: Both, expected: float, client: str) -> None:
    """Raw body, form with a parameter, and batch form: straight and through the gateway, which is TLS and HTTP/2."""
    skip_without(client)
    urls = [both.service.url, both.gateway.url]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANOMALY_")}
    environment["NODE_EXTRA_CA_CERTS"] = environment["REQUESTS_CA_BUNDLE"] = str(both.gateway.certificate)
    done = subprocess.run(
        [*COMMANDS[client], str(ZERO), both.key, str(both.gateway.certificate), *urls],
        cwd=PROGRAMS, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split("\n")[:-1]
    assert len(texts) == (12 if client == "java" else 6)
    check_replies(texts, expected)


@pytest.mark.parametrize("client", RECORDED)
def test_recorded_bytes_get_the_same_scores_everywhere(both: Both, expected: float, client: str) -> None:
    """Requests with the bytes of clients whose runtime is not needed: heads, forms and chunks of .NET and Go."""
    requests = RECORDED[client](ZERO.read_bytes(), both.key)
    texts = []
    for gateway in (False, True):
        for request in requests:
            head, body = exchange(both, request, gateway=gateway)
            assert head.startswith(b"HTTP/1.1 200 "), head + body
            texts.append(body.decode())
    check_replies(texts, expected)
