"""The reconstruction store in a Redis Cluster that all replicas share. Each command uses one slot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry

from app.stores.contract import StoreError, StoreLimits
from app.stores.redis import PREFIX, STATES, SWAP, Credentials, as_store_error

_TIME_DIGITS = 12
"""The first digits of an id, its time in milliseconds. The entries of a micro-batch have the same time."""


def open_url(url: str, limits: StoreLimits) -> RedisClusterStore:
    """Build the store for `rediscluster://host:port,host:port`."""
    return RedisClusterStore(url, limits)


def key_of(id: str) -> str:
    """Return the key of an entry. Its hash tag is the time, so that a micro-batch is in one slot.

    Args:
        id: with or without an owner in front of it.
    """
    return f"{PREFIX}{{{id.rpartition('/')[2][:_TIME_DIGITS]}}}:{id}"


class RedisClusterStore:
    """Entries as Redis strings with a time to live, distributed by the time of their ids.

    Args:
        url: `rediscluster://host:port`, with further start nodes after commas, and optionally with a user name. It must
            not contain a password.
        limits: time to live, password file and timeout.

    Raises:
        StoreError: the URL does not have that form.
    """

    def __init__(self, url: str, limits: StoreLimits) -> None:
        username, self._nodes = _parse(url)
        self._ttl = max(1, round(limits.ttl_seconds * 1000))
        self._options: dict[str, Any] = {
            "credential_provider": Credentials(username, limits.password_file) if limits.password_file else None,
            "username": None if limits.password_file else username,
            "socket_connect_timeout": limits.timeout,
            "socket_timeout": limits.timeout,
            "socket_keepalive": True,
            "client_name": "anomaly-service",
        }
        self._cluster: RedisCluster | None = None

    def put(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """Store all entries with one transaction per slot: the entries of a micro-batch are in one slot.

        If entries have different times and one of the transactions fails, the entries of the others stay until they
        expire. Their ids were not returned to a client.
        """
        slots: defaultdict[int, list[tuple[str, bytes]]] = defaultdict(list)
        with as_store_error():
            cluster = self._connected()
            for id, content in entries:
                key = key_of(id)
                slots[cluster.keyslot(key)].append((key, content))  # type: ignore[no-untyped-call]
            for group in slots.values():
                with cluster.pipeline(transaction=True) as pipeline:  # type: ignore[no-untyped-call]
                    for key, content in group:
                        pipeline.set(key, content, px=self._ttl)
                    pipeline.execute()

    def get(self, id: str) -> bytes | None:
        """Return the content under an id; None if it was never stored or has expired."""
        with as_store_error():
            content = self._connected().get(key_of(id))
        return content if isinstance(content, bytes) else None

    def read_state(self, key: str) -> bytes | None:
        """Return the state under a key; None if there is none."""
        with as_store_error():
            content = self._connected().get(STATES + key)
        return content if isinstance(content, bytes) else None

    def swap_state(self, key: str, old: bytes | None, new: bytes) -> bool:
        """Replace the state under a key if it still is `old`. Return False if it is not."""
        with as_store_error():
            return bool(self._connected().eval(SWAP, 1, STATES + key, int(old is not None), old or b"", new))

    def ping(self) -> None:
        """Write an entry that expires after a second. It is on one node; a cluster with a failed slot rejects it."""
        with as_store_error():
            self._connected().set(key_of("ping"), b"", px=1000)

    def close(self) -> None:
        """Close every connection."""
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            with as_store_error():
                cluster.close()

    def _connected(self) -> RedisCluster:
        """Return the client. The constructor of redis-py connects, so it is called at the first use."""
        if self._cluster is None:
            nodes = [ClusterNode(host, port) for host, port in self._nodes]  # type: ignore[no-untyped-call]
            # One retry follows a slot that has moved, or reconnects. `Reconstructions` decides about waiting longer.
            self._cluster = RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 1), **self._options)
        return self._cluster


def _parse(url: str) -> tuple[str | None, list[tuple[str, int]]]:
    """Return the user name and the start nodes of a URL."""
    _, _, rest = url.partition("://")
    if any(sign in rest for sign in "/?#"):
        raise StoreError("the store URL is not rediscluster://host:port,host:port")
    user, at, hosts = rest.rpartition("@")
    if ":" in user:
        raise StoreError("the store URL must not hold a password: put it into a file and name that file")
    nodes = []
    for host in hosts.split(","):
        try:
            parts = urlsplit(f"//{host}")
            nodes.append((parts.hostname, parts.port or 6379))
        except ValueError:
            raise StoreError("the store URL is not rediscluster://host:port,host:port") from None
    if not all(name for name, _ in nodes):
        raise StoreError("the store URL names no host")
    return (user if at else None), [(str(name), port) for name, port in nodes]
