"""API keys: who may ask, and whose a reconstruction is.

Knows: the file of the keys. Does not know: HTTP replies, stores.

The file has one line for each key, `<SHA-256 of the key, hexadecimal> <name>`; `#` begins a comment. Only hashes are on
disk: a key has 256 random bits, so that a plain hash cannot be guessed back. Several lines may have one name, which is
how a key is rotated: add the new one, let the client change over, remove the old one. HAProxy reads the same file.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

_log = logging.getLogger(__name__)

_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})\s+(?P<name>[A-Za-z0-9._-]{1,64})")
_LOOK_EVERY = 1.0
_PUBLIC = frozenset({"/", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json"})
_PUBLIC_FOLDERS = ("/page/",)


class KeysError(Exception):
    """The file of the API keys is missing, empty or holds something else. The message never quotes it."""


class ApiKeys:
    """The keys of a file, read again within a second after it changes.

    A file that can no longer be read or makes no sense is reported, and the keys that were known stay in force.

    Args:
        path: the file.
        clock: monotonic seconds.

    Raises:
        KeysError: the file cannot be used now.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._look_at = clock() + _LOOK_EVERY
        self._seen = self._state()
        self._complaint = ""
        self._owners = self._read()

    def owner(self, key: bytes) -> str | None:
        """Return the name of a key, or None when nobody has it. Takes as long for a wrong key as for a right one."""
        self._refresh()
        digest = hashlib.sha256(key).hexdigest()
        found = None
        for known, name in self._owners:
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _refresh(self) -> None:
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_EVERY
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
            self._seen = None  # what keeps a file from being read need not change the file
        else:
            self._complaint = ""
            _log.warning("API keys changed", extra={"names": sorted({name for _, name in self._owners})})

    def _state(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_ctime_ns

    def _read(self) -> list[tuple[str, str]]:
        try:
            text = self._path.read_text("ascii")
        except (OSError, UnicodeDecodeError):
            raise KeysError("the file of the API keys cannot be read") from None
        owners = []
        for number, line in enumerate(text.splitlines(), 1):
            content = line.partition("#")[0].strip()
            if not content:
                continue
            match = _LINE.fullmatch(content)
            if match is None:
                raise KeysError(f"line {number} of the file of the API keys is not `<SHA-256> <name>`")
            owners.append((match["digest"], match["name"]))
        if not owners:
            raise KeysError("the file of the API keys holds no key")
        return owners


def is_public(path: str) -> bool:
    """Return whether a path answers without a key: probes, metrics, and what a browser loads before it can ask."""
    return path in _PUBLIC or path.startswith(_PUBLIC_FOLDERS)
