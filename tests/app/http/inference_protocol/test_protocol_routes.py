"""Metadata, configuration, health and v1 of the inference protocol, and the format of its errors."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app import __version__
from app.http.inference_protocol.errors import is_protocol_request
from app.settings import Settings
from tests import pngs
from tests.app.http.test_batch import digits
from tests.conftest import MODEL_STORE, SHARED, running, services
from tests.infer_requests import assert_error, outputs_of
from tests.requests import assert_problem, raw

PREDICT = "/v1/models/zero-article:predict"


async def test_metadata_and_configuration_name_the_same_tensors(client: httpx.AsyncClient) -> None:
    """perf_analyzer needs both: names, types and dimensions agree, and the metadata leads to a request that works."""
    server = (await client.get("/v2")).json()
    assert server == {
        "name": "reconstruction-anomaly",
        "version": __version__,
        "extensions": ["binary_tensor_data", "model_configuration"],
    }
    for path in ("/v2/models/zero-article", "/v2/models/zero-article/versions/1"):
        metadata, config = (await client.get(path)).json(), (await client.get(f"{path}/config")).json()
        assert (metadata["name"], metadata["versions"]) == (config["name"], ["1"]) == ("zero-article", ["1"])
        for kind, plural in (("input", "inputs"), ("output", "outputs")):
            types = [(each["name"], each["datatype"].replace("BYTES", "STRING")) for each in metadata[plural]]
            assert types == [(each["name"], each["data_type"].removeprefix("TYPE_")) for each in config[kind]]
            assert [each["shape"] for each in metadata[plural]] == [[-1, *each["dims"]] for each in config[kind]]
        assert config["dynamic_batching"] == {}
        assert config["max_batch_size"] == Settings.model_fields["batch_max_body_bytes"].default // 784
    tensor = metadata["inputs"][0]
    shape = [2, *tensor["shape"][1:]]
    document = {"inputs": [{**tensor, "shape": shape, "data": [7] * int(np.prod(shape))}]}
    outputs = outputs_of(await client.post("/v2/models/zero-article/infer", json=document))
    assert list(outputs) == [each["name"] for each in metadata["outputs"]]


async def test_health_follows_readiness(make_settings: Callable[..., Settings]) -> None:
    """`/v2/health/ready` and `/readyz` agree; clients read the member and the status."""
    async with running(make_settings()) as client:
        assert (await client.get("/v2/health/live")).json() == {"live": True}
        assert (await client.get("/v2/health/ready")).json() == {"ready": True}
        services(client).health.begin_draining()
        for path in ("/v2/health/ready", "/readyz"):
            reply = await client.get(path)
            assert (reply.status_code, reply.json()["ready"]) == (503, False)


async def test_the_readiness_of_a_model_has_three_answers(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """A loaded version is 200, a rejected one or one that is not loaded is 503, an unknown one is 404."""
    store = tmp_path / "store"
    for name in ("zero-article", "damaged"):
        shutil.copytree(MODEL_STORE / "zero-article", store / name)
    shutil.copytree(store / "zero-article" / "1", store / "zero-article" / "2")
    (store / "damaged" / "1" / "model.pt").write_bytes(b"")
    async with running(make_settings(model_store=store)) as client:
        for path in ("/v2/models/{}/ready", "/v1/models/{}"):
            ready = await client.get(path.format("zero-article"))
            assert (ready.status_code, ready.json()) == (200, {"name": "zero-article", "ready": True})
            assert_error(await client.get(path.format("damaged")), 503, "not available")
            assert_error(await client.get(path.format("unknown")), 404, "no model unknown")
        assert (await client.get("/v2/models/zero-article/versions/1/ready")).status_code == 200
        assert_error(await client.get("/v2/models/zero-article/versions/2/ready"), 503, "not loaded")
        assert_error(await client.get("/v2/models/zero-article/versions/3/ready"), 404, "no version 3")
        assert (await client.get("/v1/models")).json() == {"models": ["damaged", "zero-article"]}
        assert (await client.get("/v2/models/damaged")).json()["versions"] == ["1"]


@pytest.mark.parametrize("count", [1, 8, 40])
@SHARED
async def test_predictions_are_the_scores_of_single_images(shared_client: httpx.AsyncClient, count: int) -> None:
    """v1 takes arrays of numbers or encoded images, and returns a verdict for each instance."""
    images = digits(count)
    expected = [(await raw(shared_client, pngs.plain(image), "?alpha=0.3")).json() for image in images]
    encoded = [{"b64": base64.b64encode(pngs.plain(image)).decode()} for image in images]
    for instances in (images.tolist(), images[:, None].tolist(), images.reshape(count, -1).tolist(), encoded):
        reply = await shared_client.post(PREDICT, json={"instances": instances, "parameters": {"alpha": 0.3}})
        document = reply.json()
        assert (document["model_name"], document["model_version"]) == ("zero-article", "1")
        for found, single in zip(document["predictions"], expected, strict=True):
            assert found["mse"] == pytest.approx(single["mse"], rel=1e-5)
            assert {**found, "mse": 0} == {"mse": 0, **{name: single[name] for name in list(found)[1:]}}


async def test_invalid_instances_are_explained(client: httpx.AsyncClient) -> None:
    """Every invalid document of v1 gets a 4xx in the format of the protocol."""
    image = digits(1)[0].tolist()
    png = {"b64": base64.b64encode(pngs.plain(pngs.gradient(27))).decode()}
    cases: list[tuple[Any, int, str]] = [
        ({}, 400, "instances"),
        ({"instances": []}, 400, "instances"),
        ({"instances": [image, {"b64": "QQ=="}]}, 422, "not all"),
        ({"instances": [{"b65": ""}]}, 422, "not all"),
        ({"instances": ["a"]}, 422, "not all"),
        ({"instances": [[0] * 783]}, 400, "783 values"),
        ({"instances": image}, 400, "add an axis if there is one image"),
        ({"instances": [[]]}, 400, "`instances` has 0 values"),
        ({"instances": [np.zeros((56, 14), int).tolist()]}, 422, "the shape [1, 56, 14]"),
        ({"instances": [image], "parameters": {"binary_data_output": True}}, 422, "parameters are `alpha` and `fit`."),
        ({"instances": [{"b64": "?"}]}, 422, "base64"),
        ({"instances": [png]}, 422, "image 0"),
        ({"instances": [image], "parameters": {"fit": "mnist"}}, 422, "encoded images"),
        ({"instances": [image], "parameters": {"fit": "cifar"}}, 422, "fit"),
    ]
    for document, status, words in cases:
        assert_error(await client.post(PREDICT, json=document), status, words)
    assert_error(await client.post("/v1/models/none:predict", json={"instances": [image]}), 404)
    refused = await client.get("/v1/models/zero-article:predict")
    assert_error(refused, 405)
    assert refused.headers["allow"] == "POST"
    assert_error(await client.get("/v2/models/zero-article@1"), 404, "/versions/{number}")


async def test_every_error_has_the_shape_of_the_protocol(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """Errors of the middleware, of the framework and of the routes have the member `error` and nothing else."""
    keys = tmp_path / "keys"
    keys.write_text(f"{'0' * 64} nobody\n")
    async with running(make_settings()) as client:
        for method, path, status in (
            ("GET", "/v2/", 404),
            ("GET", "/v2/nothing", 404),
            ("GET", "/v1", 404),
            ("DELETE", "/v2", 405),
            ("GET", "/v2/models/zero-article/infer", 405),
            ("GET", "/v2?x=1", 422),
            ("GET", f"/v2?{'x' * 2000}", 400),
            ("POST", "/v2/models/zero-article/infer?model=zero", 422),
        ):
            reply = await client.request(method, path)
            assert_error(reply, status)
            assert ("allow" in reply.headers) == (status == 405)
        assert_problem(await client.get("/v3"), 404, "not-found")
        services(client).infer.infer = None  # type: ignore[assignment, method-assign]
        assert_error(await client.post("/v2/models/zero-article/infer", content=b""), 500, "Internal error")
    async with running(make_settings(api_keys_file=keys)) as client:
        reply = await client.get("/v2/models/zero-article")
        assert_error(reply, 401, "X-API-Key")
        assert reply.headers["www-authenticate"]
        assert (await client.get("/v2/health/ready")).status_code == 200


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/v2", "", True),
        ("/v1/models/a:predict", "", True),
        ("/v22", "", False),
        ("/score", "", False),
        ("/a/v2/x", "/a", True),
        ("/a/v2/x", "", False),
    ],
)
def test_paths_of_the_protocol(path: str, root: str, expected: bool) -> None:
    """The format of an error does not depend on the path prefix of a gateway."""
    assert is_protocol_request({"path": path, "root_path": root}) is expected
