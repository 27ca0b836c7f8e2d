"""`POST /score/batch`: many images in one request, scored while they arrive, without starving single scores.

Knows: the order of the steps, the three forms of the reply. Does not know: the framework.

A chunk is what `PASSES_AT_ONCE` forward passes take, or one when pictures are kept. A request has at most three chunks
of its body in memory: one that is being scored, one that the inference thread takes next, so that it never waits for
the event loop, and one that has just been read; of its reply, what is not yet sent: in JSON, which begins with the
counts, all of it. What is read is bounded by what is scored: a client that sends faster waits on TCP. A client that
sends or reads too slowly is let go of, because it holds one of few places.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import re
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from app.http.auth import owned
from app.http.bodies import ClientLeft, Receive, pieces
from app.http.multipart import chunks
from app.http.npy import Chunk
from app.http.queries import parse_query
from app.http.schemas import BatchQuery, ScoreResponse
from app.inference.registry import CHUNKS_AT_ONCE, PASSES_AT_ONCE, Engine
from app.inference.version import BulkScores, Serving
from app.problems import InternalError, Overloaded, Problem
from app.scoring.score import threshold_of
from app.scoring.verdict import logged, new_ids, server_timing
from app.settings import Settings
from app.stores.reconstructions import Reconstructions
from app.stores.record import Record
from app.telemetry.metrics import STAGES, Metrics

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass
class _Tally:
    """What a request has come to so far: images, and seconds in each of `STAGES`."""

    count: int = 0
    anomalous: int = 0
    failed: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0] * len(STAGES))


@dataclass(frozen=True)
class _Job:
    """What is the same for every image of a request."""

    scope: MutableMapping[str, Any]
    serving: Serving
    threshold: float
    alpha: float
    store: bool
    timeout: float
    slowest: float
    tally: _Tally = field(default_factory=_Tally)

    @asynccontextmanager
    async def taking(self, size: int) -> AsyncIterator[None]:
        """Let go of a client that takes too long over the `size` bytes of its reply that are left to be sent."""
        try:
            async with asyncio.timeout(self.timeout + size / self.slowest):
                yield
        except TimeoutError:
            raise ClientLeft from None

    def facts(self) -> dict[str, Any]:
        """Return what the access log says of the request."""
        manifest, tally = self.serving.manifest, self.tally
        counts = {"count": tally.count, "anomalous": tally.anomalous, "failed": tally.failed}
        return {"model": manifest.name, "version": manifest.version, **counts, **logged(tally.seconds)}


@dataclass
class _Scored:
    """A chunk with its results: `mse` has NaN where an item has a problem; `ids` only what was kept."""

    mse: list[float]
    reasons: list[str | None]
    ids: list[str | None]
    anomalous: int
    problems: dict[int, Problem]


class BulkScorer:
    """Answers `POST /score/batch`.

    Args:
        engine: selects versions and scores.
        reconstructions: keeps records when a request asks for it.
        metrics: counts verdicts.
        settings: limits.
    """

    def __init__(self, engine: Engine, reconstructions: Reconstructions, metrics: Metrics, settings: Settings) -> None:
        self._engine = engine
        self._reconstructions = reconstructions
        self._metrics = metrics
        self._settings = settings
        self._running = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request. A client that leaves, or does not take its reply, ends it silently.

        Raises:
            Problem: one of its kinds, as long as nothing has been sent.
        """
        if self._running >= self._settings.batch_max_requests:
            self._metrics.shed.inc()
            raise Overloaded(f"{self._running} batch requests are being answered already")
        self._running += 1
        try:
            await self._answer(scope, receive, send)
        except ClientLeft:
            scope.get("facts", {})["client_left"] = True
        finally:
            self._running -= 1

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        query = parse_query(BatchQuery, scope["query_string"])
        timeout, slowest = self._settings.body_timeout_ms / 1000, self._settings.batch_min_bytes_per_second
        body = pieces(
            receive,
            declared=headers.get(b"content-length"),
            limit=self._settings.batch_max_body_bytes,
            timeout=timeout,
            slowest=slowest,
        )
        found = chunks(
            headers.get(b"content-type", b"").decode("latin-1"),
            body,
            size=self._settings.batch_chunk_images * (1 if query.store else PASSES_AT_ONCE),
            largest_file=self._settings.max_body_bytes,
            most_files=self._settings.batch_max_files,
        )
        serving = await self._engine.select(query.model)
        threshold, alpha = threshold_of(serving.manifest, serving.calibration, query.alpha)
        job = _Job(scope, serving, threshold, alpha, query.store, timeout, slowest)
        reply = _form_of(scope)(job, send)
        try:
            async for scored in self._scored(job, found):
                reply.add(scored)
                job.tally.count += len(scored.mse)
                job.tally.failed += len(scored.problems)
                job.tally.anomalous += scored.anomalous
            await reply.finish()
        except Problem as problem:
            if not reply.begun:
                raise
            await reply.fail(problem)
        except ClientLeft:
            raise
        except Exception:
            if reply.begun:
                await reply.fail(InternalError())
            raise  # the edge logs it
        finally:
            reply.close()
            self._metrics.batch(job.tally.seconds)
            scope.get("facts", {}).update(job.facts())

    async def _scored(self, job: _Job, found: AsyncIterator[Chunk]) -> AsyncIterator[_Scored]:
        """Yield the results of each chunk in order, while the next ones are on their way."""
        on_way: deque[tuple[Chunk, asyncio.Task[BulkScores]]] = deque()
        broken: Problem | None = None
        try:
            try:
                async for chunk in found:
                    on_way.append((chunk, asyncio.create_task(self._forward(job, chunk))))
                    if len(on_way) > CHUNKS_AT_ONCE:
                        yield await self._results(job, *on_way.popleft())
            except Problem as problem:  # what came before it still has its results
                broken = problem
            while on_way:
                yield await self._results(job, *on_way.popleft())
            if broken is not None:
                raise broken
        finally:
            for _, forward in on_way:
                forward.cancel()

    async def _forward(self, job: _Job, chunk: Chunk) -> BulkScores:
        """Score the images of a chunk; when the model fails, each of them gets its problem."""
        if chunk.count == len(chunk.problems):
            return _NOTHING
        try:
            return await self._engine.score_many(job.serving, chunk.pixels, draw=job.store)
        except InternalError as problem:
            chunk.problems = dict.fromkeys(range(chunk.count), problem) | chunk.problems
            return _NOTHING

    async def _results(self, job: _Job, chunk: Chunk, forward: asyncio.Task[BulkScores]) -> _Scored:
        found = await forward
        good: Sequence[int] = range(chunk.count)
        if chunk.problems:
            good = [place for place in good if place not in chunk.problems]
        scores = found.mse.astype(np.float64)
        finite = np.isfinite(scores)
        if not finite.all():
            for index in np.flatnonzero(~finite).tolist():
                chunk.problems[good[index]] = InternalError("the model gave a score that is not a number")
            scores[~finite] = math.nan
        mses = scores.tolist()
        ids: list[str | None] = [None] * len(good)
        began = time.perf_counter()
        if job.store:
            ids = await self._keep(job, found, mses)
        stages = chunk.decode_seconds, found.queue_seconds, found.forward_seconds, time.perf_counter() - began
        for place, seconds in enumerate(stages):
            job.tally.seconds[place] += seconds
        anomalous = int(np.count_nonzero(scores > job.threshold))
        if not chunk.problems:
            self._metrics.scores(job.serving.manifest.name, mses, anomalous)
            return _Scored(mses, found.reasons, ids, anomalous, {})
        self._metrics.scores(job.serving.manifest.name, scores[finite].tolist(), anomalous)
        by_place = dict(zip(good, zip(mses, found.reasons, ids, strict=True), strict=True))
        rows = [by_place.get(place, (math.nan, None, None)) for place in range(chunk.count)]
        return _Scored([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], anomalous, chunk.problems)

    async def _keep(self, job: _Job, found: BulkScores, mses: list[float]) -> list[str | None]:
        keys, owner = new_ids(len(mses)), job.scope.get("owner")
        p_values = job.serving.calibration.p_values(mses)
        records = []
        for place, key in enumerate(keys):
            response = self._response(job, key, mses[place], p_values[place], found.reasons[place])
            record = Record(response, found.planes[place].tobytes(), float(found.peak[place]))
            records.append((owned(owner, key), record))
        return list(keys) if await self._reconstructions.kept(records) else [None] * len(keys)

    def _response(self, job: _Job, key: str, mse: float, p_value: float, reason: str | None) -> bytes:
        manifest = job.serving.manifest
        return (
            ScoreResponse(
                id=key,
                model=manifest.name,
                version=manifest.version,
                mse=mse,
                threshold=job.threshold,
                alpha=job.alpha,
                p_value=p_value,
                is_anomaly=mse > job.threshold,
                reason=reason,
                reconstruction=f"{self._settings.root_path}/reconstruction/{key}",
            )
            .model_dump_json(exclude={"reconstruction_png", "fitted"})
            .encode()
        )


_NOTHING = BulkScores(np.zeros(0, np.float32), [], np.zeros((0, 3, 28, 28), np.uint8), np.zeros(0, np.float32))


class _Reply(Protocol):
    """One of the forms of the reply."""

    begun: bool

    def add(self, scored: _Scored) -> None: ...

    async def finish(self) -> None: ...

    async def fail(self, problem: Problem) -> None: ...

    def close(self) -> None: ...


class _Lines:
    """NDJSON, sent while the body still arrives.

    What is sent never holds up what is read: a client that sends all before it reads anything must not wait for
    itself. What waits to be sent is bounded, as one line is far smaller than the image that it is about.
    """

    def __init__(self, job: _Job, send: Send) -> None:
        self.begun = False
        self._job = job
        self._send = send
        self._unsent = 0
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._sender: asyncio.Task[None] | None = None

    def add(self, scored: _Scored) -> None:
        self._put("\n".join(_items(self._job, scored)) + "\n")

    async def finish(self) -> None:
        self._put("")
        self._waiting.put_nowait(None)
        assert self._sender is not None
        async with self._job.taking(self._unsent):
            await self._sender

    async def fail(self, problem: Problem) -> None:
        self._put(_problem_item(self._job.tally.count, problem) + "\n")
        await self.finish()

    def close(self) -> None:
        if self._sender is not None:
            self._sender.cancel()

    def _put(self, text: str) -> None:
        self.begun = True
        self._unsent += len(text)
        self._waiting.put_nowait(text.encode())
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_all())

    async def _send_all(self) -> None:
        await self._send(_start(self._job, b"application/x-ndjson"))
        while (text := await self._waiting.get()) is not None:
            if text:
                await self._send({"type": "http.response.body", "body": text, "more_body": True})
                self._unsent -= len(text)
        await self._send({"type": "http.response.body", "body": b""})


class _Whole(ABC):
    """A reply that is sent when all is scored: JSON, or npy of the scores alone. `_pieces` holds it, piece by piece."""

    begun = False
    _kind: bytes

    def __init__(self, job: _Job, send: Send) -> None:
        self._job = job
        self._send = send
        self._pieces: deque[bytes] = deque()

    @abstractmethod
    def add(self, scored: _Scored) -> None: ...

    async def finish(self) -> None:
        self._complete()
        length = sum(map(len, self._pieces))
        async with self._job.taking(length):
            await self._send(_start(self._job, self._kind, length))
            while self._pieces:
                piece = self._pieces.popleft()
                await self._send({"type": "http.response.body", "body": piece, "more_body": bool(self._pieces)})

    async def fail(self, problem: Problem) -> None:
        raise problem

    def close(self) -> None:
        return

    @abstractmethod
    def _complete(self) -> None: ...


class _Document(_Whole):
    """One JSON document."""

    _kind = b"application/json"

    def add(self, scored: _Scored) -> None:
        text = ",".join(_items(self._job, scored))
        self._pieces.append((f",{text}" if self._pieces else text).encode())

    def _complete(self) -> None:
        manifest, tally = self._job.serving.manifest, self._job.tally
        members = {
            "model": manifest.name,
            "version": manifest.version,
            "threshold": self._job.threshold,
            "alpha": self._job.alpha,
            "count": tally.count,
            "anomalous": tally.anomalous,
            "failed": tally.failed,
        }
        head = json.dumps(members, separators=(",", ":"))
        self._pieces.appendleft(f'{head[:-1]},"items":['.encode())
        self._pieces.append(b"]}")


class _Scores(_Whole):
    """The scores as float32 [N] in npy; NaN where an item has a problem."""

    _kind = b"application/x-npy"

    def __init__(self, job: _Job, send: Send) -> None:
        super().__init__(job, send)
        self._scores = bytearray()

    def add(self, scored: _Scored) -> None:
        self._scores += np.asarray(scored.mse, "<f4").tobytes()

    def _complete(self) -> None:
        head = io.BytesIO()
        shape = {"descr": "<f4", "fortran_order": False, "shape": (self._job.tally.count,)}
        np.lib.format.write_array_header_1_0(head, shape)
        self._pieces += head.getvalue(), bytes(self._scores)


class _LinesAtOnce(_Whole):
    """NDJSON for HTTP/1.0, which has no chunks: its length must be known before it begins."""

    _kind = b"application/x-ndjson"

    def add(self, scored: _Scored) -> None:
        self._pieces.append(("\n".join(_items(self._job, scored)) + "\n").encode())

    def _complete(self) -> None:
        if not self._pieces:
            self._pieces.append(b"")


_REFUSED = re.compile(r"q=0(\.0*)?")
"""The weight of what is not acceptable (RFC 9110, 12.4.2)."""
_FORMS: dict[str, Callable[[_Job, Send], _Reply]] = {
    "application/json": _Document,
    "application/x-ndjson": _Lines,
    "application/x-npy": _Scores,
}


def _form_of(scope: MutableMapping[str, Any]) -> Callable[[_Job, Send], _Reply]:
    """Return the first form that the client names as acceptable; JSON when it names none that there is."""
    accept = b",".join(value for name, value in scope["headers"] if name == b"accept")
    for media_range in accept.decode("latin-1").lower().split(","):
        kind, *parameters = (part.strip() for part in media_range.split(";"))
        if kind in _FORMS and not any(_REFUSED.fullmatch(parameter) for parameter in parameters):
            lines_at_once = kind == "application/x-ndjson" and scope["http_version"] == "1.0"
            return _LinesAtOnce if lines_at_once else _FORMS[kind]
    return _Document


def _start(job: _Job, kind: bytes, length: int | None = None) -> dict[str, Any]:
    manifest = job.serving.manifest
    headers = [
        (b"content-type", kind),
        (b"cache-control", b"no-store"),
        (b"x-model", f"{manifest.name}@{manifest.version}".encode()),
        (b"x-threshold", repr(job.threshold).encode()),
        (b"x-alpha", repr(job.alpha).encode()),
    ]
    if length is not None:
        timing = server_timing(job.tally.seconds).encode()
        headers += [(b"content-length", b"%d" % length), (b"server-timing", timing)]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _items(job: _Job, scored: _Scored) -> list[str]:
    first, threshold, prefix = job.tally.count, job.threshold, job.scope.get("root_path", "")
    p_values = job.serving.calibration.p_values(scored.mse)
    lines = []
    for place, (mse, p_value, reason) in enumerate(zip(scored.mse, p_values, scored.reasons, strict=True)):
        if place in scored.problems:
            lines.append(_problem_item(first + place, scored.problems[place]))
            continue
        verdict = "true" if mse > threshold else "false"
        said = "null" if reason is None else f'"{reason}"'
        text = f'{{"index":{first + place},"mse":{mse!r},"p_value":{p_value!r},"is_anomaly":{verdict},"reason":{said}'
        if job.store:
            key = scored.ids[place]
            kept = f'"{key}","reconstruction":"{prefix}/reconstruction/{key}"' if key else 'null,"reconstruction":null'
            text += f',"id":{kept}'
        lines.append(text + "}")
    return lines


def _problem_item(index: int, problem: Problem) -> str:
    return json.dumps({"index": index, "problem": problem.document()}, separators=(",", ":"))
