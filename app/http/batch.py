"""`POST /score/batch`: reads a batch request while it arrives, and writes its reply as JSON, NDJSON or npy.

Backpressure: the body is read only as fast as it is scored. A client that sends or reads too slowly is disconnected,
because it occupies one of few places.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from app.http.batch_replies import BatchExchange, Send, reply_type
from app.http.bodies import ClientLeft, Receive, decoded_pieces, pieces
from app.http.multipart import chunks
from app.http.queries import parse_query, with_fields
from app.http.schemas import BatchQuery
from app.inference.registry import Registry
from app.problems import InternalError, Overloaded, Problem
from app.scoring.batch import PASSES_AT_ONCE, BatchJob, BatchScorer
from app.scoring.verdict import DecisionRule
from app.settings import Settings
from app.telemetry.metrics import Metrics


class BatchHandler:
    """Handles `POST /score/batch`.

    Args:
        registry: selects the model version.
        scorer: scores the chunks.
        metrics: counts the times of requests.
        settings: limits.

    Attributes:
        running: number of batch requests that are being handled.
    """

    def __init__(self, registry: Registry, scorer: BatchScorer, metrics: Metrics, settings: Settings) -> None:
        self._registry = registry
        self._scorer = scorer
        self._metrics = metrics
        self._settings = settings
        self.running = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one request. A client that disconnects, or does not read its reply, ends it silently.

        Raises:
            Problem: the request is rejected; nothing has been sent.
        """
        with self.place():
            try:
                await self._handle(scope, receive, send)
            except ClientLeft:
                scope.get("facts", {})["client_left"] = True

    @contextmanager
    def place(self) -> Iterator[None]:
        """Occupy one of the places of batch requests inside the block.

        Raises:
            Overloaded: all of them are occupied.
        """
        if self.running >= self._settings.batch_max_requests:
            raise Overloaded(f"{self.running} batch requests are being handled already")
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def _handle(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers, settings = dict(scope["headers"]), self._settings
        query = parse_query(BatchQuery, scope["query_string"])
        timeout, slowest = settings.body_timeout_ms / 1000, settings.batch_min_bytes_per_second
        arriving = pieces(
            receive,
            declared=headers.get(b"content-length"),
            limit=settings.batch_max_body_bytes,
            timeout=timeout,
            slowest=slowest,
        )
        found = chunks(
            headers.get(b"content-type", b"").decode("latin-1"),
            decoded_pieces(headers.get(b"content-encoding"), arriving, limit=settings.batch_max_body_bytes),
            size=settings.batch_chunk_images,
            largest_file=settings.max_body_bytes,
            most_files=settings.batch_max_files,
        )
        make_reply = reply_type(scope)
        query = with_fields(query, await found.fields())
        version = await self._registry.select(query.model)
        rule = DecisionRule.for_alpha(version.manifest, version.calibration, query.alpha)
        job = BatchJob(version, rule, scope.get("owner"), query.store)
        exchange = BatchExchange(job, scope.get("root_path", ""), timeout, slowest)
        reply = make_reply(exchange, send)
        if not query.store:
            found.size *= PASSES_AT_ONCE
        try:
            async for scored in self._scorer.score(job, found):
                reply.add(scored)
                job.tally.add(scored)
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
            raise  # the middleware logs it
        finally:
            reply.close()
            self._metrics.batch(job.tally.seconds)
            scope.get("facts", {}).update(exchange.facts())
