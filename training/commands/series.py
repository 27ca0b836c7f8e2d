"""The command `all`: make one version for each label and seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.inference.device import choose_device
from app.models.repository import Repository
from training.commands.console import console, exit_on_error, progress_bars
from training.commands.options import (
    DATA_DIR_VARIABLE,
    MODEL_STORE,
    Device,
    Epochs,
    ModelStore,
    RecipeName,
    find_recipe,
    folder_for,
    parse_labels,
    parse_seeds,
)
from training.data.dataset import DataError
from training.data.loaders import LOADERS, is_png_folder, load
from training.pipeline.reference import model_name
from training.pipeline.summary import summary_table
from training.publishing.files import check_writable
from training.publishing.publish import promote

# SciPy, scikit-learn and matplotlib take seconds to import, and other commands do not need them.
if TYPE_CHECKING:
    from training.pipeline.make import TrainingJob


def train_all(
    context: typer.Context,
    *,
    recipe: RecipeName = "deep",
    normal: Annotated[str, typer.Option(help="Labels, separated by commas, or `all`: one model for each.")] = "all",
    seeds: Annotated[str, typer.Option(help="Random seeds, separated by commas.")] = "0",
    data: Annotated[
        str, typer.Option(help=f"Data set: {', '.join(name for name in LOADERS if name != 'folder')}.")
    ] = "mnist",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the IDX files of the data set.", envvar=DATA_DIR_VARIABLE)
    ] = None,
    alpha: Annotated[float, typer.Option(help="False-positive rate of the thresholds.")] = 0.01,
    epochs: Epochs = None,
    device: Device = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Number of processes, of one thread each.")] = 2,
    results: Annotated[
        Path, typer.Option(help="Folder of the result files; a job with a result file is skipped.")
    ] = Path("results"),
    publish: Annotated[
        bool,
        typer.Option(
            "--publish",
            help="Publish every version, also if only its result file exists, and promote that of the lowest seed.",
        ),
    ] = False,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Train one model for each label and seed, and print a table of the metrics.

    After Ctrl-C, the same command resumes: jobs with a result file are skipped.

    Example: `anomaly all --recipe deep --seeds 0,1,2 --jobs 2 --data-dir ../mnist`
    """
    with exit_on_error():
        from training.pipeline import series
        from training.pipeline.make import TrainingJob

        data_dir = folder_for(data, data_dir, context)
        if data == "folder" or (data_dir is not None and is_png_folder(data_dir)):
            raise DataError("`all` needs labels, and PNGs have none; use: anomaly train --data-dir FOLDER")
        chosen, torch_device, dataset = (
            find_recipe(recipe).with_epochs(epochs),
            choose_device(device),
            load(data, data_dir),
        )
        console.print(f"data: {dataset.name}, {len(dataset.labels):,} images from: {dataset.source}")
        all_jobs = [
            TrainingJob(model_name(dataset, (label,), recipe), chosen, (label,), seed, alpha, None, torch_device)
            for seed in parse_seeds(seeds)
            for label in parse_labels(normal, dataset)
        ]
        names = sorted({job.name for job in all_jobs}) if publish else []
        check_writable(results, *(model_store / name for name in names))
        repository, sha256 = Repository(model_store), dataset.sha256

        def needs_version(job: TrainingJob) -> bool:
            return publish and _published(job, repository, sha256) is None

        finished = []
        with progress_bars() as bars:
            total = bars.add_task("all", total=len(all_jobs))
            tasks = {_title(job): bars.add_task(_title(job), visible=False) for job in all_jobs}

            def on_epoch(job: TrainingJob, epoch: int) -> None:
                bars.update(tasks[_title(job)], completed=epoch, total=chosen.parameters.get("epochs"), visible=True)

            source = series.Source(data, data_dir, model_store)
            for job, result, version in series.run(
                all_jobs,
                dataset,
                source,
                results,
                processes=jobs,
                on_epoch=on_epoch,
                needs_version=needs_version,
            ):
                finished.append(result)
                bars.update(tasks[_title(job)], visible=False)
                bars.advance(total)
                skipped = "" if version else " (from its result file)"
                bars.console.print(f"{_title(job)}: AUROC {result['auroc']:.4f}{skipped}")
                # The current version must not depend on the order in which the processes finish.
                becomes_current = job.seed == min(parse_seeds(seeds))
                if version and publish:
                    manifest = version.publish(model_store, promote=becomes_current)
                    state = " (current)" if becomes_current else ""
                    bars.console.print(f"published {manifest.name}@{manifest.version}{state}")
                elif publish and becomes_current:
                    number, current = _published(job, repository, sha256), repository.current(job.name)
                    assert number is not None
                    if current is None:  # an earlier run has ended between publication and promotion
                        promote(model_store, job.name, number)
                        bars.console.print(f"promoted {job.name}@{number}")
                    elif current != number:  # the same, or the operator has chosen another version since
                        bars.console.print(
                            f"{job.name}@{current} is current, not {job.name}@{number}; to change that: "
                            f"anomaly promote {job.name} {number} --model-store {model_store}"
                        )
        console.print(summary_table(finished, dataset.label_names))


def _published(job: TrainingJob, repository: Repository, data_sha256: str) -> int | None:
    """Return the number of the version that a job has made; None if there is none."""
    manifests = (repository.manifest(job.name, version) for version in repository.versions(job.name))
    return next((manifest.version for manifest in manifests if job.matches(manifest, data_sha256)), None)


def _title(job: TrainingJob) -> str:
    return f"{job.name} seed {job.seed}"
