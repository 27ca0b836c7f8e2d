"""Runs pytest in children of one process that has imported the large libraries, so that a run need not import them.

The command of a run is a small client of this process. Its exit code is that of pytest; if it is killed, so is its run.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

# Imported before the first fork.
import fastapi  # noqa: F401
import numpy as np  # noqa: F401
import pytest
import torch  # noqa: F401

_UNCHANGED = "-W", "ignore::pytest.PytestAssertRewriteWarning"
"""anyio, which is imported already, has a plugin, and pytest cannot rewrite its assertions any more."""
_CLIENT = "import socket,sys;s=socket.socket(socket.AF_UNIX);s.connect(sys.argv[1]);sys.exit(int(s.recv(8) or b'70'))"


class ForkedTests:
    """A socket; each connection is one run of the tests.

    Args:
        folder: a copy of the repository, whose modules the tests import.
        arguments: of pytest.
    """

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._folder, self._arguments = folder, arguments
        path = str(folder / ".forked")
        self.log = folder / ".forked.log"
        """The output of the last run."""
        self.command = shlex.join([sys.executable, "-S", "-E", "-c", _CLIENT, path])
        """The client, as a command line."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(1)

    def serve(self, command: list[str]) -> int:
        """Run the tests for each client until `command`, started in the folder, has ended; return its exit code."""
        process = subprocess.Popen(command, cwd=self._folder)
        while process.poll() is None:
            if select.select([self._socket], [], [], 0.1)[0]:
                with self._socket.accept()[0] as client:
                    self._run(client)
        return process.returncode

    def _run(self, client: socket.socket) -> None:
        child = os.fork()
        if child == 0:
            self._test()
        os.setpgid(child, child)
        finished = os.pidfd_open(child)
        try:
            ready = select.select([finished, client], [], [])[0]  # a client sends nothing: it is readable when it ends
            if finished not in ready:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finally:
            os.close(finished)
        with contextlib.suppress(OSError):
            client.sendall(b"%d" % min(abs(status), 99))

    def _test(self) -> None:
        status = 70
        try:
            os.chdir(self._folder)
            for number in (1, 2):
                os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.path[0] = str(self._folder)
            # The first run of the tests has written the bytecode of the whole copy.
            sys.dont_write_bytecode = True
            for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "app", "anomaly")]:
                del sys.modules[name]
            status = int(pytest.main([*_UNCHANGED, *self._arguments]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
