"""Reads files of the model store, which other programs write and which may be anything."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_regular(path: Path, limit: int = -1) -> bytes:
    """Return the content of a regular file, or its first `limit` bytes.

    Raises:
        OSError: the file is missing, cannot be read, or is not a regular file. Opening a FIFO does not block.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read(limit)
