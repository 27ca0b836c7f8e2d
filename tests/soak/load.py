"""Put mixed load on a service while faults happen at random, and compare its answers with what must hold.

The soak test checks these conditions: each accepted request is answered once, with the score of its own image. An id
that was returned can be fetched, unless a fault has removed the store since, and an id is null only after such a fault.
Memory and file descriptors stay flat. The counters of the service agree with those of the clients. It prints a report
as JSON. If one of these does not hold, it fails, and the report contains the last warnings and errors of the service.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from anomaly import NO_RETRY, AsyncClient, Problem, Score
from tests import model_stores, pngs
from tests.conftest import Server
from tests.infer_requests import binary_request, json_request, outputs_of
from tests.soak.faults import ABORTED, PNG, Faults

IMAGES = 24
MAX_SLOPE = 1e6
"""Maximum growth of the resident memory, in bytes per 10 minutes; judged from 10 minutes on."""

NOTICE_SECONDS = 1.5
"""Time after a fault of the store within which the service notices it; entries of that time can be lost."""
REPAIR_SECONDS = 30.0
"""Time in which scores may have no id after a fault removed the store: a damaged file is moved aside once in 10 s, and
SQLite may read the damaged pages from its cache for some seconds more."""


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
        self.pixels = np.random.default_rng(seed).integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8)
        self.images = [pngs.plain(image) for image in self.pixels]
        self.faults = Faults(server, folder, self.images[0], self.random).all
        self.batch = httpx.Request(
            "POST", "http://x", files=[("files", (f"{n}.png", png, "image/png")) for n, png in enumerate(self.images)]
        )
        self.expected: list[float] = []
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.epoch = 0
        """Number of faults that removed the store."""
        self.removed_at = -math.inf
        """When a fault last removed the store."""
        self.memory: list[tuple[float, int, int]] = []

    async def run(self, seconds: float) -> dict[str, Any]:
        """Put load on the service and inject faults, then return the report."""
        limits = httpx.Limits(max_connections=64)
        began, end = time.monotonic(), time.monotonic() + seconds
        async with httpx.AsyncClient(base_url=self.server.url, timeout=30, limits=limits) as client:
            for image in self.images:
                self.expected.append((await client.post("/score", content=image, headers=PNG)).json()["mse"])
            self.counts["scored"] = len(self.images)
            tasks = [asyncio.create_task(self._singles(client, end)) for _ in range(8)]
            tasks += [
                asyncio.create_task(each(client, end))
                for each in (self._batches, self._tensors, self._arrays, self._faults)
            ]
            assert self.server.process is not None
            process = psutil.Process(self.server.process.pid)
            while time.monotonic() < end and not self.wrong:
                self.memory.append((time.monotonic() - began, process.memory_info().rss, process.num_fds()))
                await asyncio.sleep(1)
            await asyncio.gather(*tasks)
            await self._compare_counters(client)
        return self._report(seconds)

    async def _singles(self, client: httpx.AsyncClient, end: float) -> None:
        while time.monotonic() < end and not self.wrong:
            place = self.random.randrange(IMAGES)
            epoch = self.epoch
            query = self.random.choice(("", "", "?include=reconstruction"))
            reply = await client.post(f"/score{query}", content=self.images[place], headers=PNG)
            if reply.status_code in (503, 504):
                self.counts[f"status {reply.status_code}"] += 1
                continue
            self._check(reply.status_code == 200, f"status {reply.status_code}: {reply.text[:200]}")
            self.counts["scored"] += 1
            document = reply.json()
            self._check_score(document["mse"], place)
            if document["id"] is None:
                self.counts["without id"] += 1
                since = time.monotonic() - self.removed_at
                at = time.strftime("%H:%M:%S", time.gmtime())
                self._check(since < REPAIR_SECONDS, f"{at}: no id {since:.1f} s after a fault of the store")
            if document["id"] is not None and self.random.random() < 0.2:
                found = await client.get(f"/reconstruction/{document['id']}?view=input")
                since = time.monotonic() - self.removed_at
                may_be_lost = epoch != self.epoch or since < NOTICE_SECONDS
                lives = found.status_code in (200, 503) or may_be_lost
                at = time.strftime("%H:%M:%S", time.gmtime())
                self._check(
                    lives, f"{at}: a living id is {found.status_code}, {since:.1f} s after a fault of the store"
                )
                self.counts["fetched"] += found.status_code == 200

    async def _batches(self, client: httpx.AsyncClient, end: float) -> None:
        self.batch.read()
        headers = {"content-type": self.batch.headers["content-type"]}
        while time.monotonic() < end and not self.wrong:
            accept = self.random.choice(("application/json", "application/x-ndjson"))
            reply = await client.post("/score/batch", content=self.batch.content, headers={**headers, "accept": accept})
            if reply.status_code == 503:
                self.counts["batches shed"] += 1
                continue
            self._check(reply.status_code == 200, f"batch: {reply.status_code} {reply.text[:200]}")
            items = reply.json()["items"] if "ndjson" not in accept else list(map(json.loads, reply.text.splitlines()))
            self._check(len(items) == IMAGES, f"batch: {len(items)} items")
            for item in items:
                self._check_score(item["mse"], item["index"])
            self.counts["scored"] += len(items)
            self.counts["batches"] += 1
            await asyncio.sleep(0.2)

    async def _tensors(self, client: httpx.AsyncClient, end: float) -> None:
        content, headers = binary_request(self.pixels.tobytes(), list(self.pixels.shape))
        binary = {"content": content, "headers": headers}
        requests: tuple[dict[str, Any], ...] = ({"json": json_request(self.pixels)}, binary)
        while time.monotonic() < end and not self.wrong:
            reply = await client.post("/v2/models/zero-article/infer", **self.random.choice(requests))
            if reply.status_code in (503, 504):
                self.counts["tensors shed"] += 1
                continue
            self._check(reply.status_code == 200, f"tensor: {reply.status_code} {reply.text[:200]}")
            for place, mse in enumerate(outputs_of(reply)["mse"]):
                self._check_score(float(mse), place)
            self.counts["scored"] += IMAGES
            self.counts["tensors"] += 1
            await asyncio.sleep(0.2)

    async def _arrays(self, _: httpx.AsyncClient, end: float) -> None:
        async with AsyncClient(self.server.url, timeout=30, retry=NO_RETRY) as client:
            while time.monotonic() < end and not self.wrong:
                try:
                    scores = await client.score_array(self.pixels)
                except Problem as problem:
                    self._check(problem.status in (503, 504), f"array: {problem}")
                    self.counts["arrays shed"] += 1
                    continue
                for place, score in enumerate(scores):
                    assert isinstance(score, Score), score
                    self._check_score(score.mse, place)
                self.counts["scored"] += len(scores)
                self.counts["arrays"] += 1
                await asyncio.sleep(0.2)

    async def _faults(self, client: httpx.AsyncClient, end: float) -> None:
        while time.monotonic() < end and not self.wrong:
            fault = self.random.choice(tuple(self.faults))
            self.counts[f"fault: {fault}"] += 1
            removes = fault.endswith("the store")
            if removes:
                self.epoch += 1
                self.removed_at = time.monotonic()
            await self.faults[fault](client)
            if removes:
                await asyncio.sleep(NOTICE_SECONDS)
                self.epoch += 1
            await asyncio.sleep(self.random.uniform(0.1, 1.5))

    async def _compare_counters(self, client: httpx.AsyncClient) -> None:
        text = (await client.get("/metrics")).text
        counted = sum(float(value) for value in re.findall(r"^anomaly_scores_total\{.*\} (.*)$", text, re.MULTILINE))
        # `fit=mnist` scores one image per fault, an aborted request may be complete, and a request that missed its
        # deadline or a batch that was rejected may have been scored.
        extra = self.counts["fault: large fit"] + ABORTED * self.counts["fault: abort requests"]
        shed = sum(self.counts[f"{each} shed"] for each in ("batches", "tensors", "arrays"))
        extra += self.counts["status 504"] + IMAGES * shed
        lowest = self.counts["scored"]
        self._check(lowest <= counted <= lowest + extra, f"{counted} scores counted, {lowest} received")
        self.counts["scores by the metric"] = int(counted)

    def _check_score(self, mse: float, place: int) -> None:
        near = abs(mse - self.expected[place]) <= 1e-5 * self.expected[place]
        self._check(near, f"image {place}: {mse} instead of {self.expected[place]}")

    def _check(self, holds: bool, message: str) -> None:
        if not holds:
            self.wrong.append(message)

    def _report(self, seconds: float) -> dict[str, Any]:
        rows = np.array(self.memory[len(self.memory) // 3 :])  # after the warm-up
        minutes = np.array([part[:, :2].min(0) for part in np.array_split(rows, max(1, len(rows) // 60))])
        # A version that is being loaded takes memory for a moment; a leak raises the minimum of each minute as well.
        slope = float(np.polyfit(minutes[:, 0], minutes[:, 1], 1)[0] * 600) if len(minutes) > 2 else 0.0
        if rows[-1, 0] >= 600:
            self._check(slope <= MAX_SLOPE, f"memory grows by {slope / 1e6:.1f} MB per 10 minutes")
        half = len(rows) // 2
        descriptors = int(np.median(rows[half:, 2]) - np.median(rows[:half, 2])) if half else 0
        self._check(descriptors <= 8, f"{descriptors} more descriptors in the second half")
        return {
            "seconds": seconds,
            "wrong": self.wrong,
            "counts": dict(sorted(self.counts.items())),
            "memory_mb_minimum_per_minute": [round(each / 1e6, 1) for each in minutes[:, 1]],
            "memory_mb_per_10_minutes": round(slope / 1e6, 2),
            "descriptors_second_half_more": descriptors,
        }


def soak(folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Start a service in `folder`, run a soak, and return its report."""
    store = model_stores.copy(folder / "store", 1, 2)
    server = Server(
        folder,
        ANOMALY_MODEL_STORE=str(store),
        ANOMALY_DEFAULT_MODEL="zero-article",
        ANOMALY_WATCH_SECONDS="0.2",
        ANOMALY_LOG_REQUESTS="false",
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
