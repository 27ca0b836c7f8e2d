"""Runs a bulk job on a Ray cluster. Ray Data divides the work, retries what fails, and commits each file of rows once.

The rows that are done are in a checkpoint of Ray next to the output. The checkpoint is not inside the output: Ray would
take its files for rows when it cleans up after a killed run.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.exceptions import RayError

from anomaly.bulk.inputs import UNIT_IMAGES, Listing, Unit
from anomaly.bulk.locations import BulkError, Location
from anomaly.bulk.outputs import ROWS_PER_FILE
from anomaly.bulk.readers import Reader
from anomaly.bulk.rows import BLOCK, INPUT, PIXELS
from anomaly.bulk.scorer import BlockScorer, Job

_BLOCK_BYTES = 8 * 1024 * 1024
"""Maximum size of a block. The default of Ray, 128 MiB, needs an object store of several GiB."""
_SMALL_TASK = 0.25
"""Cores that reading and writing are worth: both mostly wait for the file system."""
_CHECKOUT = Path(__file__).resolve().parent.parent.parent


class _Units(Datasource):  # type: ignore[misc]
    """The units of an input, one read task each."""

    def __init__(self, units: Sequence[Unit], reader: Reader) -> None:
        super().__init__()
        self._units = units
        self._reader = reader

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: files are not opened to find out."""
        return None

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[Any]:  # noqa: ARG002
        """Return one task per unit; the number of units does not depend on `parallelism`."""
        size = UNIT_IMAGES * PIXELS
        return [
            ReadTask(
                functools.partial(self._reader.blocks, unit),
                BlockMetadata(num_rows=None, size_bytes=size, exec_stats=None, input_files=None),
                schema=INPUT,
            )
            for unit in self._units
        ]


class _Actor:
    """A `BlockScorer` in an actor of Ray; it loads the model version once.

    Args:
        jobs: one reference to the job, which is in the object store once for all actors.
    """

    def __init__(self, jobs: list[Any]) -> None:
        self._score = BlockScorer(ray.get(jobs[0]))

    def __call__(self, table: Any) -> Any:
        return self._score(table)


def run(
    job: Job, listing: Listing, reader: Reader, output: Location, *, address: str, workers: int | None = None
) -> None:
    """Score all images that have no row yet.

    Args:
        job: input and version.
        listing, reader: of the input. Every node must be able to read it.
        output: folder of the rows. Every node must be able to write it.
        address: `local` to start Ray here, or the address of a cluster.
        workers: maximum number of actors. Default: one per core or GPU of the cluster.

    Raises:
        BulkError: the cluster cannot be reached, or the run failed. The next run continues.
    """
    _connect(address)
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if job.device != "cpu" else 0
        most = workers or max(1, gpus or int(resources.get("CPU", 1)))
        context = DataContext.get_current()
        context.target_max_block_size = _BLOCK_BYTES
        context.enable_progress_bars = sys.stderr.isatty()
        context.checkpoint_config = CheckpointConfig(
            id_column="id",
            checkpoint_path=f"{output.path}.checkpoint/{job.digest}",
            delete_checkpoint_on_success=False,  # a further run must find nothing to do
            override_filesystem=output.files,
        )
        images = ray.data.read_datasource(_Units(list(listing.units()), reader), num_cpus=_SMALL_TASK)
        rows = images.map_batches(
            _Actor,
            fn_constructor_args=([ray.put(job)],),
            batch_format="pyarrow",
            batch_size=BLOCK,
            zero_copy_batch=True,
            compute=ActorPoolStrategy(min_size=1, max_size=most),
            **({"num_gpus": 1} if gpus else {"num_cpus": 1}),
        )
        rows.write_parquet(
            output.path,
            filesystem=output.files,
            min_rows_per_file=ROWS_PER_FILE,
            ray_remote_args={"num_cpus": _SMALL_TASK},
            compression="zstd",
            write_page_checksum=True,
        )
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, BulkError):
            raise cause from error
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise BulkError(f"the run on Ray failed: {first}; run the command again to go on") from error
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    """Start or join a cluster. Its workers get the code of this checkout."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    options: dict[str, Any] = {"num_cpus": (os.cpu_count() or 1) + 2} if address == "local" else {}
    modules = [str(_CHECKOUT / "anomaly"), str(_CHECKOUT / "app")]
    try:
        ray.init(address, runtime_env={"py_modules": modules}, log_to_driver=False, logging_level="warning", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BulkError(f"the Ray cluster {address} cannot be reached: {error}") from error
