"""State machine: the model registry of a running application, while versions are published, promoted and damaged."""

from __future__ import annotations

import asyncio
import gc
import logging
import shutil
import tempfile
import weakref
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.inference.extras import RESIDENCE_SECONDS
from app.inference.registry import REJECTED_SECONDS
from app.inference.version import ModelVersion
from app.settings import Settings
from tests import model_stores, pngs
from tests.conftest import running, services
from tests.requests import raw
from tests.waiting import until

NAME = "zero-article"
NUMBERS = st.integers(1, 4)
MAX_EXTRA = 1
IMAGE = pngs.plain()


class RegistryMachine(RuleBasedStateMachine):
    """One model whose folder changes in any order. Its replies name the version that a request names, or none.

    The machine models the files (`good`, `damaged`, `wanted`), the version that must serve, and for how long a
    rejected version is not read again. It reads from the registry only which versions are loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = model_stores.copy(self.folder / "store", 1, 2, 3, current=1)
        self.clock = 1000.0
        self.good, self.damaged = {1, 2, 3}, set[int]()
        self.wanted: int | None = 1
        """The version that CURRENT names; None if it names none."""
        self.serving = 1
        self.rejected: tuple[int | None, float] | None = None
        """The version that the last check rejected, and until when it is not read again."""
        self.not_read_until: dict[int, float] = {}
        """The versions that requests named and that were rejected."""
        self.stays_until: dict[int, float] = {}
        """The versions that requests have loaded, and their minimum time."""
        self.held: list[ModelVersion] = []
        self.seen = weakref.WeakSet[ModelVersion]()
        self.loop = asyncio.new_event_loop()
        self.stack = AsyncExitStack()
        self.client = self._run(self.stack.enter_async_context(running(self._settings(), clock=lambda: self.clock)))
        self.registry = services(self.client).registry
        gc.disable()
        logging.disable()  # pytest keeps the records, and with their tracebacks the versions

    def _settings(self) -> Settings:
        return Settings(
            model_store=self.store,
            default_model=NAME,
            device="cpu",
            store_url=f"sqlite:///{self.folder}/reconstructions.db",
            log_requests=False,
            watch_seconds=3600,
            microbatch_max_size=1,
            batch_chunk_images=1,
            max_extra_versions=MAX_EXTRA,
            deadline_ms=60_000,
        )

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    def _loaded(self) -> set[int]:
        """Return the numbers of the loaded versions besides the current one."""
        return {version.manifest.version for version in self.registry.extras.versions()}

    def _path(self, number: int) -> Path:
        return self.store / NAME / str(number)

    @rule(number=NUMBERS)
    def publish(self, number: int) -> None:
        """Publish a version, or repair it."""
        shutil.rmtree(self._path(number), ignore_errors=True)
        shutil.copytree(model_stores.SHIPPED, self._path(number))
        model_stores.change(self._path(number), version=number)
        self.damaged.discard(number)
        self.good.add(number)

    @rule(number=NUMBERS, kind=st.sampled_from(["altered", "missing", "not a module", "other number", "no manifest"]))
    def publish_damaged(self, number: int, kind: str) -> None:
        """Publish a version that must be rejected, or damage the files of a version."""
        self.publish(number)
        if kind == "altered":
            content = bytearray((self._path(number) / "model.pt").read_bytes())
            content[len(content) // 2] ^= 1
            (self._path(number) / "model.pt").write_bytes(content)
        elif kind == "missing":
            (self._path(number) / "calibration.npy").unlink()
        elif kind == "not a module":
            model_stores.put_bytes(self._path(number), b"not a module")
        elif kind == "other number":
            model_stores.change(self._path(number), version=number + 1)
        else:
            (self._path(number) / "manifest.json").write_text("{")
        self.good.discard(number)
        self.damaged.add(number)

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        """Remove the folder of a version. A loaded version keeps serving."""
        shutil.rmtree(self._path(number), ignore_errors=True)
        self.good.discard(number)
        self.damaged.discard(number)

    @rule(number=NUMBERS, seen=st.booleans())
    def promote(self, number: int, seen: bool) -> None:
        """Promote a version that is good, damaged or missing."""
        model_stores.promote(self.store, number)
        self.wanted = number
        if seen:
            self.check()

    @rule(content=st.sampled_from([b"", b"0", b"-1", b"../2", b"1 2", b"\xff", b"9" * 300]), seen=st.booleans())
    def write_garbage(self, content: bytes, seen: bool) -> None:
        """Write a CURRENT that names no version."""
        (self.store / NAME / "CURRENT").write_bytes(content)
        self.wanted = None
        if seen:
            self.check()

    @rule(seconds=st.sampled_from([1.0, RESIDENCE_SECONDS, REJECTED_SECONDS]))
    def pass_time(self, seconds: float) -> None:
        """Let the clock advance."""
        self.clock += seconds

    @rule()
    def check(self) -> None:
        """Run the check of the watcher once."""
        loaded = self._loaded()
        self._run(self.registry.refresh())
        self._note_check(self.wanted in loaded)

    def _note_check(self, was_loaded: bool) -> None:
        """Compute what a check must have done."""
        if self.wanted is None:
            self.rejected = None, self.clock
        elif self.wanted == self.serving:
            self.rejected = None
        elif self.rejected is not None and self.rejected[0] == self.wanted and self.clock < self.rejected[1]:
            return
        elif was_loaded or self.wanted in self.good:
            self.serving = self.wanted
            self.stays_until.pop(self.wanted, None)
            self.rejected = None
        else:
            self.rejected = self.wanted, self.clock + REJECTED_SECONDS

    @rule(number=NUMBERS)
    def request(self, number: int) -> None:
        """Request a version by its number."""
        loaded = self._loaded()
        reply = self._run(raw(self.client, IMAGE, f"?model={NAME}@{number}"))
        self._compare(number, reply, loaded)

    def _compare(self, number: int, reply: Any, loaded: set[int]) -> None:
        """Compare a reply with the only one that is right."""
        if number == self.serving or number in loaded:
            expected = 200
        elif number not in self.good | self.damaged:
            expected = 404
        elif self.clock < self.not_read_until.get(number, 0) or self._is_full():
            expected = 503
        elif number in self.good:
            expected = 200
            self.stays_until[number] = self.clock + RESIDENCE_SECONDS
        else:
            expected = 503
            self.not_read_until[number] = self.clock + REJECTED_SECONDS
        assert reply.status_code == expected, reply.text
        if expected == 200:
            assert (reply.json()["model"], reply.json()["version"]) == (NAME, number)

    def _is_full(self) -> bool:
        return sum(self.clock < end for end in self.stays_until.values()) >= MAX_EXTRA

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=4))
    def request_during_check(self, numbers: list[int]) -> None:
        """Request versions while the watcher checks: each reply names its version, or reports an error."""
        before, loaded = self.serving, self._loaded()

        async def send() -> list[Any]:
            requests = [raw(self.client, IMAGE, f"?model={NAME}@{number}") for number in numbers]
            return await asyncio.gather(raw(self.client, IMAGE), *requests, self.registry.refresh())

        unnamed, *replies, _ = self._run(send())
        # A request may evict the version before the check takes it, and a load may be shared with the check.
        self._note_check(self.wanted in loaded and self.wanted in self._loaded() | {self._current()})
        for number, reply in zip(numbers, replies, strict=True):
            assert reply.status_code in (200, 404, 503), reply.text
            if reply.status_code == 200:
                assert reply.json()["version"] == number
            elif number in self.damaged and reply.status_code == 503:
                self.not_read_until.setdefault(number, self.clock + REJECTED_SECONDS)
        assert unnamed.json()["version"] in (before, self.serving)
        for number in self._loaded() - loaded - {before}:  # the replaced version may be evicted at once
            self.stays_until[number] = self.clock + RESIDENCE_SECONDS

    @rule(number=NUMBERS)
    def hold(self, number: int) -> None:
        """Select a version as a batch request does, and use it for longer than it is loaded."""
        if number == self.serving or number in self._loaded():
            self.held.append(self._run(self.registry.select(f"{NAME}@{number}")))
            assert self.held[-1].manifest.version == number

    @precondition(lambda self: self.held)
    @rule(draw=st.booleans())
    def score_held(self, draw: bool) -> None:
        """Score an image with a version that may have been retired."""
        found = self._run(self.held[0].score_many(bytearray(784), draw=draw))
        assert np.isfinite(found.mse).all()

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        """Finish the oldest batch request."""
        del self.held[0]

    def _current(self) -> int | None:
        version = self.registry.current(NAME)
        return version and version.manifest.version

    @invariant()
    def last_promoted_version_serves(self) -> None:
        """The last valid version that was promoted and seen serves, and a rejected version has a reason."""
        assert self._current() == self.serving
        reply = self._run(raw(self.client, IMAGE))
        assert (reply.status_code, reply.json()["version"]) == (200, self.serving), reply.text
        reason = self.registry.rejection(NAME)
        assert (reason is not None) == (self.rejected is not None), reason
        if self.rejected is not None:
            assert reason.startswith(NAME if self.rejected[0] is None else f"{NAME}@{self.rejected[0]}: "), reason

    @invariant()
    def versions_are_bounded(self) -> None:
        """No more versions are loaded than may be, and each stays for its minimum time."""
        versions = self.registry.extras.versions()
        self.seen.update([*versions, self.registry.current(NAME)])
        loaded = self._loaded()
        assert len(versions) == len(loaded) <= MAX_EXTRA
        for number, end in self.stays_until.items():
            assert number in loaded or end <= self.clock

    @rule()
    def retire(self) -> None:
        """Wait until all versions that neither the registry nor a batch request uses have been freed."""

        async def freed() -> None:
            await until(lambda: set(self.seen) <= self._used(), describe=lambda: str(self._unused()))

        self._run(freed())

    def _used(self) -> set[ModelVersion]:
        return {*self.registry.extras.versions(), self.registry.current(NAME), *self.held}

    def _unused(self) -> list[int]:
        return [version.manifest.version for version in set(self.seen) - self._used()]

    def teardown(self) -> None:
        """Check that retired versions are freed, then that all versions are."""
        try:
            self.held.clear()
            self.retire()
            self._run(self.stack.aclose())
        finally:
            gc.enable()
            logging.disable(logging.NOTSET)
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            shutil.rmtree(self.folder)


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(
    max_examples=10,
    stateful_step_count=30,
    deadline=None,
    phases=set(Phase) - {Phase.shrink, Phase.explain},  # they take minutes, and the case is short
)
