"""`POST /score/batch`: reads a batch request while it arrives, and writes its reply as JSON, NDJSON or npy.

Backpressure: the body is read only as fast as it is scored. Requests whose images are scored at the moment are limited,
and so are all requests, with a fair share for each client. So a client that sends or reads slowly takes a place from
its own further requests only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

from app.concurrency.places import FairPlaces
from app.http.batch_exchange import BatchExchange
from app.http.batch_lots import lot_reply
from app.http.batch_replies import BatchReply, Send, reply_type
from app.http.bodies import ClientLeft, Receive, decoded_pieces, pieces
from app.http.fitting import client_of
from app.http.multipart import Chunks, chunks
from app.http.queries import parse_query, with_fields
from app.http.schemas import BatchQuery
from app.inference.registry import Registry
from app.problems import InternalError, InvalidParameter, Overloaded, Problem
from app.scoring.batch import PASSES_AT_ONCE, BatchJob, BatchScorer
from app.scoring.verdict import DecisionRule
from app.settings import Settings
from app.telemetry.metrics import Metrics

SHUTDOWN_SECONDS = 8.0
"""Time that batch requests have to finish after the server has begun its shutdown."""
_STOPPING = "the service is shutting down"


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
        self._places = FairPlaces(
            settings.batch_max_connections, "batch requests are being handled", cause="batch_places"
        )
        self._stopping = False
        self.running = 0

    def begin_shutdown(self) -> None:
        """Reject further requests, and end those that do not finish within `SHUTDOWN_SECONDS`."""
        if not self._stopping:
            self._stopping = True
            loop = asyncio.get_running_loop()
            loop.call_later(SHUTDOWN_SECONDS, self._places.end_all, lambda: Overloaded(_STOPPING, cause="shutdown"))

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one request. If a client disconnects or does not read its reply, the request ends without an error.

        Raises:
            Problem: the request is rejected; nothing has been sent.
        """
        self._check()
        self.running += 1
        try:
            await self._handle(scope, receive, send)
        except ClientLeft:
            scope.get("facts", {})["client_left"] = True
        finally:
            self.running -= 1

    @contextmanager
    def place(self, scope: MutableMapping[str, Any]) -> Iterator[None]:
        """Hold a place of the client inside the block, for a request of another route that is scored like a batch.

        Raises:
            Overloaded: too many requests are being scored, there is no place, or another client has taken it.
        """
        self._check()
        self.running += 1
        try:
            with self._places.take(client_of(scope)):
                yield
        finally:
            self.running -= 1

    def _check(self) -> None:
        if self._stopping:
            raise Overloaded(_STOPPING, cause="shutdown")
        if self._scorer.working >= self._settings.batch_max_requests:
            raise Overloaded(f"{self._scorer.working} batch requests are being scored already", cause="batch_places")

    async def _handle(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        reply: BatchReply | None = None
        try:
            with self._places.take(client_of(scope)):
                job, found, reply = await self._begin(scope, receive, send)
                async for scored in self._scorer.score(job, found):
                    reply.add(scored)
                    job.tally.add(scored)
                    await reply.drain()
                await reply.finish()
        except Problem as problem:
            if reply is None or not reply.begun:
                raise
            if problem.cause:
                scope.get("facts", {})["cause"] = problem.cause
            await reply.fail(problem)
        except ClientLeft:
            raise
        except Exception:
            if reply is not None and reply.begun:
                with suppress(ClientLeft):
                    await reply.fail(InternalError())
            raise  # the middleware logs it
        finally:
            if reply is not None:
                reply.close()
                self._metrics.batch(job.tally.seconds)
                scope.get("facts", {}).update(reply.exchange.facts())

    async def _begin(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> tuple[BatchJob, Chunks, BatchReply]:
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
        if query.fdr is not None:
            make_reply = lot_reply(make_reply, query.fdr)
        version = await self._registry.select(query.model)
        own = version.manifest.preparation.fit
        if found.has_files and query.fit is None and own != "strict":
            raise InvalidParameter(
                f"{version.manifest.name} prepares images with fit={own}, which a batch does not do; send them "
                "one by one to POST /score, or add fit=strict if they are prepared already"
            )
        rule = DecisionRule.for_alpha(version.manifest, version.calibration, query.alpha)
        job = BatchJob(version, rule, scope.get("owner"), query.store)
        exchange = BatchExchange(job, scope.get("root_path", ""), timeout, slowest)
        if not query.store:
            found.size *= PASSES_AT_ONCE
        return job, found, make_reply(exchange, send)
