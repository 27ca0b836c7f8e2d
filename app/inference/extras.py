"""The versions loaded for requests that name a version: a bounded cache that clients cannot thrash."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from app.inference.detector import DetectorError
from app.inference.version import ModelVersion
from app.models.repository import RepositoryError
from app.problems import DeadlineExceeded, ModelUnavailable, Overloaded

_log = logging.getLogger(__name__)

RESIDENCE_SECONDS = 10.0
"""Minimum time that a version loaded for a client stays loaded. It limits how many loads clients can cause: a cache
that evicts at once is thrashed by a client that requests more versions in turn than the cache holds."""
_REJECTED_SECONDS = 30.0

Key = tuple[str, int]


class ExtraVersions:
    """Versions besides the current ones, least recently used first.

    Args:
        load: loads a version; raises RepositoryError or DetectorError.
        retire: gets each evicted version.
        max_versions: maximum number of versions that are loaded or being loaded.
        max_waiting: maximum number of requests that wait for a version to be loaded.
        deadline: seconds that a request waits for a version to be loaded.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        load: Callable[[str, int], Awaitable[ModelVersion]],
        retire: Callable[[ModelVersion], None],
        *,
        max_versions: int,
        max_waiting: int,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._retire = retire
        self._max_versions = max_versions
        self._max_waiting = max_waiting
        self._deadline = deadline
        self._clock = clock
        self._loaded: OrderedDict[Key, ModelVersion] = OrderedDict()
        self._evictable_at: dict[Key, float] = {}
        self._loads: dict[Key, asyncio.Task[ModelVersion | None]] = {}
        self._rejected_until: dict[Key, float] = {}
        self._waiting = 0

    def versions(self) -> list[ModelVersion]:
        """Return the loaded versions, least recently used first."""
        return list(self._loaded.values())

    def get(self, name: str, number: int) -> ModelVersion | None:
        """Return a version if it is loaded."""
        key = name, number
        if key in self._loaded:
            self._loaded.move_to_end(key)
        return self._loaded.get(key)

    async def load(self, name: str, number: int) -> ModelVersion:
        """Return a version that exists; load it once for all requests that wait for it.

        Raises:
            ModelUnavailable, DeadlineExceeded, Overloaded: `Registry.select` describes them.
        """
        version = self.get(name, number) or await self._join_load((name, number))
        if version is None:
            raise ModelUnavailable(f"{name}@{number} was rejected", cause="version_rejected")
        return version

    async def take(self, name: str, number: int) -> ModelVersion | None:
        """Remove and return a version that becomes the current one, or None. If it is being loaded, wait for it."""
        key = name, number
        if key in self._loads:
            await asyncio.shield(self._loads[key])
        self._evictable_at.pop(key, None)
        return self._loaded.pop(key, None)

    def put(self, version: ModelVersion) -> None:
        """Keep a version that was the current one, or retire it if there is no room."""
        if self._make_room():
            self._add(version, self._clock())
        else:
            self._retire(version)

    def drop(self, name: str) -> None:
        """Retire all versions of a model."""
        for key in [key for key in self._loaded if key[0] == name]:
            self._evict(key)

    async def aclose(self) -> None:
        """Cancel all loads."""
        for load in self._loads.values():
            load.cancel()
        await asyncio.gather(*self._loads.values(), return_exceptions=True)

    async def _join_load(self, key: Key) -> ModelVersion | None:
        if self._clock() < self._rejected_until.get(key, 0.0):
            return None
        if self._waiting >= self._max_waiting:
            raise Overloaded(f"{self._waiting} requests wait for versions that are being loaded", cause="version_load")
        if key not in self._loads:
            if not self._has_room():
                raise Overloaded(
                    f"{self._max_versions} versions besides the current ones are loaded or being loaded, and each stays"
                    f" loaded for at least {RESIDENCE_SECONDS:g} s",
                    cause="version_places",
                )
            self._loads[key] = load = asyncio.create_task(self._load_one(key))
            load.add_done_callback(lambda _: self._loads.pop(key))
        self._waiting += 1
        try:
            async with asyncio.timeout(self._deadline):
                return await asyncio.shield(self._loads[key])
        except TimeoutError:
            raise DeadlineExceeded("the version is still being loaded", cause="version_load") from None
        finally:
            self._waiting -= 1

    async def _load_one(self, key: Key) -> ModelVersion | None:
        try:
            version = await self._load(*key)
        except Exception as error:
            extra = {"model": key[0], "version": key[1]}
            if isinstance(error, (RepositoryError, DetectorError)):
                _log.error("version rejected: %s", error, extra=extra)
            else:
                _log.exception("version rejected, because its load failed", extra=extra)
            now = self._clock()
            self._rejected_until = {key: until for key, until in self._rejected_until.items() if now < until}
            self._rejected_until[key] = now + _REJECTED_SECONDS
            return None
        self._make_room()
        self._add(version, self._clock() + RESIDENCE_SECONDS)
        return version

    def _has_room(self) -> bool:
        now = self._clock()
        resident = sum(now < self._evictable_at[key] for key in self._loaded)
        return resident + len(self._loads) < self._max_versions

    def _make_room(self) -> bool:
        """Evict the least recently used versions until one more fits. Return False if it does not."""
        now = self._clock()
        evictable = [key for key in self._loaded if self._evictable_at[key] <= now]
        while len(self._loaded) >= self._max_versions and evictable:
            self._evict(evictable.pop(0))
        return len(self._loaded) < self._max_versions

    def _add(self, version: ModelVersion, evictable_at: float) -> None:
        key = version.manifest.name, version.manifest.version
        if key in self._loaded:  # a request has loaded it while it became the current one
            evictable_at = max(evictable_at, self._evictable_at[key])
            self._evict(key)
        self._loaded[key] = version
        self._evictable_at[key] = evictable_at

    def _evict(self, key: Key) -> None:
        del self._evictable_at[key]
        self._retire(self._loaded.pop(key))
