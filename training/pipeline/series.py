"""Make one version of every label and seed, in parallel, and keep the figures of each in a file of its own.

Knows: processes, result files. Does not know: the command line, how a version is made. A result that is there is not
made again; a file is written whole or not at all, so that an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch

from training.data.dataset import Dataset
from training.data.loaders import load
from training.pipeline.make import Made, Order, make
from training.pipeline.reference import reference
from training.publishing.publish import naming
from training.recipes.article import TrainingError

Row = dict[str, Any]
Watch = Callable[[Order, int], None]
"""Is told the order and the number of each finished epoch."""


@dataclass(frozen=True)
class Source:
    """Where every process of a series gets the images, and the article's models to show beside its own."""

    data: str
    data_dir: Path | None
    model_store: Path


def path_of(order: Order, data_sha256: str, folder: Path) -> Path:
    """Name the result file of an order: whatever decides its figures is in its name, or in the digest at its end."""
    decisive = {
        "parameters": dict(order.recipe.parameters),
        "split": order.recipe.split,
        "alpha": order.alpha,
        "confidence": order.confidence,
        "data": data_sha256,
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:10]
    normal = "-".join(str(label) for label in order.normal)
    return folder / f"{order.recipe.name}-{normal}-seed{order.seed}-{digest}.json"


def run(
    orders: Sequence[Order],
    dataset: Dataset,
    source: Source,
    folder: Path,
    *,
    jobs: int,
    watch: Watch,
    again: Callable[[Order], bool] = lambda _: False,
) -> Iterator[tuple[Order, Row, Made | None]]:
    """Yield each order with its figures, those first that are there already (and then without a version).

    Args:
        orders: what is wanted.
        dataset: the images, to know the results of other images from these.
        source: how the processes load the same images.
        folder: of the result files; made if it is not there.
        jobs: processes, with one thread each.
        watch: is told each epoch, from a process's first to its last.
        again: whether an order is to be made although its figures are there, because its version is wanted.

    Raises:
        TrainingError: a version diverged, a process died, or a result that is there is damaged.
        OSError: a result cannot be written; it names the path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = dataset.sha256
    missing = []
    for order in orders:
        path = path_of(order, sha256, folder)
        if path.is_file() and not again(order):
            yield order, _read(path), None
        else:
            missing.append(order)
    if missing:
        for order, row, made in _in_parallel(missing, source, jobs, watch):
            _write(path_of(order, sha256, folder), row)
            yield order, row, made


def figures(made: Made, seconds: float) -> Row:
    """Return what a result file keeps of a version."""
    draft = made.draft
    return {
        "recipe": draft.recipe.name,
        "parameters": draft.recipe.parameters,
        "seed": draft.recipe.seed,
        "normal": list(draft.data.normal),
        "data": draft.data.name,
        "test": draft.metrics["test"],
        "auroc": draft.metrics["auroc"],
        "labels": draft.metrics["labels"],
        "operating_points": draft.metrics["operating_points"],
        "probes": draft.metrics["probes"],
        "model_bytes": len(made.files["model.pt"]),
        "seconds": round(seconds, 1),
        "code_version": draft.code_version,
        "torch_version": draft.torch_version,
    }


def _in_parallel(
    orders: Sequence[Order], source: Source, jobs: int, watch: Watch
) -> Iterator[tuple[Order, Row, Made | None]]:
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    epochs: Queue[tuple[int, int]] = context.Queue()
    with ProcessPoolExecutor(min(jobs, len(orders)), context, _begin, (source, epochs)) as pool:
        futures: dict[Future[tuple[Row, Made]], Order] = {}
        try:
            with _deaf():
                futures.update({pool.submit(_make, at, order): order for at, order in enumerate(orders)})
            waiting = set(futures)
            while waiting:
                done = {future for future in waiting if future.done()}
                while not epochs.empty():
                    at, epoch = epochs.get()
                    watch(orders[at], epoch)
                for future in done:
                    row, made = future.result()
                    yield futures[future], row, made
                waiting -= done
                if waiting and not done:
                    time.sleep(0.1)
        except BrokenProcessPool as error:
            raise TrainingError("a process of the series died; the same command goes on where it stopped") from error
        finally:
            # Without this, leaving the block would wait for what nobody wants any more.
            pool.shutdown(wait=False, cancel_futures=True)
            if any(not future.done() for future in futures):
                for child in multiprocessing.active_children():
                    child.terminate()


@contextmanager
def _deaf() -> Iterator[None]:
    """Let no process that is started meanwhile hear Ctrl-C, not even while it imports: its parent does, and ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_at_work: tuple[Dataset, Path, Queue[tuple[int, int]]] | None = None


def _begin(source: Source, epochs: Queue[tuple[int, int]]) -> None:
    global _at_work  # noqa: PLW0603 - a process loads the images once, for all its tasks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _at_work = load(source.data, source.data_dir), source.model_store, epochs


def _end_with_parent() -> None:
    # Without this, a process whose parent was killed would work on for nobody, and then wait for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make(at: int, order: Order) -> tuple[Row, Made]:
    assert _at_work is not None
    dataset, model_store, epochs = _at_work
    beside = reference(model_store, dataset, order.normal, order.name)
    begun = time.perf_counter()
    made = make(order, dataset, progress=lambda epoch, _: epochs.put((at, epoch)), reference=beside)
    return figures(made, time.perf_counter() - begun), made


def _read(path: Path) -> Row:
    try:
        row: Row = json.loads(path.read_bytes())
    except ValueError as error:
        raise TrainingError(f"{path} is damaged: remove it, and the same command makes it anew") from error
    return row


def _write(path: Path, row: Row) -> None:
    draft = path.with_suffix(".new")
    with naming(draft):
        draft.write_text(json.dumps(row, indent=1) + "\n")
        draft.replace(path)
