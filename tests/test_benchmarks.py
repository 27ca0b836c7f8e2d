"""The service without each optimisation, which `make bench` compares with the complete one, still serves scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.settings import Settings
from benchmarks.processes import service
from benchmarks.without import TRICKS
from tests.test_clients import serving

FAST = {"edge": 0, "whole": 0, "form": 1}
"""Number of the two single scores that take the fast path without an optimisation. Default: both."""


@pytest.mark.parametrize("name", TRICKS)
async def test_the_service_without_an_optimisation_scores(
    name: str, make_settings: Callable[..., Settings], zero: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raw bodies, forms and batches get the scores of the complete service."""
    kinds: list[dict[str, Any]] = [
        {"content": zero, "headers": {"content-type": "image/png"}},
        {"files": {"file": zero}},
    ]

    async def scores() -> tuple[list[Any], int]:
        async with serving(make_settings(), monkeypatch) as here, httpx.AsyncClient(base_url=here.url) as client:
            single = [(await client.post("/score", **kind)).json()["mse"] for kind in kinds]
            batch = (await client.post("/score/batch", files=[("files", zero)] * 2)).json()
            return [*single, [result["mse"] for result in batch["items"]]], here.fast

    with monkeypatch.context() as context:
        TRICKS[name][1](context.setattr)
        without, fast = await scores()
    assert (without, fast) == ((await scores())[0], FAST.get(name, 2))


@pytest.mark.process
def test_the_command_serves_without_an_optimisation(tmp_path: Path, zero: bytes) -> None:
    """`python -m benchmarks.without NAME` starts a service, as `python -m app` does."""
    server = service(tmp_path, command=["benchmarks.without", "log"])
    try:
        reply = httpx.post(f"{server.url}/score", content=zero, headers={"content-type": "image/png"})
        assert reply.json()["is_anomaly"] is False
    finally:
        server.stop()
