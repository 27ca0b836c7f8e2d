"""Start the service: `python -m app`. Settings come from the environment (docs/configuration.md)."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import socket
import sys
from types import FrameType

USAGE = """\
usage: python -m app [--help]

Run the service. It has no options: settings come from environment variables with the prefix ANOMALY_, for example

  ANOMALY_HOST         Address to listen on. Default: 127.0.0.1.
  ANOMALY_PORT         Port to listen on. Default: 8000.
  ANOMALY_WORKERS      Number of processes. Default: 1.
  ANOMALY_MODEL_STORE  Folder of the model versions. Default: model_store.

docs/configuration.md lists all settings. `anomaly serve` has options for these four.
Exit codes: 0 after a shutdown, 2 if the service cannot start, 3 if the shutdown abandoned work.
"""

_BACKLOG = 4096
"""Maximum number of connections that wait to be accepted; Linux's own maximum (`net.core.somaxconn`)."""
_metrics_folder = ""
"""Folder of the metrics that the workers share; empty with one worker."""


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    if _metrics_folder:
        shutil.rmtree(_metrics_folder, ignore_errors=True)
    os._exit(128 + number)  # an exception raised during an import can get lost


# The kernel drops a signal without a handler for the first process of a container, so SIGTERM needs one from here on.
signal.signal(signal.SIGTERM, _end)


def _open_standard_streams() -> None:
    """Open /dev/null for each closed standard stream: the next opened file would become standard output."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


_open_standard_streams()
# The inference thread has one intra-op thread; without this, OpenMP and numpy's OpenBLAS start one per core. OpenBLAS
# starts them when numpy is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import uvicorn  # noqa: E402

from app import process  # noqa: E402
from app.http import listening  # noqa: E402
from app.http.supervisor import Server, Supervisor  # noqa: E402
from app.models.repository import Repository, RepositoryError  # noqa: E402
from app.settings import PREFIX, Settings, SettingsError, from_environment, service_links  # noqa: E402
from app.telemetry.logs import configure  # noqa: E402


def main(arguments: list[str]) -> int:
    """Run the service until a signal stops it.

    Args:
        arguments: of the command line.

    Returns:
        The exit code: 2 if the service cannot start.
    """
    global _metrics_folder  # noqa: PLW0603 - the signal handler has no other way to it
    if arguments:
        return _print_usage(arguments)
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, _end)  # without a traceback of what is imported at the moment
    try:
        settings = from_environment()
        if not settings.allow_empty:
            Repository(settings.model_store).require_models()
        sockets = listening.bind(settings.host, settings.port)
        if settings.probe_port is not None:
            sockets += listening.bind(settings.host, settings.probe_port, setting=f"{PREFIX}PROBE_PORT")
    except (SettingsError, RepositoryError, listening.ListenError) as error:
        return _refuse(error)
    # The workers read the environment again: the port may be one that the system chose, or a variable of Kubernetes.
    os.environ[f"{PREFIX}PORT"] = str(sockets[0].getsockname()[1])
    if settings.workers > 1:
        # prometheus_client reads the variable when it is imported, so this comes before app.main.
        _metrics_folder = os.environ["PROMETHEUS_MULTIPROC_DIR"] = process.make_metrics_folder()
    try:
        return _serve(settings, sockets, interruptible=interruptible)
    finally:
        if _metrics_folder:
            shutil.rmtree(_metrics_folder, ignore_errors=True)


def _serve(settings: Settings, sockets: list[socket.socket], *, interruptible: bool) -> int:
    from app.inference.device import choose_device
    from app.main import CONFIGURATION_ERRORS, check

    try:
        choose_device(settings.device)
        check(settings)
    except CONFIGURATION_ERRORS as error:
        return _refuse(error)
    process.limit_heaps()
    process.raise_descriptor_limit()
    configure(settings.log_level, settings.log_format)
    if ignored := service_links():
        event = "variables of Kubernetes Services ignored"
        logging.getLogger("app").info(event, extra={"variables": ignored})
    config = uvicorn.Config(
        "app.main:from_environment",
        factory=True,
        workers=settings.workers,
        http="app.http.server:ServerProtocol",
        loop="app.http.accepting:make_loop" if settings.workers == 1 else "auto",
        limit_concurrency=settings.max_connections,
        backlog=_BACKLOG,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        # Only a trusted proxy may name the client's address, and the service has no list of trusted proxies.
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        # Batch requests end before (app.http.batch.SHUTDOWN_SECONDS), so that their replies say why.
        timeout_graceful_shutdown=15,
        # The supervisor kills a worker that does not reply in time. On a busy machine, a worker that starts or scores a
        # batch replies late. While the supervisor waits for a reply, it starts no other worker and handles no signal.
        timeout_worker_healthcheck=15,
    )
    server = _Server(config)
    # The server installs its own handlers, and calls these ones again after the shutdown.
    signal.signal(signal.SIGTERM, lambda number, frame: None if server.should_exit else _end(number, frame))
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if settings.workers > 1:
        return _run_workers(Supervisor(config, sockets, settings.drain_seconds))
    try:
        server.run(sockets)
    except KeyboardInterrupt:  # raised again after the shutdown
        pass
    except SystemExit as error:
        return process.EXIT_CANNOT_START if error.code == uvicorn.config.STARTUP_FAILURE else 0
    except listening.ListenError as error:
        code = _refuse(error)
        logging.shutdown()
        os._exit(code)  # the threads of the models would prevent a normal exit
    return 0 if server.started or server.should_exit else process.EXIT_CANNOT_START


def _run_workers(supervisor: Supervisor) -> int:
    supervisor.run()
    if supervisor.cannot_start:
        return process.EXIT_CANNOT_START
    codes = {worker.exitcode for worker in supervisor.processes}
    # A worker that was killed has abandoned its work too, but not one that could not start.
    harmless = {0, uvicorn.config.STARTUP_FAILURE, -signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT}
    return 0 if codes <= harmless else process.EXIT_ABANDONED


class _Server(Server):
    """Server that fails if it does not listen: uvloop ignores that another process has listened first."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the models and listen.

        Raises:
            ListenError: another process listens on the port since it was checked.
        """
        bound = sockets or []
        names = [each.getsockname() for each in bound]
        error: OSError | None = None
        try:
            await super().startup(sockets)
        except OSError as raised:
            error = raised
        if error is None and not self.started:  # a signal has come before
            return
        silent = [name for each, name in zip(bound, names, strict=True) if not listening.accepts(each)]
        if error is None and silent:
            error = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        if error is not None:
            await self.lifespan.shutdown()
            host, port = (silent or names)[0][:2]
            setting = "PORT" if port == names[0][1] else "PROBE_PORT"
            raise listening.explain(error, host, port, f"{PREFIX}{setting}") from error


def _print_usage(arguments: list[str]) -> int:
    if {"-h", "--help"}.isdisjoint(arguments):
        _write(
            2,
            f"error: python -m app has no argument {arguments[0]!r}; settings come from the environment, see --help\n",
        )
        return 2
    _write(1, USAGE)
    return 0


def _refuse(error: Exception) -> int:
    _write(2, f"cannot start: {error}\n")
    return process.EXIT_CANNOT_START


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError):  # the descriptor is closed
        os.write(descriptor, text.encode(errors="backslashreplace"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
