"""Start the service: `python -m app`. Settings come from the environment (docs/configuration.md)."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from types import FrameType

_shared = ""
"""Folder of the metrics that the workers share; empty if there is one worker."""


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    if _shared:
        shutil.rmtree(_shared, ignore_errors=True)
    os._exit(128 + number)  # an exception that is raised during an import may be lost


# The kernel ignores signals without a handler for the first process of a container: a SIGTERM before the server listens
# would be lost.
signal.signal(signal.SIGTERM, _end)

import uvicorn  # noqa: E402

from app.settings import Settings, SettingsError, from_environment  # noqa: E402


def main() -> int:
    """Serve until SIGTERM or SIGINT. Return the exit code: 2 if the settings are invalid."""
    global _shared  # noqa: PLW0603 - the signal handler reads it
    try:
        settings = from_environment()
    except SettingsError as error:
        return _refuse(error)
    # The inference thread has one intra-op thread; OpenMP must not add more threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if settings.workers > 1:
        # prometheus_client decides at import whether metrics are shared, so set this before app.main is imported.
        _shared = os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="metrics-")
    try:
        return _serve(settings)
    finally:
        if _shared:
            shutil.rmtree(_shared, ignore_errors=True)


def _serve(settings: Settings) -> int:
    from app.http.auth import KeysError
    from app.inference.device import DeviceError, choose_device
    from app.main import check
    from app.stores import StoreError

    try:
        choose_device(settings.device)
        check(settings)
    except (DeviceError, KeysError, StoreError) as error:
        return _refuse(error)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on, uvicorn handles it
    uvicorn.run(
        "app.main:from_environment",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        http="app.http.server:ServerProtocol",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        # The service does not use the client's address, so it need not trust the gateway's headers.
        proxy_headers=False,
        timeout_graceful_shutdown=30,
        # The supervisor kills a worker that does not reply in time. On a busy machine, a worker that starts or scores a
        # batch may be slow. While the supervisor waits for a dead worker, it starts none and handles no signal.
        timeout_worker_healthcheck=15,
    )
    return 0


def _refuse(error: Exception) -> int:
    sys.stderr.write(f"cannot start: {error}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
