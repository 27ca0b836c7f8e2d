"""The server, and the supervisor of the worker processes: uvicorn's, with other rules for starts and for signals."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from types import FrameType

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

_log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0
"""Seconds between a failed start of a worker and the next attempt. A start takes seconds of processor time."""
START_SECONDS = 5.0
"""Seconds that a start may still take after a signal that stops the service."""
STOP_SECONDS = 35.0
"""Seconds after the drain until a worker that has not ended is killed. A worker that reacts needs 30 or fewer."""


class Server(uvicorn.Server):
    """Server whose start ends soon after SIGINT or SIGTERM, also if the model store hangs.

    No client has connected yet, so no work is lost.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the models and listen, unless a signal has come during the imports."""
        if not self.should_exit:
            await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown."""
        is_first = not self.should_exit
        super().handle_exit(sig, frame)
        if is_first and not self.started:
            timer = threading.Timer(START_SECONDS, self._give_up)
            timer.daemon = True
            timer.start()

    def _give_up(self) -> None:
        if not self.started:
            _log.warning("stopped before the start was complete")
            logging.shutdown()
            os._exit(0)


class Worker(Process):
    """A worker process."""

    def start(self) -> None:
        """Start the process.

        Raises:
            OSError: the system cannot start it.
        """
        # A terminal sends SIGINT and SIGHUP to the workers too. SIGHUP would end them without a drain, and a worker
        # that still imports modules would print a traceback for SIGINT. The supervisor sends them SIGTERM. It misses a
        # signal that arrives in the milliseconds until the handlers are restored.
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
        try:
            super().start()
        except OSError:
            self.parent_conn.close()
            self.child_conn.close()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        # The worker has its own copy. With this one open, the end of the worker would not close the pipe, and a ping to
        # a worker that is about to end would wait for the whole timeout.
        self.child_conn.close()

    @property
    def server(self) -> uvicorn.Server:
        """The server, in the worker's process."""
        if self._server is None:
            self._server = Server(self.config)
        return self._server


class Supervisor(Multiprocess):
    """Starts the workers, and replaces each worker that ends or hangs, until a signal stops them.

    If a worker cannot start and no worker has started before, all workers are stopped. Later, the cause may be
    temporary and other workers may serve, so the start is tried again.

    Args:
        config: of the servers in the workers.
        sockets: bound sockets, on which all workers listen.
        drain_seconds: how long the workers serve requests after SIGTERM.

    Attributes:
        started: whether a worker has started.
        cannot_start: whether the workers were stopped because the first ones cannot start.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], drain_seconds: float) -> None:
        ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        super().__init__(config, sockets)
        if ignores_hangup:  # the command nohup has started the service
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._drain_seconds = drain_seconds
        self.started = False
        self.cannot_start = False
        self._retry_at: dict[Process, float] = {}

    def init_processes(self) -> None:
        """Start the workers."""
        try:
            for _ in range(self.processes_num):
                self.processes.append(self._new_worker())
        except OSError as error:  # too many processes or files, or too little memory
            self._refuse(f": {error.strerror}")

    def keep_subprocess_alive(self) -> None:
        """Replace the workers that have ended or hang. The supervisor calls this method twice per second."""
        timeout = self.config.timeout_worker_healthcheck
        if not self.started and not self.should_exit.is_set():
            alive = [worker for worker in self.processes if worker.process.is_alive()]
            self.started = any(worker.is_ready(timeout) for worker in alive)
        for index, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if worker.is_alive(timeout):
                continue
            worker.kill()
            worker.join()
            if self.signal_queue:  # it came while this method waited for a reply: no other worker is needed
                return
            failed = worker.exitcode == STARTUP_FAILURE
            if failed and not self.started:
                self._refuse()
            elif failed and worker not in self._retry_at:
                self._retry_later(worker, "worker cannot start")
            elif time.monotonic() >= self._retry_at.get(worker, 0.0):
                self._replace(index, worker)

    def terminate_all(self) -> None:
        """Close the sockets, then stop all workers: the kernel accepts connections while any process listens."""
        for each in self.sockets:
            each.close()
        super().terminate_all()

    def join_all(self) -> None:
        """Wait for the end of each worker, and kill those that do not react, for example because they are stopped."""
        until = time.monotonic() + self._drain_seconds + STOP_SECONDS
        for worker in self.processes:
            worker.process.join(max(0.0, until - time.monotonic()))
            if worker.process.is_alive():
                _log.error("a worker has not ended in time and is killed")
                worker.kill()
                worker.process.join()

    def handle_hup(self) -> None:
        """Stop the service: its terminal has closed."""
        self.handle_term()

    def handle_ttin(self) -> None:
        """Ignore the signal: `ANOMALY_WORKERS` sets the number of workers."""

    handle_ttou = handle_ttin

    def _new_worker(self) -> Worker:
        worker = Worker(self.config, self.sockets)
        worker.start()
        return worker

    def _refuse(self, cause: str = "") -> None:
        _log.error("the first workers cannot start%s", cause)
        self.cannot_start = True
        self.should_exit.set()

    def _replace(self, index: int, worker: Process) -> None:
        try:
            self.processes[index] = self._new_worker()
        except OSError as error:
            self._retry_later(worker, f"no process can be started ({error.strerror})")
            return
        self._retry_at.pop(worker, None)
        _log.warning("worker ended: another one is started", extra={"exit_code": worker.exitcode})

    def _retry_later(self, worker: Process, problem: str) -> None:
        _log.error("%s: the next attempt is in %g s", problem, RETRY_SECONDS)
        self._retry_at[worker] = time.monotonic() + RETRY_SECONDS
