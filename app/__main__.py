"""Start the service: `python -m app`. Settings come from the environment (docs/configuration.md)."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile

# The first process of a container has no default action: what comes before the server listens would be lost.
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))

import uvicorn  # noqa: E402

from app.settings import Settings, SettingsError, from_environment  # noqa: E402


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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on the server sees to it
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
