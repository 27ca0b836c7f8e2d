"""openapi-python-client and openapi-typescript generate clients from the OpenAPI document that compile and score."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import EXAMPLES, Server, interop

HERE = Path(__file__).parent
BIN = Path(sys.prefix) / "openapi" / "bin"
SIX = EXAMPLES / "six.png"


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """Yield a server process, and the file of its OpenAPI document."""
    folder = tmp_path_factory.mktemp("generated")
    server = Server(folder).start()
    try:
        (folder / "openapi.json").write_text(server.get("/openapi.json").text)
        yield server, folder / "openapi.json"
    finally:
        server.kill()


def expected(server: Server) -> dict[str, Any]:
    """Return the reply of `POST /score` for the shipped six, without what differs between two replies."""
    reply = server.post("/score", content=SIX.read_bytes(), headers={"content-type": "image/png"}).json()
    return {name: value for name, value in reply.items() if name not in ("id", "reconstruction", "mse")}


def assert_replies(server: Server, found: dict[str, Any]) -> None:
    """Assert what both clients return."""
    single = expected(server)
    assert {name: found["form"][name] for name in single} == single
    assert found["problem"] == "/problems/not-a-png"
    assert found["model"] == "zero"
    assert [name for name, _ in found["tensor"]] == ["mse", "is_anomaly", "p_value", "reason"]
    assert dict(found["tensor"])["reason"] == ["empty"]
    assert "no model none" in found["missing"]


@interop
@pytest.mark.skipif(not BIN.exists(), reason="openapi-python-client is not installed; run `make openapi`")
def test_the_python_client_scores(running_server: tuple[Server, Path], tmp_path: Path) -> None:
    """The generator has no warning, and the client scores by form, batch, tensor and instances."""
    server, document = running_server
    done = subprocess.run(
        [BIN / "openapi-python-client", "generate", "--path", document, "--output-path", tmp_path / "client",
         "--meta", "none", "--config", HERE / "config.yml", "--fail-on-warning"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # In a process of its own: the generator writes `!= 1and`, for which Python has a warning.
    subprocess.run([BIN / "python", "-m", "compileall", "-q", tmp_path / "client"], check=True, capture_output=True)
    done = subprocess.run(
        [BIN / "python", HERE / "score.py", tmp_path, server.url, SIX], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert_replies(server, found)
    assert found["batch"] == pytest.approx([found["form"]["mse"]] * 2, rel=1e-5)
    assert found["prediction"]["reason"] == "empty"
    assert found["calibration"] > 100


@interop
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_the_typescript_client_scores(running_server: tuple[Server, Path], tmp_path: Path) -> None:
    """The generated types compile in strict mode, and a client with them scores."""
    server, document = running_server
    with (HERE / "package-lock.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test processes installs
        if not (HERE / "node_modules" / ".package-lock.json").exists():
            command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
            subprocess.run(command, cwd=HERE, check=True, timeout=120)
    modules = HERE / "node_modules"
    (tmp_path / "node_modules").symlink_to(modules)
    shutil.copy(HERE / "score.ts", tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    for command in (
        [modules / ".bin" / "openapi-typescript", document, "-o", tmp_path / "schema.ts"],
        [modules / ".bin" / "tsc", "--strict", "--target", "es2022", "--module", "nodenext", "--skipLibCheck",
         "--types", "node", tmp_path / "score.ts"],
    ):  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    run = subprocess.run(
        ["node", tmp_path / "score.js", server.url, SIX], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert_replies(server, json.loads(run.stdout))


async def test_operations_have_short_unique_names_and_examples(client: httpx.AsyncClient) -> None:
    """The names of operations become function names; every problem reply has an example of each of its types."""
    document = (await client.get("/openapi.json")).json()
    operations = [each for methods in document["paths"].values() for each in methods.values()]
    names = [each["operationId"] for each in operations]
    assert len(set(names)) == len(names) and max(map(len, names)) < 25
    assert "HTTPValidationError" not in document["components"]["schemas"]
    seen = set()
    for operation in operations:
        for status, reply in operation["responses"].items():
            content = reply.get("content", {}).get("application/problem+json")
            if content is not None:
                assert content["schema"] == {"$ref": "#/components/schemas/ProblemDocument"}
                assert content["examples"], (operation["operationId"], status)
                seen |= set(content["examples"])
                assert all(each["value"]["status"] == int(status) for each in content["examples"].values())
    assert {"not-a-png", "overloaded", "wrong-array", "unauthorized", "internal-error"} <= seen
