"""Put mixed load on a service while faults happen at random, and compare its answers with what must hold.

The soak test checks these conditions:

* Each accepted request is answered once, with the score of its own image.
* An id that was returned can be fetched, unless a fault has removed the store since: its input has the pixels that were
  sent, and its reconstruction is the one of the reply, or the one that was fetched first.
* An id is null only after a fault of the store.
* Memory and file descriptors stay flat.
* The counters of the service agree with those of the clients: replies per route and status, scores, null ids, limits
  that ended a request, failed forward passes.

It prints a report as JSON. If one of these does not hold, it fails, and the report contains the last warnings and
errors of the service.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import random
import re
import time
from collections import Counter, deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
import torch
from PIL import Image

from anomaly import NO_RETRY, AsyncClient, Problem, Score
from app.inference.detector import torchscript_allowed
from tests import model_stores, pngs
from tests.conftest import Server
from tests.infer_requests import binary_request, json_request, outputs_of
from tests.soak import slow_reader
from tests.soak.faults import PNG, RAISES, Faults

IMAGES = 24
REPEATS = 100
"""How often the images are in a batch whose reply is read slowly: a reply of 250 kB."""
STORE_CAUSES = ("store_down", "store_slow", "store_full")
ROUTES = (
    (re.compile(r"/reconstruction/.*"), "/reconstruction/{id}"),
    (re.compile(r"/v2/models/[^/]*/infer"), "/v2/models/{name}/infer"),
)
"""Paths, and the routes that the metrics name."""
MAX_SLOPE = 1e6
"""Maximum growth of the resident memory, in bytes per 10 minutes; judged from 10 minutes on."""

NOTICE_SECONDS = 1.5
"""Time after a fault of the store within which the service notices it."""
REPAIR_SECONDS = 30.0
"""Time in which scores may have no id after a fault removed the store: a damaged file is moved aside once in 10 s, and
SQLite may read the damaged pages from its cache for some seconds more."""


PACE_SECONDS = 0.2
"""Time between two batches of a client: without it, batches would leave no processor time for single images."""


class Fetched(NamedTuple):
    """A reconstruction that has been fetched, and the epoch of its score."""

    id: str
    epoch: int
    picture: bytes


class Soak:
    """One run.

    Args:
        server: a running service.
        folder: of its stores.
        seed: of faults and load.
    """

    def __init__(self, server: Server, folder: Path, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        # Clients draw in an order that depends on the network. Faults have their own numbers, so the seed repeats them.
        self.chance = random.Random(f"faults of {seed}")
        self.pixels = np.random.default_rng(seed).integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8)
        self.pixels[:, 0, 0] %= 255  # a white first pixel makes one version raise
        self.images = [pngs.plain(image) for image in self.pixels]
        self.faults = Faults(server, folder, self.pixels[0], self.chance, self).all
        self.batch = httpx.Request(
            "POST", "http://x", files=[("files", (f"{n}.png", png, "image/png")) for n, png in enumerate(self.images)]
        )
        self.expected: list[float] = []
        self.counts: Counter[str] = Counter()
        self.replies: Counter[tuple[str, int]] = Counter()
        """Number of replies per route and status."""
        self.fetched: deque[Fetched] = deque(maxlen=100)
        self.wrong: list[str] = []
        self.epoch = 0
        """Odd from a fault of the store until the service must have noticed it; entries of that time can be lost."""
        self.removed_at = -math.inf
        """When a fault last removed the store."""
        self.memory: list[tuple[float, int, int]] = []

    async def run(self, seconds: float) -> dict[str, Any]:
        """Put load on the service and inject faults, then return the report."""
        limits = httpx.Limits(max_connections=64)
        began, end = time.monotonic(), time.monotonic() + seconds
        async with httpx.AsyncClient(
            base_url=self.server.url, timeout=30, limits=limits, event_hooks={"response": [self._on_reply]}
        ) as client:
            for image in self.images:
                self.expected.append((await client.post("/score", content=image, headers=PNG)).json()["mse"])
            self.counts["scored"] = len(self.images)
            others = (self._batches, self._tensors, self._arrays, self._slow_reader, self._faults)
            work = [each(client, end) for each in (*[self._singles] * 8, *others)]
            tasks = [asyncio.create_task(self._end_on_error(each)) for each in work]
            assert self.server.process is not None
            process = psutil.Process(self.server.process.pid)
            while time.monotonic() < end and not self.wrong:
                self.memory.append((time.monotonic() - began, process.memory_info().rss, process.num_fds()))
                await asyncio.sleep(1)
            await asyncio.gather(*tasks)
            await self._compare_counters(client)
        return self._report(seconds)

    async def _end_on_error(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self.check(False, f"a client failed: {error!r}")

    async def _singles(self, client: httpx.AsyncClient, end: float) -> None:
        while time.monotonic() < end and not self.wrong:
            place = self.random.randrange(IMAGES)
            epoch = self.epoch
            query = self.random.choice(("", "", "?include=reconstruction"))
            reply = await client.post(f"/score{query}", content=self.images[place], headers=PNG)
            if reply.status_code in (503, 504):
                self.counts[f"status {reply.status_code}"] += 1
                continue
            self.check(reply.status_code == 200, f"status {reply.status_code}: {reply.text[:200]}")
            if reply.status_code != 200:
                return
            document = reply.json()
            self.note_score(document, place)
            if document["id"] is not None and self.random.random() < 0.2:
                await self._fetch_input(client, document["id"], epoch, place)
                await self._fetch_reconstruction(client, document, epoch)

    async def _fetch_input(self, client: httpx.AsyncClient, id: str, epoch: int, place: int) -> None:
        content = await self._fetch(client, id, epoch, "input")
        if content is not None:
            found = np.asarray(Image.open(io.BytesIO(content)))
            self.check(np.array_equal(found, self.pixels[place]), f"{id}: the input is not image {place}")

    async def _fetch_reconstruction(self, client: httpx.AsyncClient, document: dict[str, Any], epoch: int) -> None:
        """Compare a reconstruction with the one in its reply, and an older one with what was fetched first."""
        content = await self._fetch(client, document["id"], epoch, "reconstruction")
        if content is not None:
            embedded = document.get("reconstruction_png")
            same = embedded is None or base64.b64decode(embedded) == content
            self.check(same, f"{document['id']}: the reconstruction is not the one of the reply")
            self.fetched.append(Fetched(document["id"], epoch, content))
        if self.fetched:
            id, epoch, picture = self.random.choice(self.fetched)
            content = await self._fetch(client, id, epoch, "reconstruction")
            self.check(content in (None, picture), f"{id}: the reconstruction has changed")

    async def _fetch(self, client: httpx.AsyncClient, id: str, epoch: int, view: str) -> bytes | None:
        """Return a picture, or None if a fault may have removed it or its store fails."""
        found = await client.get(f"/reconstruction/{id}?view={view}")
        since = time.monotonic() - self.removed_at
        may_be_lost = epoch != self.epoch or epoch % 2 == 1
        at = time.strftime("%H:%M:%S", time.gmtime())
        self.check(
            found.status_code in ((200, 404, 503) if may_be_lost else (200, 503)),
            f"{at}: a living id is {found.status_code}, {since:.1f} s after a fault of the store",
        )
        self.counts[f"fetched {view}"] += found.status_code == 200
        return found.content if found.status_code == 200 else None

    async def _batches(self, client: httpx.AsyncClient, end: float) -> None:
        self.batch.read()
        headers = {"content-type": self.batch.headers["content-type"]}
        while time.monotonic() < end and not self.wrong:
            accept = self.random.choice(("application/json", "application/x-ndjson"))
            reply = await client.post("/score/batch", content=self.batch.content, headers={**headers, "accept": accept})
            if reply.status_code == 503:
                self.counts["batches shed"] += 1
                continue
            self.check(reply.status_code == 200, f"batch: {reply.status_code} {reply.text[:200]}")
            items = reply.json()["items"] if "ndjson" not in accept else list(map(json.loads, reply.text.splitlines()))
            self.check(len(items) == IMAGES, f"batch: {len(items)} items")
            for item in items:
                self._check_score(item["mse"], item["index"])
            self.counts["scored"] += len(items)
            self.counts["batches"] += 1
            await asyncio.sleep(PACE_SECONDS)

    async def _tensors(self, client: httpx.AsyncClient, end: float) -> None:
        content, headers = binary_request(self.pixels.tobytes(), list(self.pixels.shape))
        binary = {"content": content, "headers": headers}
        requests: tuple[dict[str, Any], ...] = ({"json": json_request(self.pixels)}, binary)
        while time.monotonic() < end and not self.wrong:
            reply = await client.post("/v2/models/zero-article/infer", **self.random.choice(requests))
            if reply.status_code in (503, 504):
                self.counts["tensors shed"] += 1
                continue
            self.check(reply.status_code == 200, f"tensor: {reply.status_code} {reply.text[:200]}")
            for place, mse in enumerate(outputs_of(reply)["mse"]):
                self._check_score(float(mse), place)
            self.counts["scored"] += IMAGES
            self.counts["tensors"] += 1
            await asyncio.sleep(PACE_SECONDS)

    async def _arrays(self, _: httpx.AsyncClient, end: float) -> None:
        async with AsyncClient(self.server.url, timeout=30, retry=NO_RETRY) as client:
            while time.monotonic() < end and not self.wrong:
                try:
                    scores = await client.score_array(self.pixels)
                except Problem as problem:
                    self.check(problem.status in (503, 504), f"array: {problem}")
                    self.note_reply("/score/batch", problem.status)
                    self.counts["arrays shed"] += 1
                    continue
                self.note_reply("/score/batch", 200)
                for place, score in enumerate(scores):
                    assert isinstance(score, Score), score
                    self._check_score(score.mse, place)
                self.counts["scored"] += len(scores)
                self.counts["arrays"] += 1
                await asyncio.sleep(PACE_SECONDS)

    async def _slow_reader(self, _: httpx.AsyncClient, end: float) -> None:
        """Read the replies of large batches more slowly than the service writes them."""
        content = io.BytesIO()
        np.save(content, np.tile(self.pixels, (REPEATS, 1, 1)))
        headers = {"content-type": "application/x-npy", "accept": "application/x-ndjson"}
        while time.monotonic() < end and not self.wrong:
            await asyncio.sleep(5 * PACE_SECONDS)
            try:
                status, reply = await slow_reader.post(self.server.port, "/score/batch", headers, content.getvalue())
            except ConnectionError:  # the service rejects a batch, and closes, before it has read the whole body
                self.counts["slow readers closed"] += 1
                continue
            self.note_reply("/score/batch", status)
            self.check(status != 200 or reply.endswith(b"\n"), "slow reader: the reply ends early")
            if status == 503:
                self.counts["slow readers shed"] += 1
                continue
            self.check(status == 200, f"slow reader: {status} {reply[:200]!r}")
            items = list(map(json.loads, reply.splitlines()))
            self.check([item["index"] for item in items] == list(range(REPEATS * IMAGES)), "slow reader: items missing")
            for item in items:
                self._check_score(item["mse"], item["index"] % IMAGES)
            self.counts["scored"] += len(items)
            self.counts["slow readers"] += 1

    async def _faults(self, client: httpx.AsyncClient, end: float) -> None:
        while time.monotonic() < end and not self.wrong:
            fault = self.chance.choice(tuple(self.faults))
            self.counts[f"fault: {fault}"] += 1
            removes = fault.endswith("the store")
            if removes:
                self.epoch += 1
                self.removed_at = time.monotonic()
            await self.faults[fault](client)
            if removes:
                await asyncio.sleep(NOTICE_SECONDS)
                self.epoch += 1
            await asyncio.sleep(self.chance.uniform(0.1, 1.5))

    async def _compare_counters(self, client: httpx.AsyncClient) -> None:
        """Compare the counters; the service counts a reply a moment after it has sent it."""
        end = time.monotonic() + 5
        while differences := self._differences((await client.get("/metrics")).text):
            if time.monotonic() > end:
                self.wrong += differences
                return
            await asyncio.sleep(0.1)

    def _differences(self, text: str) -> list[str]:
        """Return how the metrics contradict what the clients have received."""
        late = sum(count for (_, status), count in self.replies.items() if status == 504)
        limited = sum(count for (_, status), count in self.replies.items() if status in (503, 504))
        failed = sum(count for (_, status), count in self.replies.items() if status == 500)
        degraded = {cause: _metric(text, f'anomaly_degraded_total{{cause="{cause}"}}') for cause in _causes(text)}
        dropped = sum(degraded.pop(cause) for cause in STORE_CAUSES)
        scored, lost = self.counts["scored"], self.counts["without id"]
        closed = self.counts["slow readers closed"]
        self.counts["scores by the metric"] = _metric(text, "anomaly_scores_total{")
        # A request that gets 504 may have been scored, without an id, or fail later. Only batches of IMAGES get 504.
        # A slow reader that was disconnected may not have read its status 503.
        comparisons = [
            ("scores", self.counts["scores by the metric"], scored, IMAGES * late),
            ("null ids", dropped, lost, late),
            ("null ids, other metric", _metric(text, "anomaly_reconstructions_dropped_total"), lost, late),
            ("statuses 503 and 504", sum(degraded.values()), limited, closed),
            ("failed forward passes", _metric(text, "anomaly_forward_pass_failures_total"), failed, late),
        ]
        for (route, status), count in self.replies.items():
            name = f'anomaly_http_requests_total{{route="{route}",status="{status}"}}'
            unread = closed if (route, status) == ("/score/batch", 503) else 0
            comparisons.append((f"{route} {status}", _metric(text, name), count, unread))
        return [
            f"{name}: {counted} counted by the service, {received} received"
            for name, counted, received, slack in comparisons
            if not received <= counted <= received + slack
        ]

    async def _on_reply(self, reply: httpx.Response) -> None:
        path = reply.request.url.path
        if path != "/metrics":
            self.note_reply(
                next((route for pattern, route in ROUTES if pattern.fullmatch(path)), path), reply.status_code
            )

    def note_reply(self, route: str, status: int) -> None:
        """Count a reply."""
        self.replies[route, status] += 1

    def note_score(self, document: dict[str, Any], place: int | None) -> None:
        """Count a score, and compare it with the one of its image; None stands for another image."""
        self.counts["scored"] += 1
        if place is not None:
            self._check_score(document["mse"], place)
        if document["id"] is None:
            self.counts["without id"] += 1
            since = time.monotonic() - self.removed_at
            at = time.strftime("%H:%M:%S", time.gmtime())
            self.check(since < REPAIR_SECONDS, f"{at}: no id {since:.1f} s after a fault of the store")

    def _check_score(self, mse: float, place: int) -> None:
        near = abs(mse - self.expected[place]) <= 1e-5 * self.expected[place]
        self.check(near, f"image {place}: {mse} instead of {self.expected[place]}")

    def check(self, holds: bool, message: str) -> None:
        """Note what does not hold; the soak then ends."""
        if not holds:
            self.wrong.append(message)

    def _report(self, seconds: float) -> dict[str, Any]:
        rows = np.array(self.memory[len(self.memory) // 3 :])  # after the warm-up
        minutes = np.array([part[:, :2].min(0) for part in np.array_split(rows, max(1, len(rows) // 60))])
        # A version that is being loaded takes memory for a moment; a leak raises the minimum of each minute as well.
        slope = float(np.polyfit(minutes[:, 0], minutes[:, 1], 1)[0] * 600) if len(minutes) > 2 else 0.0
        if rows[-1, 0] >= 600:
            self.check(slope <= MAX_SLOPE, f"memory grows by {slope / 1e6:.1f} MB per 10 minutes")
        half = len(rows) // 2
        descriptors = int(np.median(rows[half:, 2]) - np.median(rows[:half, 2])) if half else 0
        self.check(descriptors <= 8, f"{descriptors} more descriptors in the second half")
        return {
            "seconds": seconds,
            "wrong": self.wrong,
            "counts": dict(sorted(self.counts.items())),
            "replies": {f"{route} {status}": count for (route, status), count in sorted(self.replies.items())},
            "memory_mb_minimum_per_minute": [round(each / 1e6, 1) for each in minutes[:, 1]],
            "memory_mb_per_10_minutes": round(slope / 1e6, 2),
            "descriptors_second_half_more": descriptors,
        }


def _causes(text: str) -> list[str]:
    return re.findall(r'^anomaly_degraded_total\{cause="(.*)"\}', text, re.MULTILINE)


def _metric(text: str, name: str) -> int:
    """Return the sum of the samples whose lines begin with `name`."""
    values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(name)]
    return int(sum(map(float, values)))


def soak(folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Start a service in `folder`, run a soak, and return its report."""
    store = model_stores.copy(folder / "store", 1, 2, RAISES, current=2)
    with torchscript_allowed():
        scoring = torch.jit.load(model_stores.SHIPPED / "model.pt")  # type: ignore[no-untyped-call]
    model_stores.put_module(store / "zero-article" / str(RAISES), model_stores.RaisesOnWhite(scoring))
    server = Server(
        folder,
        ANOMALY_MODEL_STORE=str(store),
        ANOMALY_DEFAULT_MODEL="zero-article",
        ANOMALY_WATCH_SECONDS="0.2",
        ANOMALY_LOG_REQUESTS="false",
        ANOMALY_DEADLINE_MS="10000",
        ANOMALY_STORE_TIMEOUT_MS="5000",  # the scheduler of a busy machine is not a fault of the store
    ).start()
    try:
        report = asyncio.run(Soak(server, folder, seed).run(seconds))
        assert server.process is not None
        if server.process.poll() is not None:
            report["wrong"].append(f"the service has ended with {server.process.returncode}")
        if report["wrong"]:
            lines = [line for line in server.log().splitlines() if '"level": "info"' not in line]
            report["log"] = lines[-20:]
        return {"seed": seed, **report}
    finally:
        if server.process is not None and server.process.poll() is None:
            server.kill()
