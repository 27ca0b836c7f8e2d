"""Checks API keys, and reloads their file when it changes.

The file has one line per key, `<SHA-256 of the key in lower-case hexadecimal> <name>`; `#` begins a comment. The file
contains only hashes: a key has 256 random bits, so its plain SHA-256 cannot be inverted. Several keys may have the same
name. To rotate a key, add the new line, let the client change its key, then delete the old line.

HAProxy reads the same file, and its start script checks the same grammar (`deploy/gateway/start`): ASCII without other
control characters than tabs, lines that end with LF or CRLF, blanks that are spaces and tabs. A form feed or a CR
inside a line would be a blank for one reader and the end of the line for another.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from app.models import textfiles
from app.settings import PUBLIC_FOLDERS, PUBLIC_PATHS

_log = logging.getLogger(__name__)

_LINE = re.compile(rb"[ \t]*(?:(?P<digest>[0-9a-f]{64})[ \t]+(?P<name>[A-Za-z0-9._-]{1,64})[ \t]*)?(?:#[\t -~]*)?\r?")
"""One line: a key, a comment, both or neither."""
_LONGEST_LINE = 1024
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
        """Return the name of a key, or None for an unknown key. Blanks around the key are not part of the header."""
        self._refresh()
        # A lookup by digest needs no constant-time comparison: a client that measures the time learns about the
        # SHA-256 of its guess at most, from which it cannot derive a guess that comes closer.
        return self._owners.get(hashlib.sha256(key.strip(b" \t")).digest())

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
            self._seen = None  # The file may become readable without a change of its state.
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
            content = self._path.read_bytes()
        except OSError:
            raise KeysError("the file of the API keys cannot be read") from None
        if textfiles.is_utf16(content):  # the gateway, which reads the same file, cannot decode it
            raise KeysError("the file of the API keys is UTF-16; save it as UTF-8")
        if content.startswith(codecs.BOM_UTF8):
            raise KeysError("the file of the API keys begins with a byte order mark; save it as UTF-8 without one")
        owners: dict[bytes, str] = {}
        for number, line in enumerate(content.split(b"\n"), 1):
            match = _LINE.fullmatch(line) if len(line) <= _LONGEST_LINE else None
            if match is None:
                raise KeysError(f"line {number} of the file of the API keys is not '<SHA-256> <name>'")
            digest, name = (match[part].decode() if match[part] else "" for part in ("digest", "name"))
            if digest and owners.setdefault(bytes.fromhex(digest), name) != name:
                raise KeysError(f"line {number} of the file of the API keys gives an earlier key another name")
        if not owners:
            raise KeysError("the file of the API keys contains no key")
        return owners


def is_public(path: str) -> bool:
    """Return whether a path needs no API key."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDERS)
