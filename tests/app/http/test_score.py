"""`POST /score` over ASGI, from the view of a client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import io
import random
import sqlite3
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from app.http import fitting, queries
from app.settings import Settings
from tests import pngs
from tests.app.images.test_png import BOMBS, REFUSED
from tests.conftest import SHARED, running, services
from tests.requests import PNG, assert_problem, form, raw

FIELDS = {
    "id",
    "model",
    "version",
    "mse",
    "threshold",
    "alpha",
    "p_value",
    "is_anomaly",
    "reason",
    "reconstruction",
}


async def test_reply_has_every_field(client: httpx.AsyncClient, zero: bytes) -> None:
    """A score names its model, threshold, verdict, p-value and where the reconstruction is."""
    reply = (await raw(client, zero)).json()
    assert set(reply) == FIELDS
    assert reply["is_anomaly"] == (reply["mse"] > reply["threshold"])
    assert reply["reconstruction"] == f"/reconstruction/{reply['id']}"
    assert 0 < reply["p_value"] <= 1
    assert reply["reason"] is None


async def test_both_body_forms_score_alike(client: httpx.AsyncClient, zero: bytes) -> None:
    """The same PNG has the same mse as raw body and as the only part, with and without a file name."""
    replies = [
        await raw(client, zero),
        await client.post("/score", files={"file": ("zero.png", zero, "image/png")}),
        await form(client, ("file", None, zero)),
        await form(client, ("file", "zero.png", zero)),
        await form(client, ("file", 'we"ird.png', zero)),
    ]
    assert [reply.status_code for reply in replies] == [200] * 5
    assert len({reply.json()["mse"] for reply in replies}) == 1
    assert len({reply.json()["id"] for reply in replies}) == 5


async def test_a_boundary_inside_the_image_is_not_the_end(client: httpx.AsyncClient) -> None:
    """Bytes that look like half a boundary inside the file do not cut it."""
    png = pngs.plain(None, pngs.chunk(b"tEXt", b"a\0\r\n--b0unda\r\n\r\n--"))
    assert (await form(client, ("file", "a.png", png))).json()["mse"] == (await raw(client, png)).json()["mse"]


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "no bytes"])
async def test_bad_images_are_problems(client: httpx.AsyncClient, tmp_path: Path, name: str) -> None:
    """Each bad image is a 422 with its own type in both body forms, and nothing is stored."""
    png, kind = REFUSED[name]
    for response in (await raw(client, png), await form(client, ("file", "a.png", png))):
        document = assert_problem(response, 422, kind.type.removeprefix("/problems/"))
        assert document["hint"]
    assert await stored(client, tmp_path / "reconstructions.db") == 0


async def stored(client: httpx.AsyncClient, store: Path) -> int:
    """Return the number of reconstructions in the file of the store."""
    await services(client).reconstructions.check()  # the store's thread has finished every write before it
    with contextlib.closing(sqlite3.connect(store)) as connection:
        count: int = connection.execute("SELECT count(*) FROM entries").fetchone()[0]
    return count


FORMS = {
    "no part": ((), 400, "missing-file"),
    "no part named file": ((("image", "a.png", b"x"),), 400, "missing-file"),
    "a field that no parameter has": ((("note", None, b"x"), ("file", "a.png", b"x")), 422, "invalid-parameter"),
    "two files": ((("file", "a.png", b"x"), ("file", "b.png", b"x")), 400, "too-many-files"),
    "a second file under another name": ((("file", "a.png", b"x"), ("more", "b.png", b"x")), 400, "too-many-files"),
    "an empty file": ((("file", "a.png", b""),), 400, "empty-body"),
    "a hundred parts": (tuple((f"n{place}", None, b"x") for place in range(100)), 422, "invalid-parameter"),
    "a hundred files": (tuple(("file", "a.png", b"x") for _ in range(100)), 400, "too-many-files"),
}


@pytest.mark.parametrize("name", FORMS)
@SHARED
async def test_bad_forms_are_problems(shared_client: httpx.AsyncClient, name: str) -> None:
    """A form without exactly one image gets a problem that states the reason."""
    parts, status, kind = FORMS[name]
    assert_problem(await form(shared_client, *parts), status, kind)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"no boundary at all"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n'),
        ("multipart/form-data; boundary=x", b"--x\r\nnonsense\r\n\r\nabc\r\n--x--\r\n"),
        (f"multipart/form-data; boundary={'x' * 300}", b"abc"),
        ("multipart/form-data; boundary=x", b"\r\n" * 20_000),
    ],
)
@SHARED
async def test_malformed_forms_are_400(shared_client: httpx.AsyncClient, content_type: str, body: bytes) -> None:
    """A malformed form gets 400, and never 500."""
    response = await shared_client.post("/score", content=body, headers={"content-type": content_type})
    document = response.json()
    assert response.status_code == 400, document
    assert document["type"] in ("/problems/malformed-multipart", "/problems/missing-file")


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/json", "image/jpeg", "application/x-www-form-urlencoded", "application/x-pickle"],
)
@SHARED
async def test_other_content_types_are_415(shared_client: httpx.AsyncClient, zero: bytes, content_type: str) -> None:
    """Other content types are rejected, whatever the body is."""
    response = await shared_client.post("/score", content=zero, headers={"content-type": content_type})
    assert_problem(response, 415, "unsupported-media-type")


@pytest.mark.parametrize("content_type", ["", "application/octet-stream", "image/x-png"])
@SHARED
async def test_general_content_types_are_accepted_for_a_png(
    shared_client: httpx.AsyncClient, zero: bytes, content_type: str
) -> None:
    """Without a content type, or with a general one, a body that begins as a PNG is scored, and no other body."""
    headers = {"content-type": content_type} if content_type else {}
    assert (await shared_client.post("/score", content=zero, headers=headers)).status_code == 200
    status = (await shared_client.post("/score", content=b"nonsense", headers=headers)).status_code
    assert status == (422 if content_type == "image/x-png" else 415)


async def test_empty_bodies_are_400(client: httpx.AsyncClient) -> None:
    """An empty body gets the problem `empty-body`, also if it is declared as a form."""
    assert_problem(await raw(client, b""), 400, "empty-body")
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert_problem(await client.post("/score", content=b"", headers=headers), 400, "empty-body")


async def test_too_large_bodies_are_413(client: httpx.AsyncClient, zero: bytes) -> None:
    """A body above the limit is rejected by its Content-Length or, if it is chunked, by the received bytes."""
    too_much = zero + bytes(70_000)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(too_much), 1000):
            yield too_much[start : start + 1000]

    assert_problem(await raw(client, too_much), 413, "body-too-large")
    assert_problem(await client.post("/score", content=chunks(), headers=PNG), 413, "body-too-large")


QUERIES = {
    "model=nothing": (404, "model-not-found"),
    "model=zero-article@99": (404, "model-not-found"),
    "model=../../etc": (422, "invalid-parameter"),
    "model=zero-article@0": (422, "invalid-parameter"),
    "alpha=0": (422, "invalid-parameter"),
    "alpha=1": (422, "invalid-parameter"),
    "alpha=much": (422, "invalid-parameter"),
    "alpha=nan": (422, "invalid-parameter"),
    "alpha=0.00001": (422, "unsupported-alpha"),
    "fit=stretch": (422, "invalid-parameter"),
    "include=everything": (422, "invalid-parameter"),
    "modle=zero-article": (422, "invalid-parameter"),
    "alpha=0.1&alpha=0.2": (422, "invalid-parameter"),
}


@pytest.mark.parametrize("query", QUERIES)
@SHARED
async def test_bad_queries_are_problems(shared_client: httpx.AsyncClient, zero: bytes, query: str) -> None:
    """Every invalid parameter is rejected, including unknown names."""
    status, kind = QUERIES[query]
    assert_problem(await raw(shared_client, zero, f"?{query}"), status, kind)


async def test_another_alpha_moves_the_threshold_only(client: httpx.AsyncClient, zero: bytes) -> None:
    """`alpha` changes threshold and verdict of this reply; the score stays. Anomalous means p-value <= alpha."""
    seen = []
    for alpha in (0.01, 0.05, 0.2, 0.5, 0.9):
        reply = (await raw(client, zero, f"?alpha={alpha}")).json()
        assert reply["alpha"] == alpha
        assert reply["is_anomaly"] == (reply["p_value"] <= alpha)
        seen.append(reply)
    assert len({reply["mse"] for reply in seen}) == 1
    assert [reply["threshold"] for reply in seen] == sorted((reply["threshold"] for reply in seen), reverse=True)


async def test_a_version_can_be_named(client: httpx.AsyncClient, zero: bytes) -> None:
    """`name` and `name@version` give the same score as the version they mean."""
    replies = [(await raw(client, zero, query)).json() for query in ("?model=zero-article", "?model=zero-article@1")]
    assert len({(reply["model"], reply["version"], reply["mse"]) for reply in replies}) == 1


async def test_reconstruction_can_be_included(client: httpx.AsyncClient, zero: bytes) -> None:
    """`include=reconstruction` embeds the same picture that the route returns."""
    reply = (await raw(client, zero, "?include=reconstruction")).json()
    embedded = base64.b64decode(reply["reconstruction_png"])
    assert embedded == (await client.get(reply["reconstruction"])).content


async def test_framework_route_is_the_same(client: httpx.AsyncClient, zero: bytes) -> None:
    """The documented route of the framework gives the same reply as the direct handler."""
    inside = httpx.AsyncClient(transport=httpx.ASGITransport(client.app.framework), base_url="http://test")  # type: ignore[attr-defined]
    async with inside:
        assert (await raw(inside, zero)).json()["mse"] == (await raw(client, zero)).json()["mse"]
        response = await raw(inside, b"nonsense")
        assert response.status_code == 422
        assert response.json()["type"] == "/problems/not-a-png"
        assert (await raw(inside, zero, "?modle=x")).status_code == 422


async def test_request_ids_are_made_or_passed_on(client: httpx.AsyncClient, zero: bytes) -> None:
    """A valid request id of the client is returned; an invalid one is replaced."""
    given = await client.post("/score", content=zero, headers={**PNG, "x-request-id": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    for bad in ("a b", "x" * 65, '"},{"'):
        response = await client.get("/livez", headers={"x-request-id": bad})
        assert response.headers["x-request-id"] != bad


async def test_server_timing_names_every_stage(client: httpx.AsyncClient, zero: bytes) -> None:
    """The reply contains the time of each stage."""
    timing = (await raw(client, zero)).headers["server-timing"]
    assert [part.split(";")[0] for part in timing.split(", ")] == ["decode", "queue", "forward", "store"]


async def test_concurrent_images_keep_their_own_scores(client: httpx.AsyncClient) -> None:
    """For 200 different images at once, each caller gets the score and the picture of its own image."""
    generator = np.random.default_rng(0)
    digits = generator.integers(0, 256, (200, 28, 28)).astype(np.uint8)
    alone = [(await raw(client, pngs.plain(digit))).json()["mse"] for digit in digits]
    together = [reply.json() for reply in await asyncio.gather(*(raw(client, pngs.plain(digit)) for digit in digits))]
    assert np.allclose([reply["mse"] for reply in together], alone, rtol=1e-6)
    assert len(set(alone)) == 200
    for digit, reply in zip(digits[:20], together, strict=False):
        kept = (await client.get(reply["reconstruction"] + "?view=input")).content
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(kept))), digit)


async def test_overload_is_503_and_passes(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """With a full queue, some requests get 503 with Retry-After and others a score. A later request gets a score."""
    async with running(make_settings(queue_max_images=4, microbatch_max_size=1)) as client:
        responses = await asyncio.gather(*(raw(client, zero) for _ in range(64)))
        statuses = {response.status_code for response in responses}
        assert statuses == {200, 503}
        for response in responses:
            if response.status_code == 503:
                assert_problem(response, 503, "overloaded")
                assert response.headers["retry-after"] == "1"
        assert (await raw(client, zero)).status_code == 200


def mixture(zero: bytes) -> list[tuple[int, dict[str, Any]]]:
    """Return requests of every kind, each with its status and the arguments for the client."""
    large = pngs.saved(Image.open(io.BytesIO(zero)).convert("L").resize((112, 112)))
    blank = pngs.saved(Image.new("L", (60, 60)))
    other = pngs.multipart(("file", None, zero))
    forms = [(status, pngs.multipart(*parts)) for parts, status, _ in FORMS.values()]
    bad = [png for png, _ in REFUSED.values() if png]
    bombs = [pngs.SIGNATURE + pngs.header() + bomb + pngs.chunk(b"IEND") for bomb in BOMBS.values()]

    def post(status: int, content: bytes, query: str = "", kind: str = "image/png") -> tuple[int, dict[str, Any]]:
        return status, {"url": f"/score{query}", "content": content, "headers": {"content-type": kind}}

    good = [
        post(200, zero),
        post(200, zero, "?alpha=0.05&model=zero-article@1"),
        post(200, zero, "?include=reconstruction"),
        post(200, large, "?fit=mnist"),
        (200, {"url": "/score", "files": {"file": ("zero.png", zero, "image/png")}}),
        (200, {"url": "/score?fit=mnist", "files": {"file": ("large.png", large, "image/png")}}),
        post(200, other[1], kind=other[0]),
    ]
    refused = [
        *[post(422, png) for png in (*bad, *bombs)],
        *[(422, {"url": "/score", "files": {"file": ("a.png", png, "image/png")}}) for png in bad[:10]],
        *[post(422, png, "?fit=mnist") for png in (blank, *bombs)],
        *[post(status, zero, f"?{query}") for query, (status, _) in QUERIES.items()],
        post(400, zero, "?" + "a" * 1025),
        *[post(status, body, kind=kind) for status, (kind, body) in forms],
        *[post(415, zero, kind=kind) for kind in ("text/plain", "application/json", "image/jpeg")],
        post(400, b""),
        post(413, bytes(70_000)),
        post(422, pngs.plain(pngs.gradient(27))),
        post(422, pngs.plain(pngs.gradient(300)[:100])),
    ]
    return good * (len(refused) // len(good)) + refused


@pytest.mark.long
async def test_thousands_of_mixed_requests_leave_memory_flat(client: httpx.AsyncClient, zero: bytes) -> None:
    """In a mixture of valid and invalid requests of every kind, each gets its own status, and memory does not grow."""
    requests = mixture(zero)
    generator = random.Random(0)

    async def one() -> None:
        status, arguments = generator.choice(requests)
        assert (await client.post(**arguments)).status_code == status, arguments["url"]

    async def many(count: int) -> int:
        for _ in range(count // 10):
            await asyncio.gather(*(one() for _ in range(10)))
        return psutil.Process().memory_info().rss

    before = await many(1_000)
    after = await many(3_000)
    assert after - before < 12 * 2**20


@pytest.mark.parametrize("length", [1024, 1025, 60_000])
@SHARED
async def test_long_queries_are_refused_and_not_remembered(
    shared_client: httpx.AsyncClient, zero: bytes, length: int
) -> None:
    """A query of more than 1,024 bytes gets 400 on every route, and does not enter the cache of parsed queries."""
    query = "?model=zero-article&note=" + "n" * (length - 24)
    assert len(query) == length + 1
    before = queries._parsed.cache_info().misses
    requests = [("POST", "/score"), ("POST", "/score/batch"), ("GET", "/models"), ("GET", "/livez"), ("GET", "/none")]
    for method, path in requests:
        response = await shared_client.request(method, path + query, content=zero, headers=PNG)
        if length > 1024:
            assert_problem(response, 400, "malformed-request")
        else:
            assert response.status_code in (200, 404, 415, 422)
    assert queries._parsed.cache_info().misses - before == (0 if length > 1024 else 1)


async def test_too_many_fits_are_shed_and_counted(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """An image that `fit` rejects because of its full queue is counted like all load shedding."""
    async with running(make_settings(fit_max_waiting=1)) as client:
        replies = await asyncio.gather(*(raw(client, zero, "?fit=mnist") for _ in range(8)))
        shed = [reply for reply in replies if reply.status_code == 503]
        assert shed
        assert f'anomaly_problems_total{{type="overloaded"}} {len(shed)}.0' in (await client.get("/metrics")).text


async def test_an_image_that_is_fitted_too_late_is_504(
    make_settings: Callable[..., Settings], zero: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for the thread that fits counts towards the deadline."""
    goes_on = threading.Event()
    fitted = fitting.prepare

    def slow(*given: Any) -> Any:
        goes_on.wait(30)
        return fitted(*given)

    monkeypatch.setattr(fitting, "prepare", slow)
    async with running(make_settings(deadline_ms=300, store_timeout_ms=100)) as client:
        replies = await asyncio.gather(*(raw(client, zero, "?fit=mnist") for _ in range(3)))
        goes_on.set()
        for reply in replies:
            assert_problem(reply, 504, "deadline-exceeded")
    async with running(make_settings(deadline_ms=30_000)) as client:
        assert (await raw(client, zero, "?fit=mnist")).status_code == 200


@pytest.mark.parametrize(
    ("query", "fields", "status"),
    [
        ("", {"alpha": "0.05"}, 200),
        ("?alpha=0.05", {"alpha": "0.050"}, 200),
        ("?alpha=0.05", {"alpha": "0.01"}, 422),
        ("", {"alpha": "2"}, 422),
        ("", {"alhpa": "0.05"}, 422),
        ("", {"include": "reconstruction"}, 200),
        ("", {"model": "zero-article@1", "alpha": "0.05"}, 200),
        ("", {"model": "none"}, 404),
    ],
)
@SHARED
async def test_form_fields_are_parameters(
    shared_client: httpx.AsyncClient, zero: bytes, query: str, fields: dict[str, str], status: int
) -> None:
    """Further fields of the form act like query parameters; different values and unknown names are rejected."""
    reply = await shared_client.post(f"/score{query}", data=fields, files={"file": ("a.png", zero)})
    assert reply.status_code == status, reply.text
    if status == 200:
        assert reply.json()["alpha"] == float(fields.get("alpha", "0.01"))
        assert ("reconstruction_png" in reply.json()) == ("include" in fields)
    elif status == 422:
        assert next(iter(fields)) in reply.json()["detail"]


async def test_a_large_image_may_ask_for_fit_in_a_field(client: httpx.AsyncClient) -> None:
    """`fit=mnist` as a form field takes images that only `fit` takes; without it they are too large."""
    picture = np.full((400, 400), 255, np.uint8)
    picture[80:320, 180:220] = np.random.default_rng(3).integers(0, 120, (240, 40))
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=0)
    files = {"file": ("a.png", file.getvalue())}
    assert len(file.getvalue()) > 64 * 1024
    fitted = await client.post("/score", data={"fit": "mnist"}, files=files)
    assert fitted.status_code == 200, fitted.text
    assert fitted.json()["fitted"]["inverted"]
    assert_problem(await client.post("/score", files=files), 413, "body-too-large")


async def test_compressed_bodies_are_decoded_within_the_limit(client: httpx.AsyncClient, zero: bytes) -> None:
    """gzip and deflate give the score of the plain body; a bomb is 413, another encoding 415."""
    expected = (await raw(client, zero)).json()["mse"]
    for encoding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        headers = {**PNG, "content-encoding": encoding}
        assert (await client.post("/score", content=pack(zero), headers=headers)).json()["mse"] == expected
        bomb = await client.post("/score", content=pack(bytes(10_000_000)), headers=headers)
        assert_problem(bomb, 413, "body-too-large")
    other = await client.post("/score", content=zero, headers={**PNG, "content-encoding": "br"})
    assert_problem(other, 415, "unsupported-encoding")
    assert "gzip" in other.headers["accept-encoding"]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@SHARED
async def test_fit_takes_photos_by_content_type_or_form(shared_client: httpx.AsyncClient, kind: str) -> None:
    """With `fit=mnist` JPEG and WebP are scored, as a body and as a file of a form; without it JPEG is rejected."""
    picture = np.full((300, 300), 235, np.uint8)
    picture[60:240, 130:165] = 40
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    media_type = f"image/{kind.lower()}"
    body = await shared_client.post("/score?fit=mnist", content=file.getvalue(), headers={"content-type": media_type})
    part = await shared_client.post("/score", data={"fit": "mnist"}, files={"file": ("a", file.getvalue(), media_type)})
    assert (body.status_code, part.status_code) == (200, 200), (body.text, part.text)
    assert body.json()["mse"] == part.json()["mse"]
    assert body.json()["fitted"]["ignored"] == {"components": 0, "ink": 0.0}
    strict = await shared_client.post("/score", content=file.getvalue(), headers={"content-type": media_type})
    assert strict.status_code == (422 if kind == "PNG" else 415)
