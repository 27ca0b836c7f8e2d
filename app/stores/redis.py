"""The shared store: a Redis server that all replicas use. Redis itself does the expiry and bounds the memory."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from app.stores.contract import StoreError, Then

_PREFIX = "reconstruction:"
_CONNECTIONS = 8


class RedisStore:
    """Entries as Redis strings with a time to live.

    Args:
        url: `redis://host:port/database`, where a user name may stand before the host. A password may not: a URL is
            seen in process lists and logs.
        ttl_seconds: how long an entry lives.
        password_file: a file that holds the password on one line; read at each connection, so it can be changed.
        timeout: seconds for connecting and for each answer.

    Raises:
        StoreError: the URL is none of that form.
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
        pool = BlockingConnectionPool(
            max_connections=_CONNECTIONS,
            timeout=timeout,
            host=parts.hostname,
            port=port,
            db=database,
            credential_provider=_Credentials(parts.username, password_file) if password_file else None,
            username=None if password_file else parts.username,
            socket_connect_timeout=timeout,
            socket_timeout=timeout,
            socket_keepalive=True,
            # One more attempt, at once, mends a connection that a restart of the server closed. Waiting longer is not
            # decided here: `Reconstructions` knows how long a score may wait.
            retry=Retry(NoBackoff(), 1, (RedisConnectionError,)),
            client_name="anomaly-service",
        )
        self._redis = Redis.from_pool(pool)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._puts: set[asyncio.Task[None]] = set()

    def put(self, entries: Sequence[tuple[str, bytes]], then: Then, wanted: Callable[[], bool]) -> None:
        """Keep all entries in one round trip and one transaction, or none of them; `Store.put` says the rest.

        It is the event loop that speaks to Redis.
        """
        self._here().call_soon_threadsafe(self._begin, entries, then, wanted)

    def _here(self) -> asyncio.AbstractEventLoop:
        """Return the event loop."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    def _begin(self, entries: Sequence[tuple[str, bytes]], then: Then, wanted: Callable[[], bool]) -> None:
        if wanted():
            task = asyncio.create_task(self._put(entries, then))
            self._puts.add(task)
            task.add_done_callback(self._puts.discard)

    async def _put(self, entries: Sequence[tuple[str, bytes]], then: Then) -> None:
        try:
            async with _as_store_error(), self._redis.pipeline(transaction=True) as pipeline:
                for key, content in entries:
                    pipeline.set(_PREFIX + key, content, px=self._ttl)
                await pipeline.execute()
        except Exception as error:
            then(error)
        else:
            then(None)

    async def get(self, key: str) -> bytes | None:
        """Return what is kept under `key`; None when it never was, or has expired."""
        async with _as_store_error():
            content = await self._redis.get(_PREFIX + key)
        return content if isinstance(content, bytes) else None

    async def ping(self) -> None:
        """Return when something was written to the server; `Store.ping` says why."""
        self._here()
        async with _as_store_error():
            await self._redis.set(_PREFIX + "ping", b"", px=1000)

    async def close(self) -> None:
        """Finish what was begun and close every connection."""
        await asyncio.gather(*self._puts)
        async with _as_store_error():
            await self._redis.aclose()


class _Credentials(CredentialProvider):
    def __init__(self, username: str | None, password_file: Path) -> None:
        self._username = username
        self._password_file = password_file

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = self._password_file.read_text().strip()
        except OSError:
            raise RedisConnectionError("the file with the store's password cannot be read") from None
        return (self._username, password) if self._username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


_REASON = re.compile(r"(?:^|caused error: \(['\"])([A-Z]+) ")
"""The word in capitals with which Redis begins to say why it refuses, also where it stands behind the command."""


@asynccontextmanager
async def _as_store_error() -> AsyncIterator[None]:
    try:
        yield
    except ResponseError as error:  # its words hold the command, and so the id
        reasons = _REASON.findall(str(error))
        raise StoreError(" ".join([f"Redis: {type(error).__name__}", *reasons])) from error
    except (RedisError, OSError) as error:
        raise StoreError(f"Redis: {type(error).__name__}: {error}") from error
