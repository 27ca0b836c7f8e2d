"""Configures the process: signals, heap, garbage collector, exit."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import functools
import gc
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from uvicorn.config import STARTUP_FAILURE

_log = logging.getLogger(__name__)

EXIT_CANNOT_START = 2
"""Exit code of a start that failed."""
EXIT_ABANDONED = 3
"""Exit code of a shutdown that abandoned work which did not finish in time."""
EXIT_WORKER_ABANDONED = 4
"""The same of one of several workers: uvicorn's supervisor takes 3 for a failed start, and ends all workers."""
_COLLECT_AFTER = 20_000, 20, 50
"""Thresholds of the garbage collector's generations, see `gc.set_threshold`."""
EXIT_SECONDS = 5.0
"""Maximum time between the end of a shutdown and the end of its process."""
_MAX_DESCRIPTORS = 65536
_METRICS_PREFIX = "anomaly-metrics-"
_M_ARENA_MAX = -8
_STAT = Path("/proc/self/stat")


def limit_heaps() -> None:
    """Limit glibc to three heaps: event loop, inference, store. Further heaps would keep megabytes each.

    Call it before any thread starts. Without glibc, this function does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 3)


def raise_descriptor_limit() -> None:
    """Raise the limit of open files to the maximum that the system allows this process: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def release_free_memory() -> None:
    """Return free heap memory to the operating system. It blocks the allocations of all threads for milliseconds."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def tune_garbage_collector() -> None:
    """Exclude all objects that exist now from garbage collection, and collect less often from now on.

    Objects that exist after the start live as long as the process. Most later objects are freed by refcounting, and
    thousands of open connections need not be traversed every few requests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)


def make_metrics_folder() -> str:
    """Create the folder of the metrics that the workers share, and remove the folders of killed supervisors.

    This process holds a lock on the folder until it ends, so another process can tell whether the folder is in use.
    """
    parent = Path(tempfile.gettempdir())
    for stale in parent.glob(f"{_METRICS_PREFIX}*"):
        _remove_unless_locked(stale)
    # Locked before it has the name that others look for.
    created = Path(tempfile.mkdtemp(prefix=f".{_METRICS_PREFIX}"))
    fcntl.flock(os.open(created, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_EX)
    return str(created.rename(parent / created.name.removeprefix(".")))


def remove_abandoned_metrics_folder() -> None:
    """Remove the folder of the metrics if the supervisor has been killed: a worker calls it at its end."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is not None and Path(folder).name.startswith(_METRICS_PREFIX):
        _remove_unless_locked(Path(folder))


def _remove_unless_locked(folder: Path) -> None:
    with suppress(OSError):  # a path that is in use, of another user, or not a folder
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def process_age() -> float | None:
    """Return the seconds since this process was started; None on a system without `/proc`."""
    try:
        ticks = int(_STAT.read_bytes().rpartition(b")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return None


@contextmanager
def drain_on_sigterm(begin: Callable[[], None], seconds: float) -> Iterator[None]:
    """Inside the block, the first SIGTERM calls `begin` and is delivered after `seconds`.

    A second SIGTERM is delivered at once, but ignored in a worker: systemd signals the supervisor and its workers, and
    then the supervisor signals its workers.
    """
    if seconds == 0 or threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, previous = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
    draining = False

    def drain(number: int, frame: FrameType | None) -> None:
        nonlocal draining
        deliver = functools.partial(previous, number, frame) if callable(previous) else lambda: None
        if draining:
            if multiprocessing.parent_process() is None:
                deliver()
            return
        draining = True
        begin()
        loop.call_soon_threadsafe(loop.call_later, seconds, deliver)

    signal.signal(signal.SIGTERM, drain)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def failed_start() -> int:
    """Return the exit code of this process if it cannot start: the supervisor expects another one of its workers."""
    return EXIT_CANNOT_START if multiprocessing.parent_process() is None else STARTUP_FAILURE


def exit_abandoned() -> None:
    """End the process at once, without joining the threads that did not finish in time."""
    _exit(EXIT_ABANDONED if multiprocessing.parent_process() is None else EXIT_WORKER_ABANDONED)


def _exit(code: int) -> None:
    _log.error("shutdown did not finish in time: exit code %d", code)
    logging.shutdown()
    os._exit(code)


def exit_unless_finished(finished: bool, started: bool) -> None:
    """End the process at once if its shutdown abandoned work, else in five seconds if it has not ended by itself.

    Python joins some threads before it exits, so a thread that hangs would prevent the exit. After a failed start, the
    server still has to log the reason. With another exit code, a supervisor would repeat the start without end.
    """
    if started and not finished:
        exit_abandoned()
    end = exit_abandoned if started else functools.partial(_exit, failed_start())
    timer = threading.Timer(EXIT_SECONDS, end)
    timer.daemon = True
    timer.start()
