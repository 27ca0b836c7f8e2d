"""Start the service: `python -m app`. Settings come from the environment (docs/configuration.md)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from types import FrameType
from typing import Any

_APP = "app.main:from_environment"
_STARTUP_FAILURE = 3
"""Exit code if the application could not be started, as of `uvicorn.run`."""
_shared = ""
"""The folder of the workers' numbers, while there is one."""


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    if _shared:
        shutil.rmtree(_shared, ignore_errors=True)
    os._exit(128 + number)  # an exception is lost where one comes while something is imported


# The first process of a container has no default action: what comes before the server listens would be lost.
signal.signal(signal.SIGTERM, _end)

import uvicorn  # noqa: E402

from app.settings import Settings, SettingsError, from_environment  # noqa: E402


def main() -> int:
    """Serve until told to stop. Returns the exit code: 2 when the settings make no start possible."""
    global _shared  # noqa: PLW0603 - a signal has no other way to it
    try:
        settings = from_environment()
    except SettingsError as error:
        return _refuse(error)
    # The inference thread has one intra-op thread; OpenMP must not start more beside it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if settings.workers > 1:
        # prometheus_client decides at import whether its numbers are shared, so this comes before app.main.
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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on the server sees to it
    options: dict[str, Any] = {
        "factory": True,
        "host": settings.host,
        "port": settings.port,
        "workers": settings.workers,
        "http": "app.http.server:ServerProtocol",
        "ws": "none",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "date_header": False,
        # Nothing here depends on the client's address; the gateway's word about it is not needed.
        "proxy_headers": False,
        "timeout_keep_alive": settings.keep_alive_seconds,
        "timeout_graceful_shutdown": 30,
        # A worker that does not answer is killed: on a busy machine none may be that only starts, or scores a batch.
        # But while the supervisor waits for one that has just died, it starts no other and hears no signal.
        "timeout_worker_healthcheck": 15,
    }
    if settings.host == "::" and settings.workers == 1:
        return _serve_both(options)
    uvicorn.run(_APP, **options)
    return 0


def _serve_both(options: dict[str, Any]) -> int:
    """Serve IPv6 and IPv4 with one process. asyncio alone would listen on IPv6 only, and uvicorn's workers on both."""
    address = options["host"], options["port"]
    try:
        listener = socket.create_server(address, family=socket.AF_INET6, backlog=2048, dualstack_ipv6=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return _refuse(OSError(f"cannot listen on [::]:{options['port']}: {reason}"))
    server = uvicorn.Server(uvicorn.Config(_APP, **options))
    with listener, contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return 0 if server.started else _STARTUP_FAILURE


def _refuse(error: Exception) -> int:
    sys.stderr.write(f"cannot start: {error}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
