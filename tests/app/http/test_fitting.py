"""`fit=mnist` under load: one client cannot take it from the others."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.http import score
from app.http.fitting import _is_large, client_of
from app.http.multipart import read_form
from app.settings import Settings
from tests.conftest import running
from tests.requests import raw
from tests.waiting import until


def noise(side: int) -> bytes:
    """Return a grey PNG of random pixels, which takes long to fit."""
    pixels = np.random.default_rng(5).integers(0, 256, (side, side), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


@pytest.mark.parametrize(
    ("scope", "client"),
    [
        ({"client": ("192.0.2.7", 1)}, "192.0.2.7"),
        ({"client": ("2001:db8:1:2:3::9", 1)}, "2001:db8:1:2::/64"),
        ({"client": ("192.0.2.7", 1), "owner": "scanner"}, "key scanner"),
        ({"client": None}, ""),
        ({"client": ("testclient", 1)}, "testclient"),
        ({}, ""),
    ],
)
def test_clients_are_told_apart_by_key_or_address(scope: dict[str, object], client: str) -> None:
    """The name of the key comes first: behind a gateway, all clients have the same address."""
    assert client_of(scope) == client


def test_large_images_are_found_by_their_header() -> None:
    """A PNG of a few kilobytes may declare millions of pixels."""
    file = io.BytesIO()
    Image.new("L", (2000, 2000)).save(file, "PNG")
    assert len(file.getvalue()) < 20_000
    assert _is_large(file.getvalue())
    assert not _is_large(noise(300))
    assert _is_large(bytes(200_000))
    assert not _is_large(b"\xff\xd8\xff")


async def test_a_flood_of_large_images_does_not_deny_fit_to_others(
    make_settings: Callable[..., Settings], zero: bytes
) -> None:
    """While one address holds all places with large images, each ordinary image of another address is fitted."""
    large = noise(800)
    settings = make_settings(fit_max_waiting=8, deadline_ms=5000)
    async with running(settings) as flooder:
        over = asyncio.Event()
        statuses: list[int] = []

        async def flood() -> None:
            while not over.is_set():
                statuses.append((await raw(flooder, large, "?fit=mnist")).status_code)
                await asyncio.sleep(0.01)  # a rejection does not suspend the task otherwise

        transport = httpx.ASGITransport(flooder.app, client=("192.0.2.7", 1))  # type: ignore[attr-defined]
        floods = [asyncio.create_task(flood()) for _ in range(16)]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
            replies = [(await raw(other, zero, "?fit=mnist")).status_code for _ in range(4)]
        over.set()
        await asyncio.gather(*floods)
    assert replies == [200] * 4
    assert 503 in statuses


async def test_a_field_of_a_form_needs_a_place_too(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """The limit of concurrent requests holds for `fit=mnist` as a field of a small form, as in the query."""
    async with running(make_settings(fit_max_waiting=1)) as client:
        file = {"file": ("a.png", zero, "image/png")}
        posts = (client.post("/score", data={"fit": "mnist"}, files=file) for _ in range(6))
        statuses = [reply.status_code for reply in await asyncio.gather(*posts)]
        assert (await client.post("/score", data={"fit": "mnist"}, files=file)).status_code == 200
    assert set(statuses) == {200, 503}


async def test_a_large_form_lets_others_run(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form of 2 MB with thousands of almost-delimiters is read beside the event loop, which serves others."""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    form = head + b"\r\n--bx" * 300_000 + b"\r\n--b--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    entered, served = threading.Event(), threading.Event()

    def read_later(*given: Any) -> Any:
        entered.set()
        assert served.wait(10), "the event loop served nothing while the form was read"
        return read_form(*given)

    monkeypatch.setattr(score, "read_form", read_later)
    async with running(make_settings()) as client:
        request = asyncio.create_task(client.post("/score?fit=mnist", content=form, headers=headers))
        await until(entered.is_set)
        assert (await client.get("/livez")).status_code == 200
        assert not request.done()
        served.set()
        assert (await request).status_code == 422
