"""`POST /score/batch`: forms of body and reply, problems per item, order, limits, fairness, clients that leave."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from app.http.batch_exchange import BatchExchange
from app.http.batch_replies import JsonReply
from app.http.bodies import ClientLeft, pieces
from app.http.multipart import chunks
from app.http.npy import array_header
from app.inference.detector import Detector
from app.problems import BodyTimeout, BodyTooLarge, Problem
from app.scoring.batch import PASSES_AT_ONCE, BatchJob, Chunk, ScoredChunk
from app.scoring.verdict import DecisionRule
from app.settings import Settings
from app.stores.reconstructions import Reconstructions
from app.stores.records import Record
from tests import pngs
from tests.conftest import SHARED, running, services
from tests.requests import assert_problem, raw
from tests.waiting import advance, until, virtual_time

NPY = {"content-type": "application/x-npy"}


def digits(count: int, seed: int = 0) -> np.ndarray:
    """Return blurred blobs, each different from all others, uint8 [count, 28, 28]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:28, :28]
    centres = rng.uniform(8, 20, (count, 2, 1, 1))
    widths = rng.uniform(2, 6, (count, 1, 1))
    distance = (rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2
    return (255 * np.exp(-distance / widths**2)).astype(np.uint8)


def npy(array: np.ndarray) -> bytes:
    """Return an array as numpy.save writes it."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def form(*files: bytes) -> dict[str, Any]:
    """Return the arguments for a request with a form of files."""
    return {"files": [("files", (f"{n}.png", content, "image/png")) for n, content in enumerate(files)]}


async def bulk(client: httpx.AsyncClient, images: np.ndarray, accept: str = "", query: str = "") -> httpx.Response:
    headers = {**NPY, **({"accept": accept} if accept else {})}
    return await client.post(f"/score/batch{query}", content=npy(images), headers=headers)


async def test_a_batch_says_what_single_scores_say(client: httpx.AsyncClient) -> None:
    """Each item of an array has the score, p-value and verdict that the image gets on its own, in order."""
    images = digits(20)
    reply = (await bulk(client, images)).json()
    assert [item["index"] for item in reply["items"]] == list(range(20))
    assert (reply["count"], reply["failed"]) == (20, 0)
    assert reply["anomalous"] == sum(item["is_anomaly"] for item in reply["items"])
    for image, item in zip(images, reply["items"], strict=True):
        single = (await raw(client, pngs.plain(image))).json()
        assert item["mse"] == pytest.approx(single["mse"], rel=1e-5)
        assert item["p_value"] == pytest.approx(single["p_value"])
        assert item["is_anomaly"] == single["is_anomaly"]
        assert (reply["threshold"], reply["alpha"]) == (single["threshold"], single["alpha"])


async def test_every_form_of_the_reply_says_the_same(client: httpx.AsyncClient) -> None:
    """JSON, NDJSON and npy contain the same scores, and the headers contain model and version."""
    images = digits(150)
    document, lines, array = [
        await bulk(client, images, f"application/{form}") for form in ("json", "x-ndjson", "x-npy")
    ]
    assert [reply.headers["content-type"] for reply in (document, lines, array)] == [
        "application/json",
        "application/x-ndjson",
        "application/x-npy",
    ]
    items = document.json()["items"]
    assert [json.loads(line) for line in lines.text.splitlines()] == items
    scores = np.load(io.BytesIO(array.content))
    assert scores.dtype == np.float32
    assert scores.tolist() == [item["mse"] for item in items]
    for reply in (lines, array):
        assert float(reply.headers["x-threshold"]) == document.json()["threshold"]
        assert reply.headers["x-model"] == "zero-article@1"


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (["*/*"], "json"),
        (["text/html, Application/X-Npy"], "x-npy"),
        (["application/x-ndjson;q=0.1, application/json"], "json"),
        (["application/x-ndjson; q=0, application/x-npy"], "x-npy"),
        (["application/x-npy;q=0.000, */*"], "json"),
        (["application/x-ndjson", "text/plain"], "x-ndjson"),
        (["text/plain", "application/x-npy", "application/x-ndjson"], "x-npy"),
    ],
)
@SHARED
async def test_the_preferred_media_type_is_chosen(
    shared_client: httpx.AsyncClient, accept: list[str], form: str
) -> None:
    """`Accept` is read by RFC 9110: as one list, by weight; a type of weight 0 is not acceptable."""
    headers = [*NPY.items(), *(("accept", line) for line in accept)]
    reply = await shared_client.post("/score/batch", content=npy(digits(1)), headers=headers)
    assert reply.headers["content-type"] == f"application/{form}"


async def test_a_media_type_that_is_not_offered_is_406(client: httpx.AsyncClient) -> None:
    """If the client accepts none of the offered types, the problem lists them."""
    headers = {**NPY, "accept": "text/html, application/x-npy;q=0"}
    reply = await client.post("/score/batch", content=npy(digits(1)), headers=headers)
    document = assert_problem(reply, 406, "not-acceptable")
    assert "application/x-ndjson" in str(document)


async def test_a_compressed_batch_is_decoded(client: httpx.AsyncClient) -> None:
    """gzip on `/score/batch` gives the scores of the plain body."""
    images = npy(digits(20))
    plain = await client.post("/score/batch", content=images, headers=NPY)
    packed = await client.post(
        "/score/batch", content=gzip.compress(images), headers={**NPY, "content-encoding": "gzip"}
    )
    assert packed.json() == plain.json()


async def test_an_empty_array_is_an_empty_answer(client: httpx.AsyncClient) -> None:
    """No images give no items, in every form."""
    nothing = np.zeros((0, 28, 28), np.uint8)
    assert (await bulk(client, nothing)).json()["items"] == []
    assert (await bulk(client, nothing, "application/x-ndjson")).text == ""
    assert np.load(io.BytesIO((await bulk(client, nothing, "application/x-npy")).content)).shape == (0,)


BAD = {
    "empty-body": b"",
    "not-a-png": b"nonsense",
    "wrong-size": pngs.plain(pngs.gradient(27)),
    "truncated-png": pngs.plain()[:-5],
    "body-too-large": b"\x89PNG" + bytes(100_000),
}


@given(kinds=st.lists(st.sampled_from(["good", *BAD]), min_size=1, max_size=12), data=st.data())
@examples(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_bad_file_stops_no_other(kinds: list[str], data: st.DataObject) -> None:
    """Each file of a form gets its own result, for any mixture of valid and invalid files and any packet boundaries."""
    size, cut = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3000))
    files = [pngs.plain() if kind == "good" else BAD[kind] for kind in kinds]
    request = httpx.Request("POST", "http://test/", **form(*files))
    content = request.read()

    async def arrives() -> AsyncIterator[bytes]:
        for start in range(0, len(content), cut):
            yield content[start : start + cut]

    async def collect() -> list[Chunk]:
        kind = request.headers["content-type"]
        found = chunks(kind, arrives(), size=size, largest_file=65536, most_files=len(kinds))
        return [chunk async for chunk in found]

    found = asyncio.run(collect())
    said = []
    for chunk in found:
        assert len(chunk.pixels) == 784 * (chunk.count - len(chunk.problems))
        assert bytes(chunk.pixels) == pngs.gradient().tobytes() * (chunk.count - len(chunk.problems))
        said += [chunk.problems[n].type if n in chunk.problems else "/problems/good" for n in range(chunk.count)]
    assert said == [f"/problems/{kind}" for kind in kinds]
    assert all(chunk.count == size for chunk in found[:-1])


async def test_problems_stand_in_the_place_of_their_item(client: httpx.AsyncClient) -> None:
    """A form with bad files among good ones gets results and problems in order, and NaN in npy."""
    files = form(pngs.plain(), b"nonsense", pngs.plain(digits(1)[0]), b"")
    reply = (await client.post("/score/batch", **files)).json()
    kinds = [item.get("problem", {}).get("type", "/").rpartition("/")[2] for item in reply["items"]]
    assert kinds == ["", "not-a-png", "", "empty-body"]
    assert (reply["count"], reply["failed"]) == (4, 2)
    scores = await client.post("/score/batch", headers={"accept": "application/x-npy"}, **files)
    assert np.isnan(np.load(io.BytesIO(scores.content))).tolist() == [False, True, False, True]


async def test_a_batch_without_a_valid_image_stores_nothing(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written: a backend that is down may accept an empty write, and would count as up again."""
    written: list[int] = []
    async with running(make_settings()) as client:
        put = Reconstructions.put

        def counting(store: Reconstructions, records: Sequence[Record], *given: Any) -> None:
            written.append(len(records))
            put(store, records, *given)

        monkeypatch.setattr(Reconstructions, "put", counting)
        for files, failed in ((form(b"nonsense", b""), 2), (form(b"nonsense", pngs.plain()), 1)):
            reply = (await client.post("/score/batch?store=true", **files)).json()
            assert (reply["count"], reply["failed"]) == (2, failed)
    assert written == [1]


async def test_only_stored_batches_have_ids(client: httpx.AsyncClient) -> None:
    """With store=true, the reply and picture of each valid item can be fetched; by default, nothing is stored."""
    images = digits(10)
    members = (await raw(client, pngs.plain(images[0]))).json().keys()
    assert all("id" not in item for item in (await bulk(client, images)).json()["items"])
    items = (await bulk(client, images, query="?store=true")).json()["items"]
    for image, item in zip(images, items, strict=True):
        kept = await client.get(item["reconstruction"], headers={"accept": "application/json"})
        assert kept.json().keys() == members
        assert kept.json()["mse"] == item["mse"]
        assert kept.json()["id"] == item["id"]
        picture = await client.get(item["reconstruction"] + "?view=input")
        assert picture.content == (await _picture_of(client, image))


async def _picture_of(client: httpx.AsyncClient, image: np.ndarray) -> bytes:
    single = (await raw(client, pngs.plain(image))).json()
    return (await client.get(single["reconstruction"] + "?view=input")).content


async def test_model_and_alpha(client: httpx.AsyncClient) -> None:
    """`alpha` changes the threshold, `model` selects the version, and an unknown model is a problem."""
    images = digits(3)
    strict, loose = [(await bulk(client, images, query=f"?alpha={alpha}")).json() for alpha in (0.01, 0.2)]
    assert strict["threshold"] > loose["threshold"]
    assert (await bulk(client, images, query="?model=zero-article@1")).json()["version"] == 1
    assert_problem(await bulk(client, images, query="?model=nobody"), 404, "model-not-found")
    assert_problem(await bulk(client, images, query="?alpha=0.0000001"), 422, "unsupported-alpha")
    assert_problem(await bulk(client, images, query="?stor=true"), 422, "invalid-parameter")


GOOD = npy(np.zeros((3, 28, 28), np.uint8))


HOSTILE_TYPES = ("M8[s/0]", "m8[s/0]", "<M8[D/0]", "M8[25s/0]", "i4,M8[s/0]", "u1,u1", "(9,9)u1", "u1;")
"""numpy ends the process for the first ones: it divides by zero."""


def header_of(length: str) -> bytes:
    """Return the header of an npy file that declares so many images, in Python's words."""
    header = f"{{'descr':'|u1','fortran_order':False,'shape':({length},28,28)}}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("content", "status", "kind"),
    [
        (b"", 400, "empty-body"),
        (b"\x93NUM", 400, "malformed-array"),
        (b"nonsense that is longer", 400, "malformed-array"),
        (GOOD[:40], 400, "malformed-array"),
        (GOOD[:-1], 400, "malformed-array"),
        (GOOD + b"x", 400, "malformed-array"),
        (GOOD.replace(b"'descr'", b"'other'"), 400, "malformed-array"),
        (GOOD[:8] + b"\xff\xff" + GOOD[10:], 400, "malformed-array"),
        (b"\x93NUMPY\x09\x00" + GOOD[8:], 400, "malformed-array"),
        *((GOOD.replace(b"'|u1'", f"'{kind}'".encode()), 422, "wrong-array") for kind in HOSTILE_TYPES),
        (npy(np.zeros((3, 28, 28), np.float32)), 422, "wrong-array"),
        (npy(np.zeros((3, 27, 28), np.uint8)), 422, "wrong-array"),
        (npy(np.zeros((28, 28), np.uint8)), 422, "wrong-array"),
        (npy(np.asfortranarray(np.zeros((3, 28, 28), np.uint8))), 422, "wrong-array"),
        (npy(np.array([{}], dtype=object)), 422, "wrong-array"),
        (header_of("-1"), 422, "wrong-array"),
        (header_of(str(2**63)), 422, "wrong-array"),
        (header_of("9" * 3900), 422, "wrong-array"),
        (header_of("0x" + "f" * 3900) + GOOD[-784:], 422, "wrong-array"),
    ],
)
@SHARED
async def test_what_is_no_array_of_images(
    shared_client: httpx.AsyncClient, content: bytes, status: int, kind: str
) -> None:
    """Every body except a complete npy file of uint8 [N, 28, 28] is rejected with a reason."""
    assert_problem(await shared_client.post("/score/batch", content=content, headers=NPY), status, kind)


@pytest.mark.parametrize("shape", [(5, 1, 28, 28), (5, 28, 28, 1), (5, 784)])
@SHARED
async def test_other_shapes_of_the_same_bytes_are_taken(
    shared_client: httpx.AsyncClient, shape: tuple[int, ...]
) -> None:
    """An array with a channel axis, or with flat images, gives the scores of [N, 28, 28]."""
    images = digits(5)
    assert (await bulk(shared_client, images.reshape(shape))).json() == (await bulk(shared_client, images)).json()


UNIT = np.round(digits(3) / 255.0, 3)
CONVERTED = {
    "0..1": UNIT,
    "0..1 in float32": UNIT.astype(np.float32),
    "0..1 in float16": UNIT.astype(np.float16),
    "0..1, big-endian": UNIT.astype(">f4"),
    "-1..1": UNIT * 2 - 1,
    "-1..1 in float32": (UNIT * 2 - 1).astype(np.float32),
    "0..255": digits(3).astype(float),
    "integers": digits(3).astype(np.int64),
    "integers, big-endian": digits(3).astype(">i4"),
    "16 bits": digits(3).astype(np.uint16) * 257,
    "bool": digits(3) > 127,
    "0 and 1": (digits(3) > 127).astype(np.int32),
}


@pytest.mark.parametrize("name", CONVERTED)
@SHARED
async def test_the_hint_for_an_array_is_right(shared_client: httpx.AsyncClient, name: str) -> None:
    """The conversion in the hint, applied literally, gives the image within one grey level."""
    images = CONVERTED[name]
    document = assert_problem(await bulk(shared_client, images), 422, "wrong-array")
    assert ("big-endian" in document["detail"]) == ("big-endian" in name)
    assert images.dtype.name in document["detail"]
    converted = eval(document["hint"].split(": ")[-1].rstrip("."), {"numpy": np, "images": images})
    wanted = np.where(digits(3) > 127, 255, 0) if name in ("bool", "0 and 1") else digits(3)
    assert converted.dtype == np.uint8
    assert np.abs(converted.astype(int) - wanted).max() <= 1
    assert (await bulk(shared_client, converted)).status_code == 200


@pytest.mark.parametrize(
    "images",
    [
        np.array([[[0.0, 0.5]]]) - 0.42,
        np.random.default_rng(0).normal(size=(2, 28, 28)),
        np.full((2, 28, 28), np.nan),
        np.full((2, 28, 28), 16.0),
        np.full((2, 28, 28), 1023, np.uint16),
        np.full((2, 28, 28), -3, np.int8),
        np.zeros((0, 28, 28), np.float32),
    ],
)
@SHARED
async def test_an_uncertain_scale_gets_no_formula(shared_client: httpx.AsyncClient, images: np.ndarray) -> None:
    """If the range of an array does not show its scale, the hint contains no conversion to copy."""
    assert "numpy." not in assert_problem(await bulk(shared_client, images), 422, "wrong-array")["hint"]


async def test_the_range_is_that_of_the_whole_array(client: httpx.AsyncClient) -> None:
    """Blank images at the beginning do not make 0..255 look like 0..1."""
    images = np.concatenate([np.zeros((2000, 28, 28), np.float32), digits(1).astype(np.float32)])
    assert "255 is the full stroke" in assert_problem(await bulk(client, images), 422, "wrong-array")["hint"]


@pytest.mark.parametrize("kind", ["", "application/octet-stream"])
@SHARED
async def test_a_general_content_type_is_taken_for_an_array(shared_client: httpx.AsyncClient, kind: str) -> None:
    """Without a content type, or with a general one, a body that begins as npy is scored, and no other body."""
    headers = {"content-type": kind} if kind else {}
    assert (await shared_client.post("/score/batch", content=npy(digits(2)), headers=headers)).json()["count"] == 2
    refused = await shared_client.post("/score/batch", content=b"nonsense", headers=headers)
    assert_problem(refused, 415, "unsupported-media-type")


@pytest.mark.parametrize("fields", [{}, {"alpha": "0.1"}])
@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
@SHARED
async def test_a_form_without_files_is_a_problem(
    shared_client: httpx.AsyncClient, fields: dict[str, str], accept: str
) -> None:
    """A form without a file gets a problem, not an empty result."""
    parts = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    )
    headers = {"content-type": "multipart/form-data; boundary=b", "accept": accept}
    reply = await shared_client.post("/score/batch", content=(parts + "--b--\r\n").encode(), headers=headers)
    assert "no file" in assert_problem(reply, 400, "missing-file")["detail"]


async def test_unknown_fields_of_a_batch_form_are_rejected_by_name(client: httpx.AsyncClient) -> None:
    """An unknown form field gets 422 with its name, and is never ignored."""
    reply = await client.post("/score/batch", data={"include": "reconstruction"}, **form(pngs.plain()))
    assert "`include`" in assert_problem(reply, 422, "invalid-parameter")["detail"]
    reply = await client.post("/score/batch", data={"fit": "mnist"}, **form(pngs.plain()))
    assert_problem(reply, 422, "invalid-parameter")


async def test_other_bodies_are_refused(client: httpx.AsyncClient) -> None:
    """A PNG without a form, and a form with another field, with an early end or without content, are rejected."""
    assert_problem(
        await client.post("/score/batch", content=b"x", headers={"content-type": "image/png"}),
        415,
        "unsupported-media-type",
    )
    assert_problem(await client.post("/score/batch", files={"file": ("a.png", pngs.plain())}), 400, "missing-file")
    request = httpx.Request("POST", "http://test/score/batch", **form(pngs.plain()))
    cut = request.read()[:-6]
    assert_problem(
        await client.post("/score/batch", content=cut, headers={"content-type": request.headers["content-type"]}),
        400,
        "malformed-multipart",
    )
    assert_problem(
        await client.post("/score/batch", headers={"content-type": "multipart/form-data; boundary=x"}),
        400,
        "empty-body",
    )


@given(st.binary(max_size=200), st.integers(0, 120))
@examples(max_examples=200)
def test_no_header_breaks_the_reader(noise: bytes, at: int) -> None:
    """For any bytes of an npy header, the reader returns a count, raises a problem, or needs more bytes."""
    for content in (noise, GOOD[:at] + noise + GOOD[at + len(noise) :]):
        try:
            header = array_header(content)
        except Problem:
            continue
        assert header is None or header[0] >= 0


async def test_the_limit_holds_with_and_without_a_declaration(make_settings: Callable[..., Settings]) -> None:
    """A body above the limit is 413, whether its length is declared or it comes in pieces, and ends the connection."""
    async with running(make_settings(batch_max_body_bytes=5000)) as client:
        content = npy(digits(7))

        async def in_pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(content), 1000):
                yield content[start : start + 1000]

        for body in (content, in_pieces()):
            refused = await client.post("/score/batch", content=body, headers=NPY)
            assert_problem(refused, 413, "body-too-large")
            assert refused.headers["connection"] == "close"
        assert (await bulk(client, digits(6))).status_code == 200


async def test_a_body_that_breaks_off_after_the_first_lines(make_settings: Callable[..., Settings]) -> None:
    """NDJSON that was begun ends with the problem, under the index of the first image without a result."""
    async with running(make_settings(batch_chunk_images=4 // PASSES_AT_ONCE)) as client:
        content = npy(digits(20))

        async def cut() -> AsyncIterator[bytes]:
            yield content[: 128 + 784 * 10]

        reply = await client.post("/score/batch", content=cut(), headers={**NPY, "accept": "application/x-ndjson"})
        items = [json.loads(line) for line in reply.text.splitlines()]
        assert [item["index"] for item in items] == list(range(9))
        assert "problem" not in items[7]
        assert items[8]["problem"]["type"] == "/problems/malformed-array"


async def test_a_failure_after_the_first_lines_is_the_last_line(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After an error during an NDJSON reply, the last line contains a problem, and the log contains the cause."""
    async with running(make_settings(batch_chunk_images=4 // PASSES_AT_ONCE)) as client:

        async def broken(*_: Any, **__: Any) -> AsyncIterator[Chunk]:
            for _ in range(3):
                yield Chunk(4, bytearray(4 * 784))
            raise ZeroDivisionError

        monkeypatch.setattr("app.http.npy.read_array", broken)
        reply = await bulk(client, digits(1), "application/x-ndjson")
        items = [json.loads(line) for line in reply.text.splitlines()]
        assert [item["index"] for item in items] == list(range(len(items)))
        assert len(items) > 1
        assert items[-1]["problem"]["type"] == "/problems/internal-error"
        assert [line.message for line in caplog.records] == ["request failed"]
        assert services(client).batch.running == 0


class Gated:
    """A detector whose passes wait until a gate is opened."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self.gate = threading.Event()

    def score(self, images: np.ndarray) -> Any:
        """Score a chunk, once the gate is open."""
        assert self.gate.wait(30)
        return self._detector.score(images)


async def test_too_many_batches_are_refused(make_settings: Callable[..., Settings]) -> None:
    """Above the maximum number of requests that are scored, the response is 503 with Retry-After."""
    async with running(make_settings(batch_max_requests=1)) as client:
        serving = services(client).registry.current("zero-article")
        assert serving is not None
        serving.detector = gated = Gated(serving.detector)  # type: ignore[assignment]
        first = asyncio.create_task(bulk(client, digits(10)))
        await until(lambda: services(client).batch._scorer.working == 1)
        refused = await bulk(client, digits(1))
        assert_problem(refused, 503, "overloaded")
        assert refused.headers["retry-after"]
        gated.gate.set()
        assert (await first).status_code == 200
        assert (await bulk(client, digits(1))).status_code == 200
        assert services(client).batch._scorer.working == 0


class NearThreshold(Gated):
    """A detector that scores all images at the threshold, and waits at the gate before it scores one of them alone."""

    def __init__(self, detector: Detector, threshold: float) -> None:
        super().__init__(detector)
        self._threshold = threshold
        self.asked = threading.Event()

    def score(self, images: np.ndarray) -> Any:
        """Score a chunk."""
        scores, *others = self._detector.score(images)
        return (np.full_like(scores, self._threshold), *others)

    def score_alone(self, image: np.ndarray) -> float:
        """Score an image, once the gate is open."""
        self.asked.set()
        assert self.gate.wait(30)
        return self._detector.score_alone(image)


async def test_images_near_the_threshold_are_work_too(make_settings: Callable[..., Settings]) -> None:
    """A request whose images are scored again counts as one that is being scored until they have been."""
    async with running(make_settings(batch_max_requests=1)) as client:
        serving = services(client).registry.current("zero-article")
        assert serving is not None
        serving.detector = near = NearThreshold(serving.detector, serving.manifest.threshold)  # type: ignore[assignment]
        first = asyncio.create_task(bulk(client, digits(10)))
        await until(near.asked.is_set)
        assert_problem(await bulk(client, digits(1)), 503, "overloaded")
        near.gate.set()
        assert (await first).status_code == 200
        assert services(client).batch._scorer.working == 0


async def test_slow_clients_hold_no_places(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """Requests that wait for their clients do not keep another client from scoring, and lose places to it."""
    async with running(make_settings(batch_max_requests=1, batch_max_connections=4)) as client:
        gate = asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield GOOD[:500]
            await gate.wait()
            yield GOOD[500:]

        slow = [asyncio.create_task(client.post("/score/batch", content=slowly(), headers=NPY)) for _ in range(4)]
        await until(lambda: services(client).batch.running == 4)
        assert_problem(await bulk(client, digits(1)), 503, "overloaded")  # a fifth request of the same client
        transport = httpx.ASGITransport(client.app, client=("192.0.2.7", 1))  # type: ignore[attr-defined]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
            assert (await bulk(other, digits(5))).json()["count"] == 5
        assert (await raw(client, zero)).status_code == 200
        gate.set()
        replies = await asyncio.gather(*slow)
        assert sorted(reply.status_code for reply in replies) == [200, 200, 200, 503]
        assert services(client).batch.running == services(client).batch._places.taken == 0


async def test_a_request_that_loses_its_place_ends_with_the_reason(make_settings: Callable[..., Settings]) -> None:
    """After an error, an NDJSON reply ends with a line that contains the problem, after the lines of scored images."""
    async with running(make_settings(batch_max_connections=2, batch_chunk_images=4)) as client:
        content, lines, never = npy(digits(400)), list[dict[str, Any]](), asyncio.Event()
        scope = {**scope_of("application/x-npy", "application/x-ndjson"), "client": ("192.0.2.7", 1)}

        def request(body: bytes, lines: list[dict[str, Any]]) -> asyncio.Task[None]:
            pieces = [body]

            async def receive() -> dict[str, Any]:
                if not pieces:
                    await never.wait()
                return {"type": "http.request", "body": pieces.pop(), "more_body": True}

            async def send(message: Any) -> None:
                lines.extend(map(json.loads, message.get("body", b"").splitlines()))

            return asyncio.create_task(client.app(dict(scope), receive, send))  # type: ignore[attr-defined]

        first = request(content[:500], [])
        await until(lambda: services(client).batch.running == 1)
        second = request(content[: 784 * 300], lines)
        await until(lambda: lines)
        transport = httpx.ASGITransport(client.app, client=("192.0.2.8", 1))  # type: ignore[attr-defined]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
            assert (await bulk(other, digits(5))).json()["count"] == 5
        await second
        assert lines[-1]["problem"]["type"] == "/problems/overloaded"
        assert "another client" in lines[-1]["problem"]["detail"]
        assert [line["index"] for line in lines] == list(range(len(lines)))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_begun_json_reply_that_loses_its_place_is_no_internal_error(
    make_settings: Callable[..., Settings],
) -> None:
    """A reply with a length has no place for the problem: it ends early, and the metrics have the cause."""
    async with running(make_settings(batch_max_connections=2)) as client:
        scope = {**scope_of("application/x-npy", "application/json"), "client": ("192.0.2.7", 1)}
        begun, never = list[Any](), asyncio.Event()

        def request(body: bytes, *, complete: bool) -> asyncio.Task[None]:
            pieces = [body]

            async def receive() -> dict[str, Any]:
                if not pieces:
                    await never.wait()
                return {"type": "http.request", "body": pieces.pop(), "more_body": not complete}

            async def send(message: Any) -> None:
                begun.append(message)
                if message["type"] == "http.response.body":
                    await never.wait()

            return asyncio.create_task(client.app(dict(scope), receive, send))  # type: ignore[attr-defined]

        first = request(npy(digits(400))[:500], complete=False)
        await until(lambda: services(client).batch.running == 1)
        second = request(npy(digits(5)), complete=True)
        await until(lambda: len(begun) == 2)
        transport = httpx.ASGITransport(client.app, client=("192.0.2.8", 1))  # type: ignore[attr-defined]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
            assert (await bulk(other, digits(5))).json()["count"] == 5
        await second
        assert [message["type"] for message in begun] == ["http.response.start", "http.response.body"]
        metrics = (await client.get("/metrics")).text
        assert 'anomaly_http_requests_total{route="/score/batch",status="499"} 1.0' in metrics
        assert 'anomaly_degraded_total{cause="batch_places"} 1.0' in metrics
        assert 'anomaly_problems_total{type="internal-error"} 0.0' in metrics
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_client_that_reads_nothing_stops_the_body_with_a_reason(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the maximum of unsent bytes the body is read no further, and the last line contains the reason."""
    monkeypatch.setattr("app.http.batch_replies._MAX_UNSENT_BYTES", 2000)
    async with running(make_settings(body_timeout_ms=200, batch_chunk_images=4)) as client:
        content, lines, reads = npy(digits(400)), list[dict[str, Any]](), 0
        may_send = asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal reads
            reads += 1
            start = (reads - 1) * 784 * 16
            return {"type": "http.request", "body": content[start : start + 784 * 16], "more_body": True}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await may_send.wait()
                lines.extend(map(json.loads, message["body"].splitlines()))

        scope = scope_of("application/x-npy", "application/x-ndjson")
        task = asyncio.create_task(client.app(scope, receive, send))  # type: ignore[attr-defined]
        reply_waits = services(client).batch
        await until(lambda: reply_waits.running == 1 and reads > 1)
        asyncio.get_running_loop().call_later(0.25, may_send.set)
        await task
        assert 1 < reads < 10
        problem = lines[-1]["problem"]
        assert (problem["status"], problem["type"]) == (408, "/problems/body-timeout")
        assert "have not been read" in problem["detail"]
        assert [line["index"] for line in lines] == list(range(len(lines)))


class Counting:
    """A detector that records the number of images of each call."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self.calls: list[tuple[str, int]] = []

    def score(self, images: np.ndarray) -> Any:
        """Score a chunk of a batch, or its first images."""
        found = self._detector.score(images)
        self.calls.append(("chunk", len(found[0])))
        return found

    def score_alone(self, image: np.ndarray) -> float:
        """Score an image near the threshold again."""
        return self._detector.score_alone(image)

    def draw(self, images: np.ndarray) -> Any:
        """Score a micro-batch."""
        self.calls.append(("single", len(images)))
        return self._detector.draw(images)


def count_calls(client: httpx.AsyncClient) -> Counting:
    serving = services(client).registry.current("zero-article")
    assert serving is not None
    serving.detector = counting = Counting(serving.detector)  # type: ignore[assignment]
    return counting


async def test_a_single_score_waits_for_one_pass_at_most(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """A single score waits for at most one pass of a batch request, and the batch then continues at its next image."""
    async with running(make_settings(batch_chunk_images=16, batch_max_requests=2)) as client:
        counting = count_calls(client)
        many = [digits(3000, seed) for seed in range(2)]
        alone = [(await bulk(client, images, accept=NPY["content-type"])).content for images in many]
        whole = {size for _, size in counting.calls}
        assert whole == {16 * PASSES_AT_ONCE, 3000 % (16 * PASSES_AT_ONCE)}
        counting.calls.clear()
        batches = [asyncio.create_task(bulk(client, images, accept=NPY["content-type"])) for images in many]
        waits = []
        while not all(task.done() for task in batches):
            before = len(counting.calls)
            await raw(client, zero)
            place = next(n for n in range(before, len(counting.calls)) if counting.calls[n][0] == "single")
            waits.append(place - before)
        assert [reply.content for reply in await asyncio.gather(*batches)] == alone
        assert len(waits) > 5
        assert max(waits) <= 2
        sizes = [size for kind, size in counting.calls if kind == "chunk"]
        assert sum(sizes) == 6000
        assert {*sizes} - whole


async def test_a_client_that_leaves_stops_the_work(make_settings: Callable[..., Settings]) -> None:
    """After the client has left, at most the chunks that were under way are scored, and its place is free again."""
    async with running(make_settings(batch_chunk_images=8, batch_max_requests=1)) as client:
        counting = count_calls(client)
        content, sent = npy(digits(800)), []

        async def receive() -> dict[str, Any]:
            if len(sent) == 3:
                return {"type": "http.disconnect"}
            sent.append(1)
            start = (len(sent) - 1) * 784 * 16
            return {"type": "http.request", "body": content[start : start + 784 * 16], "more_body": True}

        async def send(message: Any) -> None: ...

        await client.app(scope_of("application/x-npy"), receive, send)  # type: ignore[attr-defined]
        assert sum(size for _, size in counting.calls) <= 48
        assert services(client).batch.running == 0
        assert 'requests_total{route="/score/batch",status="499"} 1.0' in (await client.get("/metrics")).text
        assert (await bulk(client, digits(1))).status_code == 200


class Broken:
    """A detector that fails once, at a pass that begins with image 4, and returns NaN for images 9 and 10."""

    def __init__(self, detector: Detector, images: np.ndarray) -> None:
        self._detector = detector
        # Identify images by their pixels, because the thread scores images of other requests between the chunks.
        self._places = {image.tobytes(): place for place, image in enumerate(images)}
        self._failed = False

    def score(self, images: np.ndarray) -> Any:
        """Score a chunk or its first images, or fail."""
        places = [self._places[image.tobytes()] for image in images]
        if places[0] == 4 and not self._failed:
            self._failed = True
            raise RuntimeError("out of memory at /secret/path")
        mse, reason = self._detector.score(images)
        wrong = {9: np.nan, 10: np.inf}
        return np.array([wrong.get(place, score) for place, score in zip(places, mse, strict=False)], mse.dtype), reason


async def test_a_chunk_that_fails_is_its_own_problem(make_settings: Callable[..., Settings]) -> None:
    """If the model fails for a chunk, or returns NaN for some images, exactly these items have a problem."""
    async with running(make_settings(batch_chunk_images=4 // PASSES_AT_ONCE)) as client:
        serving = services(client).registry.current("zero-article")
        images = digits(16)
        assert serving is not None
        serving.detector = Broken(serving.detector, images)  # type: ignore[assignment]
        reply = await bulk(client, images)
        assert "secret" not in reply.text
        failed = [item["index"] for item in reply.json()["items"] if "problem" in item]
        assert failed == [4, 5, 6, 7, 9, 10]
        assert {item["problem"]["status"] for item in reply.json()["items"] if "problem" in item} == {500}
        # One pass that raised, and one with the images 9 and 10.
        assert "anomaly_forward_pass_failures_total 2.0" in (await client.get("/metrics")).text
        scored = [item for item in reply.json()["items"] if "problem" not in item]
        assert reply.json()["anomalous"] == sum(item["is_anomaly"] for item in scored)
        again = await bulk(client, images, accept="application/x-npy")
        assert np.flatnonzero(np.isnan(np.load(io.BytesIO(again.content)))).tolist() == [9, 10]
        assert np.isfinite(np.load(io.BytesIO(again.content))).sum() == 14


async def test_memory_does_not_grow_with_the_body() -> None:
    """Reading 50,000 images that arrive in pieces never holds more than a few chunks."""
    header = npy(np.zeros((0, 28, 28), np.uint8)).replace(b"(0, 28, 28), }    ", b"(50000, 28, 28), }")[:128]
    piece = bytes(784 * 100)

    async def receive() -> dict[str, Any]:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": header if left == 500 else piece, "more_body": left > 0}

    left = 501
    assert array_header(header) == (50000, 128)
    tracemalloc.start()
    try:
        body = pieces(receive, declared=None, limit=1 << 30, timeout=5, slowest=1)
        count = 0
        async for chunk in chunks("application/x-npy", body, size=64, largest_file=1, most_files=1):
            count += chunk.count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 50000
    assert peak < 2_000_000


async def test_a_client_that_left_is_not_a_short_body() -> None:
    """A disconnect while the body arrives is distinguished from the end of the body."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientLeft):
        async for _ in pieces(receive, declared=None, limit=10, timeout=1, slowest=1):
            pass


def scope_of(kind: str, accept: str = "application/json", query: bytes = b"") -> dict[str, Any]:
    """Return the ASGI scope of a batch request."""
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/score/batch",
        "query_string": query,
        "headers": [(b"content-type", kind.encode()), (b"accept", accept.encode())],
    }


@virtual_time
async def test_a_trickle_is_not_progress() -> None:
    """A body below the minimum rate ends in 408, although each piece arrives in time; above the rate it is read."""
    clock = asyncio.get_running_loop().time

    async def read(pause: float, slowest: float) -> int:
        left = 40

        async def receive() -> dict[str, Any]:
            nonlocal left
            left -= 1
            await advance(pause)
            return {"type": "http.request", "body": b"x" * 10, "more_body": left > 0}

        body = pieces(receive, declared=None, limit=1000, timeout=0.2, slowest=slowest, clock=clock)
        return sum([len(piece) async for piece in body])

    with pytest.raises(BodyTimeout):
        await read(0.02, slowest=2000)
    assert await read(0, slowest=2000) == 400
    assert await read(0.02, slowest=10) == 400


@virtual_time
async def test_the_service_may_take_its_time_over_a_body() -> None:
    """The time that the service takes between two pieces does not count towards the minimum rate."""
    left = 5

    async def receive() -> dict[str, Any]:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b"x", "more_body": left > 0}

    clock, count = asyncio.get_running_loop().time, 0
    async for _ in pieces(receive, declared=None, limit=1000, timeout=0.1, slowest=1000, clock=clock):
        await advance(0.05)
        count += 1
    assert count == 5


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson", "application/x-npy"])
async def test_a_client_that_does_not_read_is_let_go_of(make_settings: Callable[..., Settings], accept: str) -> None:
    """A client that does not read its reply loses its place after the timeout, and the next request gets the place."""
    async with running(make_settings(body_timeout_ms=200, batch_max_requests=1)) as client:
        content = npy(digits(200))

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        async with asyncio.timeout(20):
            await client.app(scope_of("application/x-npy", accept), receive, send)  # type: ignore[attr-defined]
        assert services(client).batch.running == 0
        assert (await bulk(client, digits(1))).status_code == 200


async def test_a_form_has_a_bounded_number_of_files(make_settings: Callable[..., Settings]) -> None:
    """One file above the limit gets 413, for files of any size; a form at the limit is scored."""
    async with running(make_settings(batch_max_files=5)) as client:
        assert (await client.post("/score/batch", **form(*[pngs.plain()] * 5))).json()["count"] == 5
        assert_problem(await client.post("/score/batch", **form(*[b""] * 6)), 413, "body-too-large")


async def test_a_hundred_megabytes_of_empty_files_stay_small() -> None:
    """A form with very many empty files is rejected during the first pieces, before the files use memory."""
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n\r\n'
    read = 0

    async def arrives() -> AsyncIterator[bytes]:
        nonlocal read
        while read < 100_000_000:
            read += 1000 * len(part)
            yield part * 1000

    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            async for _ in chunks(
                "multipart/form-data; boundary=b", arrives(), size=64, largest_file=65536, most_files=10_000
            ):
                pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read < 1_000_000
    assert peak < 4_000_000


async def test_a_json_document_is_held_once(client: httpx.AsyncClient) -> None:
    """While a JSON reply is sent, it uses less than 1.1 times the memory of its unsent part."""
    version = services(client).registry.current("zero-article")
    rule = DecisionRule.for_alpha(version.manifest, version.calibration)
    job = BatchJob(version, rule, owner=None, store=False)
    sent = 0

    async def send(message: Any) -> None:
        nonlocal sent
        sent += len(message.get("body", b""))

    reply = JsonReply(BatchExchange(job, "", 5.0, 1e6), send)
    for _ in range(500):
        reply.add(ScoredChunk([0.123456789] * 64, [None] * 64, [None] * 64, 0, {}))
        job.tally.count += 64
    tracemalloc.start()
    try:
        await reply.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sent > 2_000_000
    assert peak < 200_000


@pytest.mark.parametrize("store", ["false", "true"])
async def test_a_batch_says_where_its_time_went(client: httpx.AsyncClient, store: str) -> None:
    """JSON replies have Server-Timing, and every stage has a metric; NDJSON begins before the times are known."""
    document, lines = [
        await bulk(client, digits(70), f"application/{kind}", f"?store={store}") for kind in ("json", "x-ndjson")
    ]
    parts = dict(part.split(";dur=") for part in document.headers["server-timing"].split(", "))
    assert list(parts) == ["decode", "queue", "forward", "store"]
    assert float(parts["forward"]) > 0
    assert (float(parts["store"]) > 0.1) == (store == "true")
    assert "server-timing" not in lines.headers
    text = (await client.get("/metrics")).text
    assert 'anomaly_batch_stage_duration_seconds_count{stage="forward"} 2.0' in text
