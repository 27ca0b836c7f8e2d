"""A request leaves no reference cycle behind: the garbage collector runs so rarely that its images would accumulate."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from app.inference.detector import Detector
from app.settings import Settings
from tests import pngs
from tests.conftest import ROOT, running
from tests.infer_requests import json_request
from tests.requests import form, raw

BLANK = pngs.plain(np.full((200, 200), 200, np.uint8))


async def send_single(client: httpx.AsyncClient) -> None:
    """Score an image as body and as form, and fetch its record."""
    scored = (await raw(client, pngs.plain(), "?include=reconstruction")).json()
    await client.get(f"/reconstruction/{scored['id']}")
    await client.get("/reconstruction/unknown")
    await form(client, ("file", "a.png", pngs.plain()))


async def send_invalid(client: httpx.AsyncClient) -> None:
    """Send images and forms that are rejected at each stage."""
    await raw(client, b"no image")
    await raw(client, pngs.plain()[:-20])
    await raw(client, pngs.plain(), "?alpha=2")
    await raw(client, pngs.plain(), "?model=zero-article@99")
    await raw(client, pngs.plain(np.zeros((30, 30), np.uint8)))
    await form(client, ("other", "a.png", pngs.plain()))
    await form(client, ("file", "a.png", b"no image"))
    await client.post("/score", content=b"--x", headers={"content-type": "multipart/form-data; boundary=x"})


async def send_fit(client: httpx.AsyncClient) -> None:
    """Send images to fit: one is accepted, the others are rejected."""
    await raw(client, pngs.plain(pngs.gradient(84)), "?fit=resize")
    await raw(client, BLANK, "?fit=mnist")
    await raw(client, b"no image", "?fit=mnist")
    await form(client, ("file", "a.png", BLANK), ("fit", None, b"mnist"))


async def send_batch(client: httpx.AsyncClient) -> None:
    """Send batches with an image that is rejected."""
    content_type, body = pngs.multipart(("files", "a.png", pngs.plain()), ("files", "b.png", b"no image"))
    for accept in ("application/json", "application/x-ndjson"):
        await client.post("/score/batch", content=body, headers={"content-type": content_type, "accept": accept})
    await client.post("/score/batch", content=body[:-30], headers={"content-type": content_type})
    await client.post("/score/batch?fit=mnist", content=body, headers={"content-type": content_type})
    await client.post("/score/batch", content=b"no array", headers={"content-type": "application/x-npy"})


async def send_inference(client: httpx.AsyncClient) -> None:
    """Send requests of the inference protocol: one is accepted, the others are rejected."""
    request = json_request(pngs.gradient()[None])
    await client.post("/v2/models/zero-article/infer", json=request)
    await client.post("/v2/models/unknown/infer", json=request)
    await client.post("/v2/models/zero-article/infer", json={"inputs": []})
    await client.post("/v1/models/zero-article:predict", json={"instances": [[1]]})


@pytest.mark.parametrize("send", [send_single, send_invalid, send_fit, send_batch, send_inference])
async def test_requests_leave_no_cycle(
    make_settings: Callable[..., Settings], send: Callable[[httpx.AsyncClient], object]
) -> None:
    """After the requests, the collector finds no frame and no object of the service."""
    async with running(make_settings()) as client:
        assert await left_by(client, send) == []


async def test_a_damaged_store_leaves_no_cycle(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    """Neither writes nor reads that fail keep their records, or the file, until the collector runs."""

    async def send(client: httpx.AsyncClient) -> None:
        for _ in range(2):  # the second time, the file is not repaired
            file.write_bytes(b"damaged" * 1000)
            for _ in range(3):
                await raw(client, pngs.plain())
                await client.get("/reconstruction/" + "0" * 44)

    file = tmp_path / "reconstructions.db"
    async with running(make_settings()) as client:
        assert await left_by(client, send) == []


async def test_a_failing_forward_pass_leaves_no_cycle(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of a micro-batch and of a batch request whose forward pass raises are freed with their replies."""

    def fail(_: Detector, images: NDArray[np.uint8]) -> NoReturn:
        raise RuntimeError(f"{len(images)} images do not fit the graph")

    async def send(client: httpx.AsyncClient) -> None:
        replies = await asyncio.gather(*[raw(client, pngs.plain()) for _ in range(3)])
        assert [reply.status_code for reply in replies] == [500] * 3
        for query in ("", "?store=true"):
            batch = await client.post(f"/score/batch{query}", files=[("files", pngs.plain())] * 2)
            assert batch.json()["failed"] == 2

    async with running(make_settings()) as client:
        for method in ("draw", "score"):
            monkeypatch.setattr(Detector, method, fail)
        assert await left_by(client, send) == []


async def left_by(client: httpx.AsyncClient, send: Callable[[httpx.AsyncClient], object]) -> list[str]:
    """Send requests twice, and return what the second time has left to the collector."""
    await send(client)  # type: ignore[misc]  # what exists once is made now
    gc.collect()
    gc.disable()
    try:
        await send(client)  # type: ignore[misc]
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return sorted(filter(None, map(described, gc.garbage)))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def described(found: object) -> str | None:
    """Return a description of an object of the service, or of a frame of its code."""
    if isinstance(found, FrameType):
        path = Path(found.f_code.co_filename)
        return f"frame of {found.f_code.co_qualname}" if path.is_relative_to(ROOT / "app") else None
    kind = type(found)
    return f"{kind.__module__}.{kind.__name__}" if kind.__module__.partition(".")[0] == "app" else None
