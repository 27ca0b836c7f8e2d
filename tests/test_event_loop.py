"""Long operations do not run on the event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from app.web import pages
from tests import model_stores
from tests.conftest import running


async def test_slow_documents_are_made_off_the_event_loop(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread builds the OpenAPI document, and a thread renders model cards."""
    threads: list[threading.Thread] = []

    def recorded(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: object, **named: object) -> Any:
            threads.append(threading.current_thread())
            return work(*given, **named)

        return run

    monkeypatch.setattr(pages, "model_card", recorded(pages.model_card))
    async with running(make_settings()) as client:
        framework = client.app.framework  # type: ignore[attr-defined]
        monkeypatch.setattr(framework, "openapi", recorded(framework.openapi))
        assert (await client.get("/openapi.json")).json()["paths"]
        reply = await client.get("/models/zero-article", headers={"accept": "text/html"})
        assert reply.status_code == 200
    assert len(threads) == 2
    assert threading.main_thread() not in threads


async def test_calibration_scores_are_shown_without_reading_the_module(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """The route for the calibration of a version that is not loaded reads neither `model.pt` nor the golden samples."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)
    (store / "zero-article" / "2" / "model.pt").unlink()
    (store / "zero-article" / "2" / "golden.npz").unlink()
    async with running(make_settings(model_store=store)) as client:
        reply = await client.get("/models/zero-article/versions/2/calibration")
        assert reply.status_code == 200
        assert reply.json()["n"] > 0
