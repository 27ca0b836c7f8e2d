"""What takes long does not run on the event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from app.settings import Settings
from app.web import pages
from tests import model_stores
from tests.conftest import running


async def test_slow_documents_are_made_off_the_event_loop(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The OpenAPI document is built before the service is ready; a thread renders model cards."""
    threads: list[threading.Thread] = []
    render = pages.model_card

    def recorded(*given: object) -> str:
        threads.append(threading.current_thread())
        return render(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(pages, "model_card", recorded)
    async with running(make_settings()) as client:
        app = client.app._app  # type: ignore[attr-defined]
        assert app.openapi_schema is not None
        reply = await client.get("/models/zero-article", headers={"accept": "text/html"})
        assert reply.status_code == 200
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


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
