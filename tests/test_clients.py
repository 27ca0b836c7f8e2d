"""Common HTTP clients, each in a separate process, get the same score from `POST /score` by the fast path."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from app.http.middleware import RequestMiddleware
from app.http.server import ServerProtocol
from app.main import create_app
from app.settings import Settings
from tests.conftest import EXAMPLES, ROOT, TRUSTS_NOBODY, lifespan

COUNT = 200
"""Number of requests per client."""
FAST_SHARE = 0.95
"""Minimum share of the requests of each client that the fast path must serve."""
ZERO = EXAMPLES / "zero.png"


@dataclass
class Service:
    """A service with real connections.

    Attributes:
        url: its address.
        fast: number of requests that the fast path has served.
    """

    url: str
    fast: int = 0


@asynccontextmanager
async def serving(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    """Run a service in this process, and count the requests on its fast path."""
    app = create_app(settings)
    config, state = uvicorn.Config(app, lifespan="off", log_config=None, proxy_headers=False), ServerState()
    config.load()
    service, begin = Service(""), RequestMiddleware.begin

    def counted(self: RequestMiddleware, *given: Any) -> Any:
        future = begin(self, *given)
        service.fast += future is not None
        return future

    monkeypatch.setattr(RequestMiddleware, "begin", counted)
    async with lifespan(app):
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: ServerProtocol(config, state, {}), "127.0.0.1", 0)
        service.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield service
        server.close()
        for connection in state.connections.copy():
            connection.transport.abort()  # type: ignore[union-attr]
        await server.wait_closed()


def curl(*body: str) -> Callable[[str], list[str]]:
    """Return the command that sends every request with curl, on one connection."""
    return lambda url: ["curl", "--silent", "--show-error", "--write-out", r"\n", *body, *[f"{url}/score"] * COUNT]


def python(code: str) -> Callable[[str], list[str]]:
    """Return the command that runs a Python program; it gets the address and the number of requests."""
    start = "import sys, pathlib\nurl, count = sys.argv[1], int(sys.argv[2])\npng = pathlib.Path(sys.argv[3])\n"
    return lambda url: [sys.executable, "-c", start + code, url, str(COUNT), str(ZERO)]


def node(body: str) -> Callable[[str], list[str]]:
    """Return the command that sends every request with Node's `fetch`; `body` creates the options of one request."""
    code = f"""
const [url, count, path] = process.argv.slice(1);
const png = require('fs').readFileSync(path);
(async () => {{
  for (let n = 0; n < Number(count); n++) {{
    const reply = await fetch(url + '/score', {{method: 'POST', ...{body}}});
    console.log(await reply.text());
  }}
}})();
"""
    return lambda url: ["node", "-e", code, url, str(COUNT), str(ZERO)]


FORM_OF_NODE = """
(() => {
  const body = new FormData();
  body.append('file', new Blob([png]), 'zero.png');
  return {body};
})()
"""
REQUESTS = """
import requests
with requests.Session() as session:
    for _ in range(count):
        print(session.post(url + "/score", %s).text)
"""
HTTPX = """
import httpx
with httpx.Client() as client:
    for _ in range(count):
        print(client.post(url + "/score", %s).text)
"""
HTTPX_ASYNC = """
import asyncio, httpx
async def main():
    async with httpx.AsyncClient() as client:
        for _ in range(count):
            print((await client.post(url + "/score", %s)).text)
asyncio.run(main())
"""
OUR_CLIENT = """
import json
from anomaly import Client
with Client(url) as client:
    for _ in range(count):
        print(json.dumps({"mse": client.score(png).mse}))
"""
OUR_ASYNC_CLIENT = """
import asyncio, json
from anomaly import AsyncClient
async def main():
    async with AsyncClient(url) as client:
        for _ in range(count):
            print(json.dumps({"mse": (await client.score(png)).mse}))
asyncio.run(main())
"""
RAW = 'headers={"content-type": "image/png"}, %s=png.read_bytes()'
FILES = 'files={"file": png.open("rb")}'
CLIENTS: dict[str, Callable[[str], list[str]]] = {
    "curl form": curl("-F", f"file=@{ZERO}"),
    "curl raw": curl("-H", "Content-Type: image/png", "--data-binary", f"@{ZERO}"),
    "requests form": python(REQUESTS % FILES),
    "requests raw": python(REQUESTS % (RAW % "data")),
    "httpx form": python(HTTPX % FILES),
    "httpx raw": python(HTTPX % (RAW % "content")),
    "httpx async form": python(HTTPX_ASYNC % 'files={"file": png.read_bytes()}'),
    "httpx async raw": python(HTTPX_ASYNC % (RAW % "content")),
    "Client": python(OUR_CLIENT),
    "AsyncClient": python(OUR_ASYNC_CLIENT),
    "Node fetch form": node(FORM_OF_NODE),
    "Node fetch raw": node("{headers: {'content-type': 'image/png'}, body: png}"),
}


def missing(client: str) -> str:
    """Return the program or package that a client needs and that is not installed; empty if nothing is missing."""
    program = client.partition(" ")[0].lower()
    if program in ("curl", "node"):
        return "" if shutil.which(program) else program
    return "requests" if program == "requests" and importlib.util.find_spec("requests") is None else ""


async def scores(command: list[str]) -> list[float]:
    """Run a client, and return the score of each of its replies."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANOMALY_")}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(120):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    return [json.loads(line)["mse"] for line in output.decode().splitlines() if line]


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_gets_the_right_score_by_the_fast_path(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, zero: bytes, client: str
) -> None:
    """Every reply has the same mse as a plain request, and the fast path serves at least 95 % of the requests."""
    if needed := missing(client):
        pytest.skip(f"{needed} is not installed")
    async with serving(make_settings(), monkeypatch) as service:
        async with httpx.AsyncClient(verify=TRUSTS_NOBODY) as plain:
            reply = await plain.post(f"{service.url}/score", content=zero, headers={"content-type": "image/png"})
        before = service.fast
        found = await scores(CLIENTS[client](service.url))
        assert len(found) == COUNT
        assert set(found) == {reply.json()["mse"]}
        assert service.fast - before >= FAST_SHARE * COUNT
