"""The shared store: a Redis server that all replicas use. Redis itself does the expiry and bounds the memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.stores import StoreError

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
            port, database = parts.port or 6379, int(parts.path.strip("/") or 0)
        except ValueError:
            raise StoreError("the store URL is not redis://host:port/database") from None
        if parts.password is not None:
            raise StoreError("the store URL must not hold a password: put it into a file and name that file")
        if not parts.hostname:
            raise StoreError("the store URL names no host")
        self._ttl = max(1, round(ttl_seconds * 1000))
        self._redis = Redis(
            connection_pool=BlockingConnectionPool(
                max_connections=_CONNECTIONS,
                timeout=timeout,
                host=parts.hostname,
                port=port,
                db=database,
                username=parts.username,
                credential_provider=None,
                socket_connect_timeout=timeout,
                socket_timeout=timeout,
                socket_keepalive=True,
                # One fresh attempt mends a connection that a restart of the server closed. Waiting longer is not this
                # object's to do: `Reconstructions` knows how long a score may wait.
                retry=Retry(NoBackoff(), 1),
                retry_on_error=[ConnectionError],
                client_name="anomaly-service",
            )
        )
