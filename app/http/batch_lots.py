"""The replies of `POST /score/batch` with `fdr`: the anomalies of the whole batch at a false-discovery rate."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from typing import Any

from app.http.batch_exchange import BatchExchange
from app.http.batch_replies import (
    BatchReply,
    JsonReply,
    NdjsonReply,
    NdjsonWithLength,
    Send,
    items,
    problem_item,
)
from app.problems import InvalidParameter, Problem
from app.scoring.batch import ScoredChunk
from app.scoring.discoveries import Discoveries, discoveries


def lot_reply(
    plain: Callable[[BatchExchange, Send], BatchReply], rate: float
) -> Callable[[BatchExchange, Send], BatchReply]:
    """Return the reply with discoveries that corresponds to a reply without.

    Args:
        plain: what `reply_type` returned.
        rate: the false-discovery rate.

    Raises:
        InvalidParameter: npy contains scores only.
    """
    kind = _LOTS.get(plain)
    if kind is None:
        hint = "Accept application/json or application/x-ndjson."
        raise InvalidParameter("fdr: a reply in npy contains scores only", hint=hint)
    return functools.partial(kind, rate)


class _Lot:
    """The p-values of a batch so far."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._p_values: list[float] = []
        self._calibration_size = 0

    def add(self, exchange: BatchExchange, scored: ScoredChunk) -> None:
        """Add the images of a chunk that have a score."""
        calibration = exchange.job.rule.calibration
        self._calibration_size = len(calibration.scores)
        p_values = calibration.p_values(scored.mse)
        self._p_values += [p for place, p in enumerate(p_values) if place not in scored.problems]

    def found(self) -> Discoveries:
        """Return the discoveries among all images."""
        return discoveries(self._p_values, self.rate, self._calibration_size)

    def members(self, found: Discoveries) -> dict[str, Any]:
        """Return the members of the reply that describe the whole batch."""
        return {
            "fdr": self.rate,
            "discoveries": found.count,
            "cutoff": found.cutoff,
            "min_discoveries": found.min_discoveries,
            "resolution_limited": found.resolution_limited,
        }

    def line(self) -> str:
        """Return the last line of NDJSON."""
        return json.dumps(self.members(self.found()), separators=(",", ":")) + "\n"


class _JsonLot(JsonReply):
    """One JSON document; each item with a score has a q-value."""

    def __init__(self, rate: float, exchange: BatchExchange, send: Send) -> None:
        super().__init__(exchange, send)
        self._lot = _Lot(rate)
        self._items: list[str] = []
        self._is_scored: list[bool] = []
        self._extra: dict[str, Any] = {}

    def add(self, scored: ScoredChunk) -> None:
        self._lot.add(self.exchange, scored)
        self._items += items(self.exchange, scored)
        self._is_scored += [place not in scored.problems for place in range(len(scored.mse))]

    async def finish(self) -> None:
        await asyncio.to_thread(self._render)
        await super().finish()

    def _render(self) -> None:
        found = self._lot.found()
        self._extra = self._lot.members(found)
        q_values = iter(found.q_values)
        for place, is_scored in enumerate(self._is_scored):
            if is_scored:
                q = next(q_values)
                discovery = "true" if q <= self._lot.rate else "false"
                self._items[place] = f'{self._items[place][:-1]},"q_value":{q!r},"discovery":{discovery}}}'
        self._pieces.append(",".join(self._items).encode())

    def _members(self) -> dict[str, Any]:
        return {**super()._members(), **self._extra}


class _NdjsonLot(NdjsonReply):
    """NDJSON whose last line contains the cut-off: it is not known before the last image."""

    def __init__(self, rate: float, exchange: BatchExchange, send: Send) -> None:
        super().__init__(exchange, send)
        self._lot = _Lot(rate)

    def add(self, scored: ScoredChunk) -> None:
        self._lot.add(self.exchange, scored)
        super().add(scored)

    async def finish(self) -> None:
        self._put(self._lot.line())
        await super().finish()

    async def fail(self, problem: Problem) -> None:
        self._put(problem_item(self.exchange.job.tally.count, problem) + "\n")
        await super().finish()


class _NdjsonLotWithLength(NdjsonWithLength):
    """The same for HTTP/1.0."""

    def __init__(self, rate: float, exchange: BatchExchange, send: Send) -> None:
        super().__init__(exchange, send)
        self._lot = _Lot(rate)

    def add(self, scored: ScoredChunk) -> None:
        self._lot.add(self.exchange, scored)
        super().add(scored)

    def _complete(self) -> None:
        self._pieces.append(self._lot.line().encode())


_LOTS: dict[Any, Callable[[float, BatchExchange, Send], BatchReply]] = {
    JsonReply: _JsonLot,
    NdjsonReply: _NdjsonLot,
    NdjsonWithLength: _NdjsonLotWithLength,
}
