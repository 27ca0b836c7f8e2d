"""A batch request as its reply needs it: the job, and the limits on the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from app.http.bodies import ClientLeft
from app.scoring.batch import BatchJob
from app.telemetry.metrics import stage_times


@dataclass(frozen=True)
class BatchExchange:
    """A batch request and the limits on its client.

    Attributes:
        job: what is scored.
        prefix: path prefix of links.
        timeout: seconds that a client may pause.
        min_bytes_per_second: minimum average rate at which a client must read its reply.
    """

    job: BatchJob
    prefix: str
    timeout: float
    min_bytes_per_second: float

    @asynccontextmanager
    async def sending(self, size: int) -> AsyncIterator[None]:
        """Raise `ClientLeft` if the client takes too long to read the remaining `size` bytes of its reply."""
        try:
            async with asyncio.timeout(self.timeout + size / self.min_bytes_per_second):
                yield
        except TimeoutError:
            raise ClientLeft from None

    def facts(self) -> dict[str, Any]:
        """Return the members of the access log line."""
        manifest, tally = self.job.rule.manifest, self.job.tally
        counts: dict[str, Any] = {"count": tally.count, "anomalous": tally.anomalous, "failed": tally.failed}
        if tally.without_id:
            counts |= {"without_id": tally.without_id, "without_id_cause": tally.without_id_cause}
        return {"model": manifest.name, "version": manifest.version, **counts, **stage_times(tally.seconds)[1]}
