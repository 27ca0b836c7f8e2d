"""Checks API keys, and reloads their file when it changes.

The file has one line per key, `<SHA-256 of the key in lower-case hexadecimal> <name>`; `#` begins a comment. The file
contains only hashes: a key has 256 random bits, so its plain SHA-256 cannot be inverted. Several keys may have the same
name. To rotate a key, add the new line, let the client change its key, then delete the old line. HAProxy reads the same
file.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from app.settings import PUBLIC_FOLDERS, PUBLIC_PATHS

_log = logging.getLogger(__name__)

_LINE = re.compile(r"\s*(?:(?P<digest>[0-9a-f]{64})\s+(?P<name>[A-Za-z0-9._-]{1,64})\s*)?(?:#.*)?", re.ASCII)
"""One line: a key, a comment, both or neither. `\\s` includes the CR of a file with CRLF."""
_BOM = b"\xef\xbb\xbf"
_CHECK_SECONDS = 1.0


class KeysError(Exception):
    """The file of the API keys is missing, empty or malformed. The message never quotes the file."""


class ApiKeys:
    """The keys of a file. A change of the file takes effect within a second.

    If a changed file cannot be read or is malformed, an error is logged and the known keys stay valid.

    Args:
        path: the file.
        clock: monotonic seconds.

    Raises:
        KeysError: the file cannot be used.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._check_at = clock() + _CHECK_SECONDS
        self._seen = self._state()
        self._complaint = ""
        self._owners = self._read()

    def owner(self, key: bytes) -> str | None:
        """Return the name of a key, or None for an unknown key."""
        self._refresh()
        # A lookup by digest needs no constant-time comparison: a client that measures the time learns about the
        # SHA-256 of its guess at most, from which it cannot derive a guess that comes closer.
        return self._owners.get(hashlib.sha256(key).digest())

    def _refresh(self) -> None:
        now = self._clock()
        if now < self._check_at:
            return
        self._check_at = now + _CHECK_SECONDS
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            self._owners = self._read()
        except KeysError as error:
            if str(error) != self._complaint:
                _log.error("API keys not changed: %s", error)
            self._complaint = str(error)
            self._seen = None  # The file may become readable without a change of its own state.
        else:
            self._complaint = ""
            _log.warning("API keys changed", extra={"names": sorted(set(self._owners.values()))})

    def _state(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_ctime_ns

    def _read(self) -> dict[bytes, str]:
        try:
            text = self._path.read_bytes().removeprefix(_BOM).decode("ascii")
        except (OSError, UnicodeDecodeError):
            raise KeysError("the file of the API keys cannot be read") from None
        owners: dict[bytes, str] = {}
        for number, line in enumerate(text.split("\n"), 1):
            match = _LINE.fullmatch(line)
            if match is None:
                raise KeysError(f"line {number} of the file of the API keys is not `<SHA-256> <name>`")
            if match["digest"] and owners.setdefault(bytes.fromhex(match["digest"]), match["name"]) != match["name"]:
                raise KeysError(f"line {number} of the file of the API keys gives an earlier key another name")
        if not owners:
            raise KeysError("the file of the API keys contains no key")
        return owners


def is_public(path: str) -> bool:
    """Return whether a path needs no API key."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDERS)
