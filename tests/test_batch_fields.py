"""Fields of a form of `POST /score/batch` work like parameters of the query."""

from __future__ import annotations

import itertools

import httpx
import pytest

from tests.conftest import SHARED, services

FIELD = '--B\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
FILE = b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n%b\r\n'


def field(name: str, value: str) -> bytes:
    """Return one parameter as a part of a form."""
    return FIELD.format(name, value).encode()


async def send(client: httpx.AsyncClient, *parts: bytes, query: str = "", piece: int = 100_000) -> httpx.Response:
    """Send a form to /score/batch in pieces."""
    body = b"".join([*parts, b"--B--\r\n"])

    async def pieces():
        for start in range(0, len(body), piece):
            yield body[start : start + piece]

    headers = {"content-type": "multipart/form-data; boundary=B"}
    return await client.post(f"/score/batch{query}", content=pieces(), headers=headers)


@pytest.mark.parametrize("piece", [1, 50, 100_000])
@SHARED
async def test_fields_before_the_files_are_obeyed(shared_client: httpx.AsyncClient, zero: bytes, piece: int) -> None:
    """The reply is that of the same parameters in the query, however the body is split."""
    fields = {"model": "zero-article@1", "alpha": "0.2", "store": "true"}
    parts = [field(name, value) for name, value in fields.items()]
    by_form = (await send(shared_client, *parts, FILE % zero, FILE % zero, piece=piece)).json()
    by_query = (await send(shared_client, FILE % zero, FILE % zero, query=f"?{httpx.QueryParams(fields)}")).json()
    assert by_form["alpha"] == 0.2
    assert by_form["count"] == 2
    for item in by_form["items"]:
        assert (await shared_client.get(item["reconstruction"])).status_code == 200
    for item in itertools.chain(by_form["items"], by_query["items"]):
        del item["id"], item["reconstruction"]
    assert by_form == by_query


async def test_the_model_of_a_field_is_used(client: httpx.AsyncClient, zero: bytes) -> None:
    """A model that does not exist is 404 also if a field names it, and no image is scored."""
    reply = await send(client, field("model", "nothing"), FILE % zero)
    assert (reply.status_code, reply.json()["type"]) == (404, "/problems/model-not-found")


async def test_the_same_value_in_both_places_is_accepted(client: httpx.AsyncClient, zero: bytes) -> None:
    """Equal values in query and form are accepted; for different values, the problem names the parameter."""
    assert (await send(client, field("alpha", "0.20"), FILE % zero, query="?alpha=0.2")).status_code == 200
    reply = await send(client, field("alpha", "0.3"), FILE % zero, query="?alpha=0.2")
    assert (reply.status_code, reply.json()["type"]) == (422, "/problems/invalid-parameter")
    assert reply.json()["detail"].startswith("alpha ")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([field("include", "reconstruction")], ["`include`", "alpha, fit, model, store"]),
        ([field("fit", "mnist")], ["fit", "'strict'"]),
        ([field("alpha", "big")], ["alpha"]),
        ([field("alpha", "0.1"), field("alpha", "0.1")], ["`alpha`", "twice"]),
        ([field("model", "x" * 2000)], ["`model`", "1024"]),
        ([field("_charset_", "utf-8")] * 17, ["16 fields"]),
    ],
)
@SHARED
async def test_wrong_fields_are_rejected_by_name(
    shared_client: httpx.AsyncClient, zero: bytes, parts: list[bytes], words: list[str]
) -> None:
    """Unknown, invalid, repeated and long fields are 422."""
    reply = await send(shared_client, *parts, FILE % zero)
    assert (reply.status_code, reply.json()["type"]) == (422, "/problems/invalid-parameter")
    assert all(word in reply.json()["detail"] for word in words), reply.text


@pytest.mark.parametrize("piece", [1, 100_000])
@SHARED
async def test_a_field_behind_a_file_is_rejected(shared_client: httpx.AsyncClient, zero: bytes, piece: int) -> None:
    """Its images may be scored already, so the reply is 422 and states that parameters must come first."""
    reply = await send(shared_client, FILE % zero, field("alpha", "0.2"), piece=piece)
    assert (reply.status_code, reply.json()["type"]) == (422, "/problems/invalid-parameter")
    assert "`alpha`" in reply.json()["detail"]
    assert "before its first file" in reply.json()["hint"]


async def test_fields_do_not_count_as_files(client: httpx.AsyncClient, zero: bytes) -> None:
    """The maximum number of files is that of files alone."""
    batch = services(client).batch
    batch._settings = batch._settings.model_copy(update={"batch_max_files": 2})
    parts = [field("alpha", "0.2"), field("store", "false")]
    assert (await send(client, *parts, FILE % zero, FILE % zero)).json()["count"] == 2
    assert (await send(client, *parts, *[FILE % zero] * 3)).status_code == 413
