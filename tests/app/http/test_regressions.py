"""Requests of real clients that an earlier release handled wrongly, each with the right reply."""

from __future__ import annotations

import io
from typing import Any

import httpx
import numpy as np
import pytest

from app.http import bodies
from app.http.multipart import read_form
from app.images import png
from app.problems import BodyTooLarge
from tests.conftest import ROOT, SHARED
from tests.requests import assert_problem

CASES = ROOT / "tests" / "cases"
FORM = {"content-type": "multipart/form-data; boundary=XX"}
PNG = {"content-type": "image/png"}


def case(path: str) -> bytes:
    """Return the bytes of a case's file."""
    return (CASES / path).read_bytes()


async def post(client: httpx.AsyncClient, url: str, path: str, headers: dict[str, str]) -> httpx.Response:
    return await client.post(url, content=case(path), headers=headers)


@pytest.mark.parametrize(("file", "name"), [("photo.jpg", "JPEG"), ("photo.webp", "WebP"), ("head-of.heic", "HEIC")])
@SHARED
async def test_another_format_is_named(shared_client: httpx.AsyncClient, file: str, name: str) -> None:
    """Without fit, a file of another format that is sent as PNG is 422 and named."""
    reply = await post(shared_client, "/score", f"08-other-formats-as-png/{file}", PNG)
    document = assert_problem(reply, 422, "not-a-png")
    assert name in document["detail"]


async def test_fit_recognises_the_format_by_its_bytes(client: httpx.AsyncClient) -> None:
    """With fit=mnist, JPEG and WebP sent as PNG are decoded; the problem for HEIC names the format, not a size."""
    for file in ("photo.jpg", "photo.webp"):
        reply = await post(client, "/score?fit=mnist", f"08-other-formats-as-png/{file}", PNG)
        assert reply.status_code in (200, 422), reply.text
        assert "format" not in reply.json().get("type", "")
    reply = await post(client, "/score?fit=mnist", "08-other-formats-as-png/head-of.heic", PNG)
    document = assert_problem(reply, 422, "unsupported-format")
    assert "HEIC" in document["detail"]
    assert "28x28" not in document["hint"]


ACCEPT_OF_AXIOS = "application/json, text/plain, */*"


@pytest.mark.parametrize(
    "accept",
    [
        ACCEPT_OF_AXIOS,
        "*/*",
        "image/*",
        "application/json;q=0, image/png",
        "application/json;q=0.1, image/png",
        "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2",
    ],
)
@SHARED
async def test_general_clients_get_the_picture(shared_client: httpx.AsyncClient, zero: bytes, accept: str) -> None:
    """The default headers of axios and Java get the default form of a reconstruction, and `q` counts."""
    assert case("09-axios-accept/headers.txt").decode().split(": ", 1)[1].strip() == ACCEPT_OF_AXIOS
    scored = (await shared_client.post("/score", content=zero, headers=PNG)).json()
    reply = await shared_client.get(scored["reconstruction"], headers={"accept": accept})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "image/png")


def test_the_fields_of_a_form_are_not_ignored() -> None:
    """The reader returns the parameters of the form besides the file, so that the route can apply them."""
    form = read_form(FORM["content-type"], case("10-form-fields-ignored/form.bin"))
    assert form.fields == {"model": "zero-article", "alpha": "0.2"}
    assert len(png.decode(form.image)) == 784


async def test_the_transfer_encoding_of_java_clients_is_accepted(client: httpx.AsyncClient) -> None:
    """A part with `Content-Transfer-Encoding: binary` is read."""
    reply = await post(client, "/score/batch", "11-content-transfer-encoding/form.bin", FORM)
    assert reply.status_code == 200
    assert [("problem" in item) for item in reply.json()["items"]] == [False]


@pytest.mark.parametrize("name", ["12-filename-star-only", "s1-preamble"])
@SHARED
async def test_forms_of_the_rfcs_are_read_on_both_routes(shared_client: httpx.AsyncClient, name: str) -> None:
    """A part with `filename*` alone and a form with a preamble are read."""
    assert (await post(shared_client, "/score", f"{name}/file.bin", FORM)).status_code == 200
    reply = await post(shared_client, "/score/batch", f"{name}/files.bin", FORM)
    assert (reply.status_code, reply.json()["failed"]) == (200, 0)


@pytest.mark.parametrize(
    ("file", "hint"),
    [("curl-d.png", "--data-binary"), ("utf8.png", "bytes"), ("dataurl.txt", "Decode the base64")],
)
@SHARED
async def test_damage_by_text_modes_gets_the_hint_that_mends_it(
    shared_client: httpx.AsyncClient, file: str, hint: str
) -> None:
    """A PNG that was sent as text is 422 with a hint that names the cause."""
    document = assert_problem(await post(shared_client, "/score", f"16-text-mode-damage/{file}", PNG), 422, "not-a-png")
    assert hint in document["hint"]


def test_gzip_is_decoded_within_the_limit() -> None:
    """A body with `Content-Encoding: gzip` is decoded, and one byte more than the limit is too large."""
    body = case("17-content-encoding-gzip/zero.png.gz")
    image = bodies.decoded(b"gzip", body, limit=64 * 1024)
    assert len(png.decode(image)) == 784
    assert bodies.decoded(b"gzip", body, limit=len(image)) == image
    with pytest.raises(BodyTooLarge):
        bodies.decoded(b"gzip", body, limit=len(image) - 1)


async def test_the_hint_for_a_float_array_gives_the_right_scores(client: httpx.AsyncClient) -> None:
    """The hint for values in 0..1 contains the conversion, and with it both normal zeros are normal."""
    headers = {"content-type": "application/x-npy"}
    document = assert_problem(
        await post(client, "/score/batch", "18-float-array/floats.npy", headers), 422, "wrong-array"
    )
    assert "from 0 to 1" in document["detail"]
    formula = document["hint"].split(": ")[-1].rstrip(".")
    assert "* 255" in formula
    names: dict[str, Any] = {"numpy": np, "images": np.load(CASES / "18-float-array" / "floats.npy")}
    buffer = io.BytesIO()
    np.save(buffer, eval(formula, names))
    reply = await client.post("/score/batch", content=buffer.getvalue(), headers=headers)
    assert [item["is_anomaly"] for item in reply.json()["items"]] == [False, False]


async def test_a_wrong_checksum_in_a_text_does_not_matter(client: httpx.AsyncClient) -> None:
    """As in every browser, the checksum of a chunk that is not read does not count."""
    assert (await post(client, "/score", "s5-bad-crc-in-text/input.png", PNG)).status_code == 200


@pytest.mark.parametrize(("file", "bits"), [("ten.png", 10), ("twelve.png", 12)])
@pytest.mark.parametrize("query", ["", "?fit=mnist"])
@SHARED
async def test_unscaled_16_bit_images_are_named(
    shared_client: httpx.AsyncClient, file: str, bits: int, query: str
) -> None:
    """10 or 12 bits in 16 are 422, and never scored as an almost black image."""
    reply = await post(shared_client, f"/score{query}", f"s6-twelve-bits-in-sixteen/{file}", PNG)
    assert f"{bits} of 16 bits" in assert_problem(reply, 422, "low-bit-depth")["detail"]


async def test_the_second_of_two_images_is_not_dropped(client: httpx.AsyncClient) -> None:
    """Two PNGs in one body are 422, and the detail says so."""
    document = assert_problem(await post(client, "/score", "own-two-pngs-in-one/both.png", PNG), 422, "corrupt-png")
    assert "second PNG" in document["detail"]
