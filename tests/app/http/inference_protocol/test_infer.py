"""`POST /v2/models/{name}/infer`: tensors in, the scores of `POST /score` out; limits, errors, fairness."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.http.inference_protocol.documents import MAX_DOCUMENT_BYTES
from app.http.inference_protocol.outputs import MAX_PICTURES
from app.inference.detector import Detector
from app.settings import Settings
from tests import pngs
from tests.app.http.test_batch import digits
from tests.conftest import EXAMPLES, MODEL_STORE, SHARED, running, services
from tests.infer_requests import HEADER, assert_error, binary_request, bytes_tensor, json_request, outputs_of
from tests.requests import raw
from tests.waiting import until

INFER = "/v2/models/zero-article/infer"
DEFAULT = ["mse", "is_anomaly", "p_value", "reason"]
ALL = [{"name": name} for name in (*DEFAULT, "reconstruction", "error_map")]


async def infer(client: httpx.AsyncClient, images: np.ndarray, **members: Any) -> httpx.Response:
    """Send images as one binary tensor."""
    content, headers = binary_request(images.tobytes(), list(images.shape), **members)
    return await client.post(INFER, content=content, headers=headers)


def assert_scores(outputs: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    """Assert that outputs are the scores and verdicts of `POST /score`."""
    assert list(outputs["mse"]) == pytest.approx([each["mse"] for each in expected], rel=1e-5)
    assert list(outputs["p_value"]) == pytest.approx([each["p_value"] for each in expected])
    assert list(outputs["is_anomaly"]) == [each["is_anomaly"] for each in expected]
    assert list(outputs["reason"]) == [each["reason"] or "" for each in expected]


async def singles(client: httpx.AsyncClient, images: np.ndarray, query: str = "") -> list[dict[str, Any]]:
    """Return the reply of `POST /score` for each image."""
    return [(await raw(client, pngs.plain(image), query)).json() for image in images]


@pytest.mark.parametrize("count", [1, 3, 8, 9, 70])
@SHARED
async def test_every_form_of_a_request_gets_the_scores_of_single_images(
    shared_client: httpx.AsyncClient, count: int
) -> None:
    """JSON, binary UINT8 and BYTES give the scores of `POST /score`, below and above the size of a micro-batch."""
    images = digits(count)
    expected = await singles(shared_client, images)
    encoded = [pngs.plain(image) for image in images]
    content, headers = binary_request(bytes_tensor(encoded), [count], "BYTES")
    texts = [base64.b64encode(each).decode() for each in encoded]
    bytes_document = {"inputs": [{"name": "images", "shape": [count, 1], "datatype": "BYTES", "data": texts}]}
    nested = json_request(images)
    nested["inputs"][0]["data"] = images.tolist()
    for reply in (
        await infer(shared_client, images),
        await infer(shared_client, images[:, None], parameters={"binary_data_output": True}),
        await shared_client.post(INFER, json=json_request(images)),
        await shared_client.post(INFER, json=nested),
        await shared_client.post(INFER, content=content, headers=headers),
        await shared_client.post(INFER, json=bytes_document),
        await shared_client.post(INFER, content=images.tobytes(), headers={HEADER: "0"}),
    ):
        outputs = outputs_of(reply)
        assert list(outputs) == DEFAULT
        assert_scores(outputs, expected)


async def test_a_reply_names_model_version_and_request(client: httpx.AsyncClient) -> None:
    """The reply has the model, its version as a text, and the id of the request if it has one."""
    for path in (INFER, "/v2/models/zero-article/versions/1/infer"):
        reply = (await client.post(path, json=json_request(digits(1), id="a-7"))).json()
        assert (reply["model_name"], reply["model_version"], reply["id"]) == ("zero-article", "1", "a-7")
    assert "id" not in (await client.post(INFER, json=json_request(digits(1)))).json()


async def test_outputs_come_in_the_order_and_form_of_the_request(client: httpx.AsyncClient) -> None:
    """A requested output is binary if its own parameter says so, else if the request's parameter does."""
    wanted = [{"name": "reason"}, {"name": "mse", "parameters": {"binary_data": False}}, {"name": "is_anomaly"}]
    reply = await infer(client, digits(3), outputs=wanted, parameters={"binary_data_output": True})
    document = json.loads(reply.content[: int(reply.headers[HEADER])])
    assert reply.headers["content-type"] == "application/octet-stream"
    assert [(each["name"], "data" in each) for each in document["outputs"]] == [
        ("reason", False),
        ("mse", True),
        ("is_anomaly", False),
    ]
    assert len(outputs_of(reply)["reason"]) == 3


@pytest.mark.parametrize("count", [2, 20])
@SHARED
async def test_pictures_are_those_that_the_service_stores(shared_client: httpx.AsyncClient, count: int) -> None:
    """Reconstruction and error map are the stored planes, by both ways of scoring; the mean error is the score."""
    images = digits(count)
    reply = await infer(shared_client, images, outputs=ALL, parameters={"binary_data_output": True})
    outputs = outputs_of(reply)
    error_map = np.array(outputs["error_map"]).reshape(count, 28, 28)
    assert error_map.mean((1, 2)) == pytest.approx(outputs["mse"], rel=0.02)
    stored = (await raw(shared_client, pngs.plain(images[1]))).json()
    picture = await shared_client.get(stored["reconstruction"])
    shown = np.asarray(Image.open(io.BytesIO(picture.content)))
    assert np.array_equal(np.array(outputs["reconstruction"]).reshape(count, 28, 28)[1], shown)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@SHARED
async def test_bodies_may_be_compressed(shared_client: httpx.AsyncClient, encoding: str) -> None:
    """The header counts the JSON before compression."""
    images = digits(4)
    content, headers = binary_request(images.tobytes(), [4, 28, 28])
    packed = gzip.compress(content) if encoding == "gzip" else zlib.compress(content)
    reply = await shared_client.post(INFER, content=packed, headers={**headers, "content-encoding": encoding})
    assert_scores(outputs_of(reply), await singles(shared_client, images))


async def test_alpha_changes_the_verdict_and_not_the_score(client: httpx.AsyncClient) -> None:
    """`alpha` is the parameter of `POST /score`."""
    images = digits(30, seed=3)
    for alpha in (0.01, 0.4):
        outputs = outputs_of(await infer(client, images, parameters={"alpha": alpha}))
        assert_scores(outputs, await singles(client, images, f"?alpha={alpha}"))


@pytest.mark.parametrize("count", [1, 9])
@SHARED
async def test_fit_applies_to_encoded_images(shared_client: httpx.AsyncClient, count: int) -> None:
    """With `fit=mnist`, a picture of any size gets the score that `POST /score?fit=mnist` gives it."""
    picture = pngs.saved(Image.open(EXAMPLES / "six.png").resize((90, 110)))
    expected = (await raw(shared_client, picture, "?fit=mnist")).json()
    content, headers = binary_request(bytes_tensor([picture] * count), [count], "BYTES", parameters={"fit": "mnist"})
    outputs = outputs_of(await shared_client.post(INFER, content=content, headers=headers))
    assert_scores(outputs, [expected] * count)
    assert_error(await infer(shared_client, digits(1), parameters={"fit": "mnist"}), 422, "encoded images")


async def test_a_bad_image_fails_the_request_and_is_named(client: httpx.AsyncClient) -> None:
    """One invalid image rejects the whole request, with the status and the hint for the image."""
    for count in (3, 12):
        files = [pngs.plain()] * (count - 1) + [pngs.plain(pngs.gradient(27))]
        content, headers = binary_request(bytes_tensor(files), [count], "BYTES")
        reply = await client.post(INFER, content=content, headers=headers)
        assert_error(reply, 422, f"image {count - 1}: ", "28x28")


def _tensor(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "images", "shape": [1, 28, 28], "datatype": "UINT8", "data": [0] * 784, **changes}
    return {"inputs": [{name: value for name, value in tensor.items() if value is not None}]}


INVALID: list[tuple[Any, int, str]] = [
    ({}, 400, "inputs"),
    ([], 400, "valid dictionary"),
    ({"inputs": []}, 400, "no input"),
    (_tensor(name="pictures"), 400, "`images`"),
    ({"inputs": _tensor()["inputs"] * 2}, 400, "one input"),
    (_tensor(shape=[-1, 28, 28]), 400, "inputs.0.shape.0"),
    (_tensor(shape=[2**40, 28, 28]), 400, "inputs.0.shape.0"),
    (_tensor(shape=[True, 28, 28]), 400, "inputs.0.shape.0"),
    (_tensor(shape=[28, 28]), 422, "Add an axis"),
    (_tensor(shape=[0, 28, 28], data=[]), 422, "no images"),
    (_tensor(shape=[2, 28, 28]), 400, "784 values"),
    (_tensor(datatype="FP32"), 422, "FP32"),
    (_tensor(data=[[0] * 400, [0] * 384]), 422, "differ in length"),
    (_tensor(data=[0.5] * 784), 422, "the type float,"),
    (_tensor(data=["a" * 784] * 784), 422, "the type str,"),
    (_tensor(data=[0] * 783 + ["a"]), 422, "the type str,"),
    (_tensor(data=["a" * 500_000, *[""] * 170_000]), 422, "the type str,"),  # as a numpy array: 340 GB
    (_tensor(data=[True] * 784), 422, "the type bool,"),
    (_tensor(data=[None, 0.5] * 392), 422, "the type NoneType and float,"),
    (_tensor(data={"a": 1}), 422, "the type dict,"),
    (_tensor(data=[2**70] * 784), 422, "64 bits"),
    (_tensor(data=[[[[[[0]]]]]]), 422, "nested too deeply"),
    (_tensor(data=[[0], 0]), 422, "differ in length"),
    (_tensor(data=[]), 400, "0 values, 1 images have 784"),
    (_tensor(data=np.zeros((56, 14), int).tolist()), 422, "the shape [56, 14]"),
    (_tensor(shape=[2, 784], data=np.zeros((784, 2), int).tolist()), 422, "the shape [784, 2]"),
    (_tensor(data=np.zeros((28, 28, 1), int).tolist()), 422, "the shape [28, 28, 1]"),
    (_tensor(data=[2**63] * 784), 422, "not from 0 to 255"),
    (_tensor(data=[256] * 784), 422, "256"),
    (_tensor(data=[-1] * 784), 422, "-1"),
    (_tensor(data=["a"] * 784), 422, "whole numbers"),
    (_tensor(data=[10**30] * 784), 422, "whole numbers"),
    (_tensor(data={}), 422, "whole numbers"),
    (_tensor(data=[True] * 784), 422, "bool"),
    (_tensor(data=[*[0] * 783, True]), 422, "bool"),
    (_tensor(data=[[[0] * 28] * 27 + [[1] * 27 + [False]]]), 422, "bool"),
    (_tensor(data=None), 400, "neither"),
    (_tensor(parameters={"binary_data_size": 784}), 400, "both"),
    (_tensor(data=None, parameters={"binary_data_size": 784}), 400, "Inference-Header-Content-Length"),
    (_tensor(data=None, parameters={"binary_data_size": "784"}), 400, "binary_data_size"),
    (_tensor(data=None, parameters={"binary_data_size": -1}), 400, "binary_data_size"),
    (_tensor(parameters={"shared_memory_region": "r"}), 422, "shared_memory_region"),
    (_tensor(datatype="BYTES", shape=[1], data=["no base64!"]), 422, "base64"),
    (_tensor(datatype="BYTES", shape=[1], data=[7]), 422, "base64"),
    (_tensor(datatype="BYTES", shape=[2], data=["QQ=="]), 400, "list of 2 values"),
    (_tensor(datatype="BYTES", shape=[1, 2], data=["QQ=="]), 422, "BYTES"),
    (_tensor(datatype="BYTES", shape=[1], data=["QQ=="]), 422, "image 0"),
    (_tensor(datatype="BYTES", shape=[1], data=[""]), 422, "image 0: it has no bytes. Send the datatype"),
    ({**_tensor(), "parameters": {"alhpa": 0.1}}, 422, "alhpa: unknown parameter"),
    ({**_tensor(), "parameters": {"alpha": 2}}, 422, "alpha"),
    ({**_tensor(), "parameters": {"alpha": 1e-9}}, 422, "larger alpha"),
    ({**_tensor(), "parameters": {"binary_data_output": "yes"}}, 422, "binary_data_output"),
    ({**_tensor(), "outputs": [{"name": "msee"}]}, 422, "The outputs are mse"),
    ({**_tensor(), "outputs": [{"name": "mse"}, {"name": "mse"}]}, 422, "twice"),
    ({**_tensor(), "outputs": [{"name": "mse", "parameters": {"classification": 2}}]}, 422, "classification"),
]


async def test_invalid_documents_are_explained(client: httpx.AsyncClient) -> None:
    """A document that the service cannot use gets a 4xx that names the member."""
    for document, status, words in INVALID:
        assert_error(await client.post(INFER, json=document), status, words)


@pytest.mark.parametrize("unit", [b"[],", b"[[]],", b"{},", b"[" * 99 + b"]" * 99 + b","])
async def test_a_document_of_many_lists_is_not_parsed(client: httpx.AsyncClient, unit: bytes) -> None:
    """1 MiB of lists or objects would take the event loop long; as many as 80 images of 28x28x1 have are parsed."""
    body = b'{"inputs":[{"name":"images","shape":[1,784],"datatype":"UINT8","data":[%b0]}]}' % (
        unit * (1_000_000 // len(unit))
    )
    for path in (INFER, "/v1/models/zero-article:predict"):
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        reply = await client.post(path, content=gzip.compress(body), headers=headers)
        assert_error(reply, 413, "more than 65536 lists and objects")


async def test_images_of_single_numbers_are_parsed(client: httpx.AsyncClient) -> None:
    """80 images whose pixels are lists of one number, as Keras has them, are below the limit of lists."""
    images = np.zeros((80, 28, 28, 1), np.uint8)
    assert outputs_of(await client.post(INFER, json=_tensor(shape=list(images.shape), data=images.tolist())))


async def test_many_parameters_are_rejected(client: httpx.AsyncClient) -> None:
    """More parameters than any server defines are rejected before each of them is checked."""
    document = {**_tensor(), "parameters": {str(number): 1 for number in range(65)}}
    assert_error(await client.post(INFER, json=document), 400, "at most 64 items")


async def test_unknown_members_and_parameters_of_other_servers_are_ignored(client: httpx.AsyncClient) -> None:
    """KServe's client adds `model_name`; Triton's client has parameters that mean nothing without a queue per model."""
    document = {**_tensor(), "model_name": "other", "parameters": {"priority": 1, "timeout": 5000, "sequence_id": 3}}
    assert outputs_of(await client.post(INFER, json=document))


# ruff: noqa: ARG005
CHANGES: list[tuple[Callable[..., Any], int, str]] = [
    (lambda body, head: (body[:-1], head), 400, "1 bytes early"),
    (lambda body, head: (body + b"x", head), 400, "more bytes"),
    (lambda body, head: (body, {HEADER: str(len(body) + 1)}), 400, "early"),
    (lambda body, head: (body, {HEADER: "10"}), 400, "JSON cannot be parsed"),
    (lambda body, head: (body, {HEADER: "-1"}), 400, "not a number"),
    (lambda body, head: (body, {HEADER: "1e3"}), 400, "not a number"),
    (lambda body, head: (body, {HEADER: "9" * 30}), 413, "the JSON has 9999"),
    (lambda body, head: (body, {HEADER: str(2**30)}), 413, "maximum"),
    (lambda body, head: (body[:-784], {HEADER: "0"}), 422, "784 each"),
    (lambda body, head: (b"", {HEADER: "0"}), 422, "has 0 bytes, and images of 28x28 have 784 each"),
    (lambda body, head: (bytes(784 * 1400), {HEADER: "0"}), 413, "the maximum of a body without JSON is 1048576"),
    (lambda body, head: (b"", {}), 400, "JSON cannot be parsed"),
    (lambda body, head: (body, {**head, "content-encoding": "gzip"}), 400, "gzip"),
    (lambda body, head: (body, {**head, "content-encoding": "br"}), 415, "br"),
]


async def test_binary_sizes_must_add_up(client: httpx.AsyncClient) -> None:
    """A body with more or fewer bytes than its JSON and tensors is rejected."""
    for change, status, words in CHANGES:
        content, headers = change(*binary_request(digits(2).tobytes(), [2, 28, 28]))
        assert_error(await client.post(INFER, content=content, headers=headers), status, words)


TENSORS: list[tuple[bytes, list[int], str, int, str]] = [
    (bytes(783), [1, 28, 28], "UINT8", 400, "783"),
    (bytes(784), [2, 28, 28], "UINT8", 400, "1568"),
    ((9).to_bytes(4, "little") + b"12345678", [1], "BYTES", 400, "1 bytes more"),
    (bytes_tensor([pngs.plain()]), [2], "BYTES", 400, "before element 1"),
    (bytes_tensor([pngs.plain()]) + b"abc", [1], "BYTES", 400, "3 bytes after"),
    (b"abc", [1], "BYTES", 400, "before element 0"),
    (bytes_tensor([b"a"]), [1], "BYTES", 422, "image 0"),
]


async def test_binary_tensors_must_have_their_shape(client: httpx.AsyncClient) -> None:
    """A binary tensor that is longer or shorter than its shape is rejected, and so is an element that overruns it."""
    for tensor, shape, datatype, status, words in TENSORS:
        content, headers = binary_request(tensor, shape, datatype)
        assert_error(await client.post(INFER, content=content, headers=headers), status, words)


async def test_limits_are_those_of_batch_requests(make_settings: Callable[..., Settings]) -> None:
    """Body, inflated body, document, element, number of encoded images and pictures are limited, each with 413."""
    limits = {"batch_max_body_bytes": 100_000, "max_body_bytes": 2048, "batch_max_files": 20}
    async with running(make_settings(**limits)) as client:
        assert_error(await infer(client, digits(130)), 413, "100000")
        bomb = gzip.compress(bytes(10_000_000))
        head = {HEADER: "0", "content-encoding": "gzip"}
        assert_error(await client.post(INFER, content=bomb, headers=head), 413, "100000")
        for elements, words in (([b"x" * 2049], "2049 bytes"), ([pngs.plain()] * 21, "21 images")):
            content, headers = binary_request(bytes_tensor(elements), [len(elements)], "BYTES")
            assert_error(await client.post(INFER, content=content, headers=headers), 413, words)
    async with running(make_settings()) as client:
        document = json_request(digits(1), padding="x" * MAX_DOCUMENT_BYTES)
        assert_error(await client.post(INFER, json=document), 413, "binary")
        assert_error(await infer(client, digits(MAX_PICTURES + 1), outputs=ALL), 413, "pictures")


async def test_a_large_request_occupies_a_place_of_batch_requests(make_settings: Callable[..., Settings]) -> None:
    """While all places are occupied, a large request gets 503; a small one joins the micro-batches."""
    async with running(make_settings(batch_max_connections=1)) as client:
        with services(client).batch.place({}):
            reply = await infer(client, digits(200))
            assert_error(reply, 503, "batch requests")
            assert reply.headers["retry-after"] == "1"
            assert len(outputs_of(await infer(client, digits(8)))["mse"]) == 8
        assert len(outputs_of(await infer(client, digits(200)))["mse"]) == 200
        assert services(client).batch.running == 0


async def test_small_requests_share_micro_batches(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Concurrent small requests and single scores are scored in common forward passes, none of them through a place."""
    sizes: list[int] = []
    draw = Detector.draw

    def counting(self: Detector, images: np.ndarray) -> Any:
        sizes.append(len(images))
        return draw(self, images)

    async with running(make_settings(microbatch_max_delay_ms=200, batch_max_requests=1)) as client:
        monkeypatch.setattr(Detector, "draw", counting)
        images = digits(8)
        replies = await asyncio.gather(
            *(infer(client, images[n : n + 2]) for n in (0, 2, 4)), *(raw(client, pngs.plain(x)) for x in images[6:])
        )
        assert [reply.status_code for reply in replies] == [200] * 5
        assert sizes == [8]


async def test_a_full_queue_is_a_503_and_leaves_nothing_behind(make_settings: Callable[..., Settings]) -> None:
    """If the queue has no room for all images of a request, none of them is scored."""
    chosen = make_settings(queue_max_images=4, microbatch_max_delay_ms=10_000, deadline_ms=30_000)
    async with running(chosen) as client:
        queue = services(client).registry.current("zero-article").queue
        first = asyncio.create_task(infer(client, digits(2)))
        await until(lambda: len(queue._waiting) == 2)
        assert_error(await infer(client, digits(4)), 503, "4 images are waiting")
        await until(lambda: sum(not item.future.done() for item in [*queue._waiting]) == 2)
        metrics = (await client.get("/metrics")).text
        assert 'anomaly_problems_total{type="overloaded"} 1.0' in metrics
        first.cancel()


@pytest.mark.parametrize("count", [4, 5, 32])
async def test_more_images_than_the_queue_admits_are_scored(make_settings: Callable[..., Settings], count: int) -> None:
    """A small queue rejects no request for its size alone: above it, a request is scored like a batch."""
    async with running(make_settings(queue_max_images=4)) as client:
        assert len(outputs_of(await infer(client, digits(count)))["mse"]) == count


async def test_a_tensor_request_does_not_starve_single_scores(make_settings: Callable[..., Settings]) -> None:
    """Single scores get replies while a large tensor is scored, not after it."""
    async with running(make_settings()) as client:
        large = asyncio.create_task(infer(client, digits(8_000)))
        done = 0
        await until(lambda: services(client).batch.running or large.done())
        while not large.done():
            assert (await raw(client, pngs.plain())).status_code == 200
            done += 1
        assert len(outputs_of(await large)["mse"]) == 8_000
        assert done > 5


async def test_requests_count_like_other_scores(make_settings: Callable[..., Settings]) -> None:
    """Images, verdicts, requests and problems appear in the metrics that `POST /score` has."""
    async with running(make_settings()) as client:
        images = digits(30)
        anomalous = 0
        for count in (1, 3, 26):
            anomalous += sum(outputs_of(await infer(client, images[:count]))["is_anomaly"])
        await client.post(INFER, content=b"")
        metrics = (await client.get("/metrics")).text
        route = 'route="/v2/models/{name}/infer"'
        assert f'anomaly_http_requests_total{{{route},status="200"}} 3.0' in metrics
        assert f'anomaly_http_requests_total{{{route},status="400"}} 1.0' in metrics
        assert 'anomaly_problems_total{type="malformed-request"} 1.0' in metrics
        totals = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("anomaly_scores_total{"))
        scored = {name: float(value) for name, value in totals.items()}
        assert sum(scored.values()) == 30
        assert sum(value for name, value in scored.items() if "anomalous" in name) == anomalous


async def test_nothing_is_stored(make_settings: Callable[..., Settings]) -> None:
    """The protocol has no id by which a reconstruction could be fetched, so the store is not written."""
    async with running(make_settings()) as client:
        written: list[int] = []
        put = services(client).reconstructions.put

        def counting(records: Any, *given: Any) -> None:
            written.append(len(records))
            put(records, *given)

        services(client).reconstructions.put = counting  # type: ignore[method-assign]
        outputs_of(await infer(client, digits(3)))
        outputs_of(await infer(client, digits(20)))
        assert written == []
        await raw(client, pngs.plain())
        assert written == [1]


async def test_a_body_that_pauses_is_a_408(make_settings: Callable[..., Settings]) -> None:
    """A client that stops sending gets an error in the format of the protocol."""

    async def body() -> AsyncIterator[bytes]:
        yield b'{"inputs"'
        await asyncio.Event().wait()

    async with running(make_settings(body_timeout_ms=50)) as client:
        assert_error(await client.post(INFER, content=body()), 408)


async def test_a_version_of_the_path_scores(make_settings: Callable[..., Settings], tmp_path: Any) -> None:
    """`/versions/{version}/infer` scores with that version, and an unknown model or version is a 404."""
    async with running(make_settings(model_store=MODEL_STORE, default_model="zero")) as client:
        images = digits(2)
        images[0] = 0  # a guard decides
        content, headers = binary_request(images.tobytes(), [2, 28, 28], parameters={"binary_data_output": True})
        reply = await client.post("/v2/models/zero/versions/1/infer", content=content, headers=headers)
        assert outputs_of(reply)["reason"][0] == "empty"
        assert_scores(outputs_of(reply), await singles(client, images, "?model=zero@1"))
        for path in ("zero/versions/999", "zero/versions/01", "zero/versions/x", "none", "Zero", "zero@1"):
            reply = await client.post(f"/v2/models/{path}/infer", content=content, headers=headers)
            assert_error(reply, 404)
