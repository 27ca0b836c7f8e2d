"""Prepares images for `fit=mnist` and `fit=resize`, one at a time, with fair turns between clients."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any

from app.concurrency.lanes import LaneWorker
from app.concurrency.places import FairPlaces
from app.images.fit import Fitted
from app.images.prepare import prepare
from app.models.manifest import Preparation
from app.problems import DeadlineExceeded
from app.settings import Settings

_LARGE_PIXELS = 512 * 1024
_LARGE_BYTES = 128 * 1024
_PNG = b"\x89PNG\r\n\x1a\n"


class Fitter:
    """Fits images in a separate thread, so that memory is bounded and scores continue.

    The clients take turns, and so do the small and the large images of each client.

    Args:
        settings: limits.
    """

    def __init__(self, settings: Settings) -> None:
        self._max_pixels = settings.fit_max_pixels
        self._deadline = settings.deadline_ms / 1000
        self._places = FairPlaces(settings.fit_max_waiting, "images are being fitted", cause="fit_places")
        self._worker = LaneWorker("fit")

    def place(self, scope: MutableMapping[str, Any]) -> AbstractContextManager[None]:
        """Hold a place of the client inside the block.

        Raises:
            Overloaded: there is no place, or another client has taken it.
        """
        return self._places.take(client_of(scope))

    async def fit(self, scope: MutableMapping[str, Any], content: bytes, preparation: Preparation) -> Fitted:
        """Prepare the image of a client.

        Raises:
            InvalidImage: one of its kinds.
            DeadlineExceeded: the image was not fitted in time.
        """
        try:
            async with asyncio.timeout(self._deadline):
                lane = client_of(scope), _is_large(content)
                return await self._worker.run(lambda: prepare(content, preparation, self._max_pixels), lane)
        except TimeoutError:
            raise DeadlineExceeded("the image was not fitted in time", cause="fit_deadline") from None

    def close(self) -> None:
        """End the thread, once it has finished its image."""
        self._worker.close(timeout=0)


def client_of(scope: MutableMapping[str, Any]) -> str:
    """Return the identity of a client: the name of its API key, or else its address.

    The lower half of an IPv6 address is left out: a client can choose it.
    """
    owner, client = scope.get("owner"), scope.get("client")
    if owner is not None:
        return f"key {owner}"
    if client is None:  # a Unix domain socket
        return ""
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return str(client[0])
    return str(address) if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def _is_large(content: bytes) -> bool:
    """Return whether an image takes long: a small file can declare many pixels."""
    if content.startswith(_PNG):
        return int.from_bytes(content[16:20]) * int.from_bytes(content[20:24]) > _LARGE_PIXELS
    return len(content) > _LARGE_BYTES
