"""The unmodified clients of Triton and KServe get the scores of `POST /score`, directly and through the gateway."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import pngs
from tests.app.http.test_batch import digits
from tests.conftest import ROOT, Server, interop
from tests.gateway.process import Gateway, gateway, make_secrets
from tests.infer_requests import assert_error, binary_request, json_request

PYTHON = Path(sys.prefix) / "protocol" / "bin" / "python"
CLIENTS = ROOT / "tests" / "protocol" / "clients.py"
COUNT = 5

pytestmark = [interop, pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed")]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Gateway]]:
    """Yield a server process with an API key, and the shipped gateway in front of it."""
    folder = tmp_path_factory.mktemp("protocol")
    with ExitStack() as ends:
        key = make_secrets(folder)
        server = Server(folder, ANOMALY_API_KEYS_FILE=str(folder / "keys" / "api_keys"))
        ends.callback(server.kill)
        server.start()
        yield server, ends.enter_context(gateway(folder, server.port, key, BATCH_MAX_BYTES="200000"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """Return a file with pixels and PNGs of some images, and the PNGs."""
    array = digits(COUNT)
    array[0] = 0  # a guard decides
    encoded = [pngs.plain(image) for image in array]
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, images=array, **{f"png{n}": np.frombuffer(each, np.uint8) for n, each in enumerate(encoded)})
    return path, encoded


@pytest.mark.skipif(not PYTHON.exists(), reason="the clients are not installed; run `make protocol`")
@pytest.mark.parametrize("way", ["direct", "gateway"])
def test_clients_get_the_scores_of_single_images(
    stack: tuple[Server, Gateway], images: tuple[Path, list[bytes]], way: str
) -> None:
    """Every call of every client succeeds, and has the scores, p-values, verdicts and reasons of `POST /score`."""
    server, door = stack
    path, encoded = images
    arguments = [server.url, "zero", path] if way == "direct" else [door.url, "zero", path, door.certificate]
    done = subprocess.run(
        [PYTHON, CLIENTS, *arguments, *([""] if way == "direct" else []), door.key],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    with server.client(headers={"x-api-key": door.key, "content-type": "image/png"}) as client:
        expected = [client.post("/score?model=zero", content=each).json() for each in encoded]
        wider = [client.post("/score?model=zero&alpha=0.25", content=each).json() for each in encoded]
    calls = {name: each for name, each in found.items() if isinstance(each, dict) and "mse" in each}
    assert len(calls) == 18, sorted(calls)
    for name, outputs in calls.items():
        singles = wider if name == "triton alpha" else expected
        assert outputs["mse"] == pytest.approx([each["mse"] for each in singles], rel=1e-5), name
        assert outputs["p_value"] == pytest.approx([each["p_value"] for each in singles]), name
        assert outputs["is_anomaly"] == [each["is_anomaly"] for each in singles], name
        assert [each or None for each in outputs["reason"]] == [each["reason"] for each in singles], name
    assert expected[0]["reason"] == "empty"
    for name in ("live", "ready", "model ready", "version ready", "kserve v1 ready"):
        assert found[name] is True, name
    assert found["kserve v2 ready"] == [True] * 3
    assert found["metadata"]["extensions"] == ["binary_tensor_data", "model_configuration"]
    assert found["model metadata"]["versions"] == ["1"]
    assert found["config"]["max_batch_size"] > 0
    assert found["pictures"] == [[COUNT, 28, 28]] * 2
    assert found["perf_analyzer"] == [[8]] * 4
    for name in ("unknown model", "kserve unknown model"):
        assert found[name][0] == "404" and "does not exist" in found[name][1]
    assert found["unknown output"][0] == "422" and "The outputs are mse" in found["unknown output"][1]


def test_the_gateway_limits_the_protocol_and_answers_in_its_shape(stack: tuple[Server, Gateway]) -> None:
    """Keys, sizes and paths of the protocol are checked by the gateway; its errors have the member `error`."""
    _, door = stack
    small = binary_request(digits(2).tobytes(), [2, 28, 28])
    large = binary_request(digits(100).tobytes(), [100, 28, 28])  # 78,400 bytes: above the limit of a single image
    huge = binary_request(digits(300).tobytes(), [300, 28, 28])
    infer = "/v2/models/zero/infer"

    def chunked(body: bytes) -> Iterator[bytes]:
        yield body[:100]
        yield body[100:]

    with door.client() as client:
        for content, headers in (small, large):
            assert client.post(infer, content=content, headers=headers).status_code == 200
            assert client.post(infer, content=chunked(content), headers=headers).status_code == 200
        predicted = client.post("/v1/models/zero:predict", json={"instances": digits(1).tolist()})
        assert len(predicted.json()["predictions"]) == 1
        assert client.get("/v2/health/ready").json() == {"ready": True}
        replies = {
            "/v2/models/zero/..": client.get("/v2/models/zero%2f.."),
            "huge": client.post(infer, content=huge[0], headers=huge[1]),
        }
    with door.client() as client:
        client.headers["x-api-key"] = "wrong"
        replies["wrong key"] = client.post(infer, json=json_request(digits(1)))
        replies["probe"] = client.get("/v2/health/live")
    for (name, reply), status in zip(replies.items(), (404, 413, 401, 401), strict=True):
        assert reply.status_code == status, name
        assert reply.headers["content-type"] == "application/json", name
        assert reply.json()["error"], name
    with door.client() as client:
        other = client.get("/nothing:here")
        assert (other.status_code, other.headers["content-type"]) == (404, "application/problem+json")


def test_without_a_replica_the_gateway_answers_in_the_shape_of_the_protocol(tmp_path: Path) -> None:
    """503 of the gateway itself is JSON with `error` below /v2, and a problem elsewhere."""
    key = make_secrets(tmp_path)
    server = Server(tmp_path, ANOMALY_API_KEYS_FILE=str(tmp_path / "keys" / "api_keys")).start()
    try:
        with gateway(tmp_path, server.port, key) as door:
            server.kill()
            with door.client() as client:
                reply = client.post("/v2/models/zero/infer", json=json_request(digits(1)))
                assert reply.status_code in (502, 503)
                assert reply.headers["content-type"] == "application/json"
                assert set(reply.json()) > {"error", "status"}
                assert client.get("/models").headers["content-type"] == "application/problem+json"
    finally:
        server.kill()


def test_a_rejected_request_leaves_the_connection_usable(stack: tuple[Server, Gateway]) -> None:
    """A request that is rejected before its body was read does not affect the next one on the connection."""
    server, door = stack
    content, headers = binary_request(digits(70).tobytes(), [70, 28, 28])
    with server.client(headers={"x-api-key": door.key}) as client:
        for _ in range(3):
            assert_error(client.post("/v2/models/none/infer", content=content, headers=headers), 404)
            assert client.post("/v2/models/zero/infer", content=content, headers=headers).status_code == 200
