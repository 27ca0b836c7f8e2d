"""The command `train`: make one version and publish it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from app.inference.detector import Detector
from app.inference.device import choose_device
from training.commands.console import (
    console,
    exit_on_error,
    print_copies,
    print_guard_counts,
    print_ignored,
    print_metrics,
    print_published,
    progress_bars,
)
from training.commands.options import (
    DATA_DIR_VARIABLE,
    MAX_SEED,
    MAX_THREADS,
    MODEL_STORE,
    Device,
    Epochs,
    ModelStore,
    Promote,
    RecipeName,
    find_recipe,
    folder_for,
    parse_labels,
)
from training.data.dataset import DataError, Dataset
from training.data.loaders import LOADERS, infer_dataset, load
from training.pipeline.reference import model_name, open_reference, reference_version
from training.publishing import publish
from training.publishing.files import check_writable

# SciPy, scikit-learn and matplotlib take seconds to import, and other commands do not need them.
if TYPE_CHECKING:
    from training.pipeline.make import DraftVersion, TrainingJob


def train(
    context: typer.Context,
    *,
    recipe: RecipeName = "deep",
    normal: Annotated[
        str, typer.Option(help="Normal class: a label, labels separated by commas (`3,5`), or `all`.")
    ] = "0",
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model. Default: from data and recipe (`zero-deep`). Needed for PNGs."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help=f"Data set: {', '.join(LOADERS)}. Default: `folder` for a --data-dir with PNGs, else mnist."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of PNGs, or of the IDX files of the data set.", envvar=DATA_DIR_VARIABLE)
    ] = None,
    anomalies_dir: Annotated[
        Path | None, typer.Option(help="Folder of anomalous PNGs, for the evaluation only.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="False-positive rate of the threshold.")] = 0.01,
    confidence: Annotated[
        float | None,
        typer.Option(help="Probability with which the rate is at most alpha. Default: on average at most alpha."),
    ] = None,
    epochs: Epochs = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")] = 0,
    device: Device = "auto",
    threads: Annotated[
        int, typer.Option(min=1, max=MAX_THREADS, help="Number of CPU threads; another number changes the rounding.")
    ] = 1,
    promote: Promote = False,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Train a model on a normal class, and publish it as the next version.

    Training is followed by export, calibration and evaluation. The service serves the version if it is promoted, by
    `--promote` or the command `promote`.

    Example: `anomaly train --data-dir photos/normal --name mine --promote`
    """
    with exit_on_error():
        from training.pipeline.make import TrainingJob

        torch.set_num_threads(threads)
        chosen = find_recipe(recipe).with_epochs(epochs)
        torch_device = choose_device(device)
        data_dir = folder_for(data, data_dir, context)
        data = data or _infer_dataset(data_dir)
        if data in ("folder", "idx") and name is None:
            raise DataError(
                f"a folder of {'PNGs' if data == 'folder' else 'IDX files'} needs --name, the name of the model"
            )
        if data == "folder" and normal != "0":
            # Label 1 is the folder of anomalies, which is for evaluation only.
            raise DataError("all PNGs in --data-dir are normal and none in --anomalies-dir; leave --normal out")
        if data == "folder":
            print_ignored(data_dir, anomalies_dir)
        dataset = load(data, data_dir, anomalies_dir)
        labels = parse_labels(normal, dataset)
        console.print(f"data: {dataset.name}, {len(dataset.labels):,} images from: {dataset.source}")
        print_copies(dataset.copies)
        model = publish.check_name(name or model_name(dataset, labels, recipe))
        check_writable(model_store, model_store / model)
        job = TrainingJob(model, chosen, labels, seed, alpha, confidence, torch_device)
        reference = reference_version(model_store, dataset, labels, model)
        if reference:
            console.print(f"the report compares with {reference[0]}@{reference[1]}")
        version = _make(job, dataset, open_reference(model_store, dataset, labels, model))
        manifest = version.publish(model_store, promote=promote)
        print_guard_counts(manifest)
        print_metrics(manifest)
        print_published(manifest, promote)


def _infer_dataset(data_dir: Path | None) -> str:
    name = infer_dataset(data_dir)
    if name == "folder":
        console.print(f"{data_dir} contains PNGs: using --data folder")
    return name


def _make(job: TrainingJob, dataset: Dataset, reference: Detector | None) -> DraftVersion:
    from training.pipeline.make import make_version

    epochs = job.recipe.parameters.get("epochs")
    with progress_bars("{task.description}") as bars:
        task = bars.add_task("training", total=epochs, visible=epochs is not None)

        def on_epoch(epoch: int, loss: float) -> None:
            bars.update(task, advance=1, description=f"training, loss {loss:.4g}, epoch")
            # Without a terminal there is no bar: ten lines are enough for a log.
            if bars.disable and epochs and 10 * epoch // epochs > 10 * (epoch - 1) // epochs:
                bars.console.print(f"epoch {epoch} of {epochs}, loss {loss:.4g}")

        return make_version(job, dataset, progress=on_epoch, log=bars.console.print, reference=reference)
