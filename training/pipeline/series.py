"""A series of training jobs in parallel processes, with a result file for each job.

A job with a result file is skipped, and files are written atomically, so that an interrupted series can be resumed.
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
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch

from training.data.dataset import Dataset
from training.data.loaders import load
from training.pipeline.make import DraftVersion, TrainingJob, make_version
from training.pipeline.reference import open_reference
from training.publishing.files import errors_with_path
from training.recipes.contract import TrainingError

Result = dict[str, Any]
"""Content of a result file."""
OnEpoch = Callable[[TrainingJob, int], None]
"""Callback for each finished epoch: the job, and the number of the epoch."""
_POLL_S = 0.1
"""Interval in seconds in which the epochs of the processes are reported."""


@dataclass(frozen=True)
class Source:
    """The sources of images and of reference models for the processes of a series.

    Attributes:
        data: key in `training.data.loaders.LOADERS`.
        data_dir: folder of the data set, or None.
        model_store: model store with the article's models.
    """

    data: str
    data_dir: Path | None
    model_store: Path


def result_path(job: TrainingJob, data_sha256: str, folder: Path) -> Path:
    """Return the path of a job's result file; the name contains a digest of everything that affects the result."""
    relevant = {
        "parameters": dict(job.recipe.parameters),
        "split": job.recipe.split,
        "alpha": job.alpha,
        "confidence": job.confidence,
        "data": data_sha256,
    }
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:10]
    normal = "-".join(str(label) for label in job.normal)
    return folder / f"{job.recipe.name}-{normal}-seed{job.seed}-{digest}.json"


def run(
    jobs: Sequence[TrainingJob],
    dataset: Dataset,
    source: Source,
    folder: Path,
    *,
    processes: int,
    on_epoch: OnEpoch,
    needs_version: Callable[[TrainingJob], bool] = lambda _: False,
) -> Iterator[tuple[TrainingJob, Result, DraftVersion | None]]:
    """Yield each job with its result and version; jobs with a result file come first and without a version.

    Args:
        jobs: jobs of the series.
        dataset: images, for the digest of the result files.
        source: source of the same images for the processes.
        folder: folder of the result files; created if it is missing.
        processes: number of processes, of one thread each.
        on_epoch: callback for each epoch.
        needs_version: whether to run a job despite its result file, because its version is missing.

    Raises:
        TrainingError: training diverged, a process died, or a result file is damaged.
        OSError: a result file cannot be written; the error contains the path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = dataset.sha256
    remaining = []
    for job in jobs:
        path = result_path(job, sha256, folder)
        if path.is_file() and not needs_version(job):
            yield job, _read(path), None
        else:
            remaining.append(job)
    if remaining:
        for job, result, version in _run_parallel(remaining, source, processes, on_epoch):
            _write(result_path(job, sha256, folder), result)
            yield job, result, version


def result_of(version: DraftVersion, seconds: float) -> Result:
    """Return the content of a result file.

    Args:
        version: version of the job.
        seconds: duration of the job.
    """
    manifest = version.manifest
    return {
        "recipe": manifest.recipe.name,
        "parameters": manifest.recipe.parameters,
        "seed": manifest.recipe.seed,
        "normal": list(manifest.data.normal),
        "data": manifest.data.name,
        "test": manifest.metrics["test"],
        "auroc": manifest.metrics["auroc"],
        "labels": manifest.metrics["labels"],
        "operating_points": manifest.metrics["operating_points"],
        "probes": manifest.metrics["probes"],
        "model_bytes": len(version.files["model.pt"]),
        "seconds": round(seconds, 1),
        "code_version": manifest.code_version,
        "torch_version": manifest.torch_version,
    }


def _run_parallel(
    jobs: Sequence[TrainingJob], source: Source, processes: int, on_epoch: OnEpoch
) -> Iterator[tuple[TrainingJob, Result, DraftVersion]]:
    # Torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    epochs: Queue[tuple[int, int]] = context.Queue()
    with ProcessPoolExecutor(min(processes, len(jobs)), context, _init_worker, (source, epochs)) as pool:
        futures: dict[Future[tuple[Result, DraftVersion]], TrainingJob] = {}
        try:
            with _interrupts_blocked():
                futures.update({pool.submit(_run_job, index, job): job for index, job in enumerate(jobs)})
            pending = set(futures)
            while pending:
                done, pending = wait(pending, _POLL_S, FIRST_COMPLETED)
                while not epochs.empty():
                    index, epoch = epochs.get()
                    on_epoch(jobs[index], epoch)
                for future in done:
                    result, version = future.result()
                    yield futures[future], result, version
        except BrokenProcessPool as error:
            raise TrainingError("a process of the series died; run the same command again to resume") from error
        finally:
            # The end of the `with` block would wait for the running jobs.
            pool.shutdown(wait=False, cancel_futures=True)
            if any(not future.done() for future in futures):
                for child in multiprocessing.active_children():
                    child.terminate()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT for processes that are started in this block; their parent handles Ctrl-C and terminates them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_state: tuple[Dataset, Path, Queue[tuple[int, int]]] | None = None


def _init_worker(source: Source, epochs: Queue[tuple[int, int]]) -> None:
    global _worker_state  # noqa: PLW0603 - the images are loaded once per process, not once per job
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker_state = load(source.data, source.data_dir), source.model_store, epochs


def _exit_with_parent() -> None:
    # If the parent is killed, it cannot terminate its processes.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_job(index: int, job: TrainingJob) -> tuple[Result, DraftVersion]:
    assert _worker_state is not None
    dataset, model_store, epochs = _worker_state
    reference = open_reference(model_store, dataset, job.normal, job.name)
    start = time.perf_counter()
    version = make_version(job, dataset, progress=lambda epoch, _: epochs.put((index, epoch)), reference=reference)
    return result_of(version, time.perf_counter() - start), version


def _read(path: Path) -> Result:
    try:
        result: Result = json.loads(path.read_bytes())
    except ValueError as error:
        raise TrainingError(f"{path} is damaged; delete it, and run the same command again") from error
    return result


def _write(path: Path, result: Result) -> None:
    draft = path.with_suffix(".new")
    with errors_with_path(draft):
        draft.write_text(json.dumps(result, indent=1) + "\n")
        draft.replace(path)
