"""Start the service: `python -m app`. Settings come from the environment (docs/configuration.md)."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

import uvicorn

from app.settings import Settings, SettingsError, from_environment


def main() -> int:
    """Serve until told to stop. Returns the exit code: 2 when the settings make no start possible."""
    try:
        settings = from_environment()
    except SettingsError as error:
        return _refuse(error)
    # The inference thread has one intra-op thread; OpenMP must not start more beside it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shared = None
    if settings.workers > 1:
        # prometheus_client decides at import whether its numbers are shared, so this comes before app.main.
        shared = tempfile.mkdtemp(prefix="metrics-")
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared
    try:
        return _serve(settings)
    finally:
        if shared is not None:
            shutil.rmtree(shared, ignore_errors=True)


def _serve(settings: Settings) -> int:
    from app.detector import DeviceError, choose_device
    from app.keys import KeysError
    from app.main import check
    from app.stores import StoreError

    try:
        choose_device(settings.device)
        check(settings)
    except (DeviceError, KeysError, StoreError) as error:
        return _refuse(error)
    uvicorn.run(
        "app.main:from_environment",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        http="app.protocol:Protocol",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        # Nothing here depends on the client's address; the gateway's word about it is not needed.
        proxy_headers=False,
        timeout_graceful_shutdown=30,
    )
    return 0


def _refuse(error: Exception) -> int:
    sys.stderr.write(f"cannot start: {error}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
