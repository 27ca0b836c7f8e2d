"""The reconstruction store in a Redis server that all replicas share. Redis expires entries and limits the memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError, ResponseError
from redis.retry import Retry

from app.models import textfiles
from app.stores.contract import StoreError, StoreLimits

PREFIX = "reconstruction:"
STATES = "state:"
SWAP = """
local found = redis.call('GET', KEYS[1])
if found == ARGV[3] then return 1 end
if found ~= (ARGV[1] == '1' and ARGV[2]) then return 0 end
redis.call('SET', KEYS[1], ARGV[3])
return 1
"""
"""Replaces a state: 1 if there is an old one, the old one, the new one. If the client repeats the command because the
connection broke before the reply, the state is the new one already."""


def open_url(url: str, limits: StoreLimits) -> RedisStore:
    """Build the store for `redis://host:port/database`."""
    return RedisStore(url, ttl_seconds=limits.ttl_seconds, password_file=limits.password_file, timeout=limits.timeout)


class RedisStore:
    """Entries as Redis strings with a time to live.

    Args:
        url: `redis://host:port/database`, optionally with a user name. It must not contain a password, because
            URLs appear in process lists and logs.
        ttl_seconds: time to live of an entry.
        password_file: file that contains the password; read at each connection, so that it can be changed.
        timeout: seconds for connecting and for each reply.

    Raises:
        StoreError: the URL does not have that form.
    """

    def __init__(
        self, url: str, *, ttl_seconds: float, password_file: Path | None = None, timeout: float = 2.0
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port or 6379
            if parts.query or parts.fragment or not re.fullmatch(r"(/[0-9]{0,9})?", parts.path):
                raise ValueError
            database = int(parts.path[1:] or 0)
        except ValueError:
            raise StoreError("the store URL is not redis://host:port/database") from None
        if parts.password is not None:
            raise StoreError("the store URL must not hold a password: put it into a file and name that file")
        if not parts.hostname:
            raise StoreError("the store URL names no host")
        self._ttl = max(1, round(ttl_seconds * 1000))
        pool = ConnectionPool(
            host=parts.hostname,
            port=port,
            db=database,
            credential_provider=Credentials(parts.username, password_file) if password_file else None,
            username=None if password_file else parts.username,
            socket_connect_timeout=timeout,
            socket_timeout=timeout,
            socket_keepalive=True,
            # One immediate retry reconnects after a restart of the server. `Reconstructions` decides whether to
            # wait longer, because the deadline of the score is known there.
            retry=Retry(NoBackoff(), 1, (RedisConnectionError,)),
            client_name="anomaly-service",
        )
        self._redis = Redis.from_pool(pool)

    def put(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """Store all entries in one round trip and one transaction, or none of them."""
        with as_store_error(), self._redis.pipeline(transaction=True) as pipeline:
            for id, content in entries:
                pipeline.set(PREFIX + id, content, px=self._ttl)
            pipeline.execute()

    def get(self, id: str) -> bytes | None:
        """Return the content under an id; None if it was never stored or has expired."""
        with as_store_error():
            content = self._redis.get(PREFIX + id)
        return content if isinstance(content, bytes) else None

    def read_state(self, key: str) -> bytes | None:
        """Return the state under a key; None if there is none."""
        with as_store_error():
            content = self._redis.get(STATES + key)
        return content if isinstance(content, bytes) else None

    def swap_state(self, key: str, old: bytes | None, new: bytes) -> bool:
        """Replace the state under a key if it still is `old`. Return False if it is not."""
        with as_store_error():
            return bool(self._redis.eval(SWAP, 1, STATES + key, int(old is not None), old or b"", new))

    def ping(self) -> None:
        """Write an entry that expires after a second."""
        with as_store_error():
            self._redis.set(PREFIX + "ping", b"", px=1000)

    def close(self) -> None:
        """Close every connection."""
        with as_store_error():
            self._redis.close()


class Credentials(CredentialProvider):
    """The user name and the password of a file, read at each connection.

    Args:
        username: of the server, or None.
        password_file: file that contains the password.
    """

    def __init__(self, username: str | None, password_file: Path) -> None:
        self._username = username
        self._password_file = password_file

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Return the arguments of `AUTH`."""
        try:
            password = textfiles.decode(self._password_file.read_bytes()).strip()
        except (OSError, UnicodeDecodeError):
            raise RedisConnectionError("the file with the store's password cannot be read") from None
        return (self._username, password) if self._username else (password,)


_REASON = re.compile(r"(?:^|caused error: (?:\(['\"])?)([A-Z]+) ")
"""The error code of Redis, in capitals: at the start of the message, or after the command that caused it."""


@contextmanager
def as_store_error() -> Iterator[None]:
    """Raise errors of Redis as `StoreError`, without the commands and ids in their messages."""
    try:
        yield
    except ResponseError as error:  # its message contains the command, and so the id
        reasons = _REASON.findall(str(error))
        raise StoreError(" ".join([f"Redis: {type(error).__name__}", *reasons])) from error
    except (RedisError, RedisClusterException, OSError) as error:
        raise StoreError(f"Redis: {type(error).__name__}: {error}") from error
