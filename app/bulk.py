"""`POST /score/batch`: many images in one request, scored while they arrive, without starving single scores.

Knows: the order of the steps, the three forms of the reply. Does not know: the framework.

A request has at most one chunk at the inference thread and one that waits for its turn, so its memory does not grow
with its body. What is read is bounded by what is scored: a client that sends faster waits on TCP.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from app.bodies import ClientLeft, Receive
from app.bulk_bodies import Chunk, chunks, pieces
from app.engine import BulkScores, Engine, Serving
from app.keys import owned
from app.metrics import Metrics
from app.problems import InternalError, Overloaded, Problem
from app.reconstructions import Reconstructions
from app.record import Record
from app.schemas import BatchQuery, ScoreResponse
from app.scoring import parse_query, threshold_of
from app.settings import Settings

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class _Job:
    """What is the same for every image of a request."""

    scope: MutableMapping[str, Any]
    serving: Serving
    threshold: float
    alpha: float
    store: bool


@dataclass
class _Scored:
    """A chunk with its results: `mse` has NaN where an item has a problem; `ids` only what was kept."""

    mse: list[float]
    p_values: list[float]
    reasons: list[str | None]
    ids: list[str | None]
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
        """Answer one request. A client that leaves ends it silently, at the next piece of its body.

        Raises:
            Problem: one of its kinds, as long as nothing has been sent.
        """
        if self._running >= self._settings.bulk_max_requests:
            self._metrics.shed.inc()
            raise Overloaded(f"{self._running} batch requests are being answered already")
        self._running += 1
        try:
            await self._answer(scope, receive, send)
        except ClientLeft:
            return
        finally:
            self._running -= 1

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        query = parse_query(BatchQuery, scope["query_string"])
        body = pieces(
            receive,
            declared=headers.get(b"content-length"),
            limit=self._settings.bulk_max_body_bytes,
            timeout=self._settings.body_timeout_ms / 1000,
        )
        found = chunks(
            headers.get(b"content-type", b"").decode("latin-1"),
            body,
            size=self._settings.bulk_chunk_images,
            largest_file=self._settings.max_body_bytes,
        )
        serving = await self._engine.select(query.model)
        threshold, alpha = threshold_of(serving.manifest, serving.calibration, query.alpha)
        job = _Job(scope, serving, threshold, alpha, query.store)
        reply = _form_of(headers.get(b"accept", b""))(job, send)
        try:
            async for scored in self._scored(job, found):
                reply.add(scored)
            await reply.finish()
        except Problem as problem:
            if not reply.begun:
                raise
            await reply.fail(problem)
        finally:
            reply.close()

    async def _scored(self, job: _Job, found: AsyncIterator[Chunk]) -> AsyncIterator[_Scored]:
        """Yield the results of each chunk in order, while the next chunk is being read."""
        running: asyncio.Task[_Scored] | None = None
        broken: Problem | None = None
        try:
            try:
                async for chunk in found:
                    before = None if running is None else await running
                    running = asyncio.create_task(self._score(job, chunk))
                    if before is not None:
                        yield before
            except Problem as problem:  # what came before it still has its results
                broken = problem
            if running is not None:
                yield await running
            if broken is not None:
                raise broken
        finally:
            if running is not None:
                running.cancel()

    async def _score(self, job: _Job, chunk: Chunk) -> _Scored:
        good = [place for place in range(chunk.count) if place not in chunk.problems]
        found = _NOTHING
        if good:
            try:
                found = await self._engine.score_many(job.serving, chunk.pixels, draw=job.store)
            except InternalError as problem:
                chunk.problems.update(dict.fromkeys(good, problem))
                good = []
        for place, finite in zip(good, np.isfinite(found.mse).tolist(), strict=True):
            if not finite:
                chunk.problems[place] = InternalError("the model gave a score that is not a number")
        mses = found.mse.astype(float)
        calibration = job.serving.calibration
        p_values = calibration.p_values(mses)
        ids: list[str | None] = [None] * len(good)
        if job.store:
            ids = await self._keep(job, found, mses.tolist(), p_values)
        self._count(job, mses)
        if not chunk.problems:
            return _Scored(mses.tolist(), p_values, found.reasons, ids, {})
        by_place = dict(zip(good, zip(mses.tolist(), p_values, found.reasons, ids, strict=True), strict=True))
        rows = [by_place.get(place, (float("nan"), 1.0, None, None)) for place in range(chunk.count)]
        return _Scored(
            [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], [r[3] for r in rows], chunk.problems
        )

    async def _keep(self, job: _Job, found: BulkScores, mses: list[float], p_values: list[float]) -> list[str | None]:
        async def keep(place: int, key: str) -> str | None:
            response = self._response(job, key, mses[place], p_values[place], found.reasons[place])
            record = Record(response, found.planes[place].tobytes(), float(found.peak[place]))
            return key if await self._reconstructions.keep(owned(job.scope, key), record) else None

        now = f"{time.time_ns() // 1_000_000:012x}"
        return list(await asyncio.gather(*(keep(place, now + os.urandom(16).hex()) for place in range(len(mses)))))

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
            .model_dump_json(exclude={"reconstruction_png"})
            .encode()
        )

    def _count(self, job: _Job, mses: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        finite = mses[np.isfinite(mses)]
        anomalous = int((finite > job.threshold).sum())
        self._metrics.scores(job.serving.manifest.name, len(finite) - anomalous, anomalous, finite)


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
        self._count = 0
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._sender: asyncio.Task[None] | None = None

    def add(self, scored: _Scored) -> None:
        self._put("\n".join(_items(self._job, scored, self._count)) + "\n")
        self._count += len(scored.mse)

    async def finish(self) -> None:
        self._put("")
        self._waiting.put_nowait(None)
        assert self._sender is not None
        await self._sender

    async def fail(self, problem: Problem) -> None:
        self._put(_problem_item(self._count, problem) + "\n")
        await self.finish()

    def close(self) -> None:
        if self._sender is not None:
            self._sender.cancel()

    def _put(self, text: str) -> None:
        self.begun = True
        self._waiting.put_nowait(text.encode())
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_all())

    async def _send_all(self) -> None:
        await self._send(_start(self._job, b"application/x-ndjson"))
        while (text := await self._waiting.get()) is not None:
            if text:
                await self._send({"type": "http.response.body", "body": text, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})


class _Whole:
    """A reply that is sent when all is scored: JSON, or npy of the scores alone."""

    begun = False

    def __init__(self, job: _Job, send: Send) -> None:
        self._job = job
        self._send = send
        self._count = self._anomalous = self._failed = 0

    def add(self, scored: _Scored) -> None:
        self._keep(scored)
        self._count += len(scored.mse)
        self._failed += len(scored.problems)
        self._anomalous += sum(mse > self._job.threshold for mse in scored.mse)

    async def finish(self) -> None:
        kind, body = self._body()
        await self._send(_start(self._job, kind, len(body)))
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, problem: Problem) -> None:
        raise problem

    def close(self) -> None: ...

    def _keep(self, scored: _Scored) -> None:
        raise NotImplementedError

    def _body(self) -> tuple[bytes, bytes]:
        raise NotImplementedError


class _Document(_Whole):
    """One JSON document."""

    def __init__(self, job: _Job, send: Send) -> None:
        super().__init__(job, send)
        self._items: list[str] = []

    def _keep(self, scored: _Scored) -> None:
        self._items += [",".join(_items(self._job, scored, self._count))]

    def _body(self) -> tuple[bytes, bytes]:
        manifest = self._job.serving.manifest
        members = {
            "model": manifest.name,
            "version": manifest.version,
            "threshold": self._job.threshold,
            "alpha": self._job.alpha,
            "count": self._count,
            "anomalous": self._anomalous,
            "failed": self._failed,
        }
        head = json.dumps(members, separators=(",", ":"))
        return b"application/json", f'{head[:-1]},"items":[{",".join(self._items)}]}}'.encode()


class _Scores(_Whole):
    """The scores as float32 [N] in npy; NaN where an item has a problem."""

    def __init__(self, job: _Job, send: Send) -> None:
        super().__init__(job, send)
        self._scores: list[np.ndarray[Any, np.dtype[np.float32]]] = []

    def _keep(self, scored: _Scored) -> None:
        self._scores.append(np.asarray(scored.mse, np.float32))

    def _body(self) -> tuple[bytes, bytes]:
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(self._scores) if self._scores else np.zeros(0, np.float32))
        return b"application/x-npy", buffer.getvalue()


_FORMS: dict[str, Callable[[_Job, Send], _Reply]] = {
    "application/json": _Document,
    "application/x-ndjson": _Lines,
    "application/x-npy": _Scores,
}


def _form_of(accept: bytes) -> Callable[[_Job, Send], _Reply]:
    """Return the first form that the client names; JSON when it names none that there is."""
    for media_range in accept.decode("latin-1").split(","):
        form = _FORMS.get(media_range.partition(";")[0].strip().lower())
        if form is not None:
            return form
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
        headers.append((b"content-length", b"%d" % length))
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _items(job: _Job, scored: _Scored, first: int) -> list[str]:
    threshold, prefix = job.threshold, job.scope.get("root_path", "")
    lines = []
    for place, (mse, p_value, reason) in enumerate(zip(scored.mse, scored.p_values, scored.reasons, strict=True)):
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
