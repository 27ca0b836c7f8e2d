"""Scores the images of a batch request chunk by chunk, while later chunks still arrive, without delaying single scores.

A chunk is what `PASSES_AT_ONCE` forward passes take, or one pass when pictures are stored. At most three chunks of a
request are in memory: one is scored, one is submitted so that the inference thread continues without the event loop,
and one has just been read.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from app.inference.loader import CHUNKS_AT_ONCE
from app.inference.version import EMPTY_CHUNK, ChunkScores, ModelVersion
from app.models.manifest import LOCAL
from app.problems import InternalError, Problem
from app.scoring.review.queue import ReviewQueue
from app.scoring.validity.monitor import ValidityMonitor
from app.scoring.verdict import DecisionRule, Verdict
from app.stores.reconstructions import Reconstructions
from app.stores.records import PIXELS, Record, new_ids
from app.telemetry.metrics import STAGES, Metrics

PASSES_AT_ONCE = 4
"""Forward passes of a chunk without pictures; between two of them the inference thread serves other waiting work."""


@dataclass
class Chunk:
    """Consecutive images of a batch request.

    Attributes:
        count: number of items, valid and invalid.
        pixels: the valid items in order, uint8 [count - len(problems), 28, 28].
        problems: why an item cannot be scored, by its place in the chunk.
        decode_seconds: time for decoding its files.
    """

    count: int = 0
    pixels: bytearray = field(default_factory=bytearray)
    problems: dict[int, Problem] = field(default_factory=dict)
    decode_seconds: float = 0.0


@dataclass
class ScoredChunk:
    """A chunk with its results.

    Attributes:
        mse: the score of each item; NaN where the item has a problem.
        reasons: the guard that decided, for each item.
        ids: of the stored reconstructions; None where none is stored.
        anomalous: number of anomalous items.
        problems: by place in the chunk.
        planes, peak: the pictures of the valid items, as `ChunkScores` has them.
    """

    mse: list[float]
    reasons: list[str | None]
    ids: list[str | None]
    anomalous: int
    problems: dict[int, Problem]
    planes: NDArray[np.uint8] = field(default_factory=lambda: EMPTY_CHUNK.planes)
    peak: NDArray[np.float32] = field(default_factory=lambda: EMPTY_CHUNK.peak)


@dataclass
class Tally:
    """Totals of a batch request so far: items, items whose record was dropped, and seconds in each of `STAGES`.

    `without_id_cause` is why the last of these records was dropped.
    """

    count: int = 0
    anomalous: int = 0
    failed: int = 0
    without_id: int = 0
    without_id_cause: str = ""
    seconds: list[float] = field(default_factory=lambda: [0.0] * len(STAGES))

    def add(self, scored: ScoredChunk) -> None:
        """Add the items of a chunk."""
        self.count += len(scored.mse)
        self.failed += len(scored.problems)
        self.anomalous += scored.anomalous


@dataclass(frozen=True, eq=False)
class BatchJob:
    """The parameters and totals of a batch request.

    Attributes:
        version: scores the images.
        rule: threshold and false-positive rate.
        owner: name of the API key, or None.
        store: whether to store the reconstructions.
        pictures: whether the caller needs the pictures of a chunk, which then takes one forward pass at most.
        tally: the totals so far.
    """

    version: ModelVersion
    rule: DecisionRule
    owner: str | None
    store: bool
    pictures: bool = False
    tally: Tally = field(default_factory=Tally)


class BatchScorer:
    """Scores batch requests.

    Args:
        reconstructions: stores records when a request asks for it.
        metrics: counts verdicts.
        prefix: path prefix of links.
        validity: compares the scores with the calibration.
        review: gets all scored images. None: no review queue.
    """

    def __init__(
        self,
        reconstructions: Reconstructions,
        metrics: Metrics,
        prefix: str,
        validity: ValidityMonitor,
        review: ReviewQueue | None = None,
    ) -> None:
        self._validity = validity
        self._review = review
        self.prefix = prefix
        self._reconstructions = reconstructions
        self._metrics = metrics
        self._forwards: Counter[BatchJob] = Counter()

    @property
    def working(self) -> int:
        """Number of requests with a chunk that is being scored or waits for it. The others wait for their clients."""
        return len(self._forwards)

    async def score(self, job: BatchJob, chunks: AsyncIterable[Chunk]) -> AsyncIterator[ScoredChunk]:
        """Yield the results of each chunk in order, while later chunks are read and scored.

        Raises:
            Problem: what `chunks` raised, after the results of the chunks before it.
        """
        submitted: deque[tuple[Chunk, asyncio.Task[ChunkScores]]] = deque()
        broken: Problem | None = None
        try:
            try:
                async for chunk in chunks:
                    submitted.append((chunk, asyncio.create_task(self._forward(job, chunk))))
                    if len(submitted) > CHUNKS_AT_ONCE:
                        yield await self._results(job, *submitted.popleft())
            except Problem as problem:
                broken = problem
            while submitted:
                yield await self._results(job, *submitted.popleft())
            if broken is not None:
                raise broken
        finally:
            for _, forward in submitted:
                forward.cancel()

    async def _forward(self, job: BatchJob, chunk: Chunk) -> ChunkScores:
        """Score the images of a chunk. If the model fails, each of them gets its problem."""
        if chunk.count == len(chunk.problems):
            return EMPTY_CHUNK
        try:
            with self._at_work(job):
                return await job.version.score_many(chunk.pixels, draw=job.store or job.pictures)
        except InternalError as problem:
            # The frames of its traceback refer to the chunk: with the traceback, they would be a cycle.
            failure = problem.with_traceback(None)
            chunk.problems = dict.fromkeys(range(chunk.count), failure) | chunk.problems
            return EMPTY_CHUNK

    @contextmanager
    def _at_work(self, job: BatchJob) -> Iterator[None]:
        self._forwards[job] += 1
        try:
            yield
        finally:
            self._forwards[job] -= 1
            if not self._forwards[job]:
                del self._forwards[job]

    async def _results(self, job: BatchJob, chunk: Chunk, forward: asyncio.Task[ChunkScores]) -> ScoredChunk:
        found = await forward
        valid: Sequence[int] = range(chunk.count)
        if chunk.problems:
            valid = [place for place in valid if place not in chunk.problems]
        scores = found.mse.astype(np.float64)
        finite = np.isfinite(scores)
        if not finite.all():
            for index in np.flatnonzero(~finite).tolist():
                chunk.problems[valid[index]] = InternalError("the model returned a score that is not finite")
            scores[~finite] = math.nan
        for index in job.rule.near(scores):
            pixels = memoryview(chunk.pixels)[784 * index : 784 * (index + 1)]
            try:
                with self._at_work(job):
                    scores[index] = await job.version.score_alone(pixels)
            except InternalError as problem:
                chunk.problems[valid[index]] = problem.with_traceback(None)  # as in `_forward`
                scores[index], finite[index] = math.nan, False
        mses = scores.tolist()
        unguarded = np.fromiter((reason in {None, LOCAL} for reason in found.reasons), bool, len(found.reasons))
        self._validity.add(job.version, scores[finite & unguarded])
        ids: list[str | None] = [None] * len(valid)
        began = time.perf_counter()
        if job.store:
            ids = await self._store(job, found, mses)
        stages = chunk.decode_seconds, found.queue_seconds, found.forward_seconds, time.perf_counter() - began
        for place, seconds in enumerate(stages):
            job.tally.seconds[place] += seconds
        if self._review is not None:
            _offer(self._review, job, chunk.pixels, job.rule.verdicts(mses, found.reasons), ids)
        anomalous = job.rule.count_anomalous(scores)
        self._metrics.scores(job.rule.manifest.name, scores[finite].tolist(), anomalous)
        if not chunk.problems:
            return ScoredChunk(mses, found.reasons, ids, anomalous, {}, found.planes, found.peak)
        by_place = dict(zip(valid, zip(mses, found.reasons, ids, strict=True), strict=True))
        rows = [by_place.get(place, (math.nan, None, None)) for place in range(chunk.count)]
        return ScoredChunk([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], anomalous, chunk.problems)

    async def _store(self, job: BatchJob, found: ChunkScores, mses: list[float]) -> list[str | None]:
        """Store the records of the images with a finite score. Return the id of each image."""
        ids: list[str | None] = list(new_ids(len(mses)))
        records = []
        for place, verdict in enumerate(job.rule.verdicts(mses, found.reasons)):
            id = ids[place]
            if id is None or math.isnan(verdict.mse):
                ids[place] = None
                continue
            reply = job.rule.reply(verdict, id, self.prefix)
            records.append(Record(reply, found.planes[place].tobytes(), float(found.peak[place]), id, job.owner))
        if not records:  # all images have a problem
            return ids
        cause = await self._reconstructions.drop_cause(records)
        if cause is None:
            return ids
        job.tally.without_id += len(records)
        job.tally.without_id_cause = cause
        return [None] * len(ids)


def _offer(
    review: ReviewQueue, job: BatchJob, pixels: bytearray, verdicts: Sequence[Verdict], ids: Sequence[str | None]
) -> None:
    images = memoryview(pixels)
    for place, (verdict, id) in enumerate(zip(verdicts, ids, strict=True)):
        if not math.isnan(verdict.mse):
            review.offer(job.version.manifest, images[PIXELS * place : PIXELS * (place + 1)], verdict, id)
