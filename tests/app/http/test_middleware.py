"""The outermost layer if the service cannot start."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.http.middleware import Message
from app.inference.registry import Registry
from app.main import create_app
from app.settings import Settings


async def test_a_failed_start_gives_no_path_away(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The lifespan message reports the failed start without a stack trace; only the log contains the trace."""

    async def fail(_: Registry) -> None:
        raise ZeroDivisionError("at /secret/path")

    monkeypatch.setattr(Registry, "start", fail)
    told: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        told.append(message)

    with pytest.raises(ZeroDivisionError):
        await create_app(make_settings())({"type": "lifespan", "state": {}}, receive, send)
    assert told == [{"type": "lifespan.startup.failed", "message": ""}]
    (record,) = [record for record in caplog.records if record.name == "app.http.middleware"]
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError
