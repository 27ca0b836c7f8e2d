"""Mixed load with faults at random: `make soak`, or `python -m tests.soak --seconds 1800 --seed 7`.

The soak test checks these conditions: each accepted request is answered once, with the score of its own image. An id
that was returned can be fetched, unless a fault has removed the store since, and an id is null only after such a fault.
Memory and file descriptors stay flat. The counters of the service agree with those of the clients. It prints a report
as JSON. If one of these does not hold, it fails, and the report contains the last warnings and errors of the service.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from tests import model_stores, pngs
from tests.conftest import Server

PNG = {"content-type": "image/png"}
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
        self.file = folder / "reconstructions.db"
        self.versions = folder / "store" / "zero-article"
        self.faults: dict[str, Callable[[httpx.AsyncClient], Awaitable[None]]] = {
            "delete the store": self._delete,
            "damage the store": self._damage,
            "replace the store": self._replace,
            "promote": self._promote,
            "break CURRENT": self._break_current,
            "abort requests": self._abort_requests,
            "slow batch": self._slow_batch,
            "unknown versions": self._unknown_versions,
            "large fit": self._large_fit,
        }
        self.random = random.Random(seed)
        noise = np.random.default_rng(seed).integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8)
        self.images = [pngs.plain(image) for image in noise]
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
            tasks += [asyncio.create_task(self._batches(client, end)), asyncio.create_task(self._faults(client, end))]
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

    async def _delete(self, _: httpx.AsyncClient) -> None:
        for ending in ("", "-journal"):
            self.file.with_name(self.file.name + ending).unlink(missing_ok=True)

    async def _damage(self, _: httpx.AsyncClient) -> None:
        if self.file.exists():
            with self.file.open("r+b") as content:
                content.write(os.urandom(20_000))

    async def _replace(self, _: httpx.AsyncClient) -> None:
        copy = self.file.with_suffix(".copy")
        with contextlib.suppress(FileNotFoundError):  # the service has not created it again
            shutil.copy(self.file, copy)
            copy.replace(self.file)

    async def _promote(self, _: httpx.AsyncClient) -> None:
        model_stores.promote(self.versions.parent, self.random.choice((1, 2)))

    async def _break_current(self, _: httpx.AsyncClient) -> None:
        content = self.random.choice((b"", b"x" * 1000, b"99", b"\xff\xfe"))
        self.versions.joinpath("CURRENT").write_bytes(content)

    async def _abort_requests(self, _: httpx.AsyncClient) -> None:
        await self._abort(100)

    async def _slow_batch(self, _: httpx.AsyncClient) -> None:
        await self._abort(1, b"POST /score/batch HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999\r\n\r\n")

    async def _unknown_versions(self, client: httpx.AsyncClient) -> None:
        for number in (1, 2, 99):
            await client.post(f"/score?model=zero-article@{number}", content=b"no image", headers=PNG)

    async def _large_fit(self, client: httpx.AsyncClient) -> None:
        large = pngs.plain(np.tile(pngs.gradient(), (30, 30)))
        await client.post("/score?fit=mnist", content=large, headers=PNG)

    async def _abort(self, count: int, request: bytes = b"") -> None:
        head = b"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
        request = request or head % len(self.images[0]) + self.images[0][: self.random.randrange(len(self.images[0]))]
        for _ in range(count):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
                writer.write(request)
                await writer.drain()
                writer.close()
                await writer.wait_closed()

    async def _compare_counters(self, client: httpx.AsyncClient) -> None:
        text = (await client.get("/metrics")).text
        counted = sum(float(value) for value in re.findall(r"^anomaly_scores_total\{.*\} (.*)$", text, re.MULTILINE))
        # `fit=mnist` scores one image per fault, an aborted request may be complete, and a request that missed its
        # deadline or a batch that was rejected may have been scored.
        extra = self.counts["fault: large fit"] + 100 * self.counts["fault: abort requests"]
        extra += self.counts["status 504"] + IMAGES * self.counts["batches shed"]
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


def main() -> int:
    """Run a soak from the command line."""
    parser = argparse.ArgumentParser(description="Mixed load with faults at random.")
    parser.add_argument("--seconds", type=float, default=600, help="Duration. Default: 600.")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="Random seed.")
    given = parser.parse_args()
    sys.stdout.write(f"seed {given.seed}\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), given.seconds, given.seed)
    sys.stdout.write(f"{json.dumps(report, indent=1)}\n")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
