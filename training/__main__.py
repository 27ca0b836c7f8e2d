"""The command line of training and of the model store: `python -m training`.

Knows: options, words for a person, exit codes. Does not know: how anything is done.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.calibration import CalibrationError
from app.detector import Detector, DeviceError, choose_device
from app.manifest import Manifest
from app.repository import MODEL_NAME, Repository, RepositoryError
from training import publish
from training.data import LOADERS, load
from training.datasets import DataError, Dataset
from training.export import ExportError
from training.publish import PublishError
from training.recipes import RECIPES, Recipe
from training.train import TrainingError
from training.version import Made, Order, make

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_EXPECTED = (CalibrationError, DataError, DeviceError, ExportError, PublishError, RepositoryError, TrainingError)

app = typer.Typer(
    help="Train autoencoders, and keep the model store that the service answers from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
problems = Console(stderr=True, highlight=False, soft_wrap=True)

ModelStore = Annotated[Path, typer.Option(help="The folder of model versions.", envvar="MODEL_STORE")]
Name = Annotated[str, typer.Argument(help="The model, as in `zero-article`.")]
MODEL_STORE = Path("model_store")


@app.command()
def train(
    *,
    recipe: Annotated[str, typer.Option(help=f"How to make it: {', '.join(RECIPES)}.")] = "article",
    normal: Annotated[str, typer.Option(help="The normal class: a label, several (`3,5`), or `all`.")] = "0",
    name: Annotated[str | None, typer.Option(help="Name in the model store; else made up: `zero-article`.")] = None,
    data: Annotated[str, typer.Option(help=f"Data set: {', '.join(LOADERS)}.")] = "mnist",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder that holds it. For mnist also the environment's DATA_DIR; else OpenML.")
    ] = None,
    anomalies_dir: Annotated[
        Path | None, typer.Option(help="For `--data folder`: a folder of anomalous PNGs, for the evaluation only.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Wanted false-alarm rate of the threshold.")] = 0.01,
    confidence: Annotated[
        float | None, typer.Option(help="Keep the false-alarm rate below alpha with this probability, not on average.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Another number of epochs than the recipe's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: auto, cpu, cuda, cuda:n.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; scores repeat exactly for the same number.")] = 1,
    promote: Annotated[bool, typer.Option("--promote", help="Let the new version answer at once.")] = False,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Learn a normal class, export, calibrate, test, and publish the next version of a model.

    The version is written whole or not at all, and answers only with `--promote` or after the command `promote`.

    Example: `python -m training train --recipe article --normal 0 --data-dir ../mnist --promote`
    """
    with _plain_errors():
        torch.set_num_threads(threads)
        chosen = _recipe(recipe).with_epochs(epochs)
        on = choose_device(device)
        dataset = load(data, data_dir, anomalies_dir)
        labels = _labels(normal, dataset)
        console.print(f"data: {dataset.name}, {len(dataset.labels):,} images from: {dataset.source}")
        model = publish.check_name(name or _model_name(dataset, labels, recipe))
        order = Order(model, chosen, labels, seed, alpha, confidence, on)
        made = _make_with_bar(order, dataset, _reference(model_store, _model_name(dataset, labels, "article"), model))
        manifest = made.publish(model_store, promote=promote)
        _tell(manifest, promote)


@app.command()
def promote(name: Name, version: int, model_store: ModelStore = MODEL_STORE) -> None:
    """Let a version answer, after checking it as the service would."""
    with _plain_errors():
        publish.promote(model_store, name, version)
        console.print(f"{name}: version {version} is current")


@app.command()
def rollback(
    name: Name,
    to: Annotated[int | None, typer.Option(help="An older version; else the highest below the current one.")] = None,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Let an older version answer again. Nothing is deleted."""
    with _plain_errors():
        version = publish.rollback(model_store, name, to)
        console.print(f"{name}: version {version} is current")


@app.command("list")
def list_versions(model_store: ModelStore = MODEL_STORE) -> None:
    """List every version of every model; the current ones are marked."""
    with _plain_errors():
        repository = Repository(model_store)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("model", "version", "current", "normal class", "recipe", "AUROC", "alpha", "threshold", "made"):
            table.add_column(
                column, justify="right" if column in {"version", "AUROC", "alpha", "threshold"} else "left"
            )
        for name in _models(repository):
            current = repository.current(name)
            for version in repository.versions(name):
                table.add_row(*_row(repository.manifest(name, version), version == current))
        console.print(table if table.row_count else f"no versions in {model_store}")


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="One model; else all.")] = None,
    version: Annotated[int | None, typer.Argument(help="One version; else all.")] = None,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Open versions as the service does: every checksum, and the golden scores on the CPU. Exit code 2 if one fails."""
    with _plain_errors():
        repository = Repository(model_store)
        names = [name] if name else _models(repository)
        wanted = [(each, number) for each in names for number in ([version] if version else repository.versions(each))]
        if not wanted:
            raise PublishError(f"no versions{f' of {name}' if name else ''} in {model_store}")
        failed = 0
        for each, number in wanted:
            try:
                publish.verify(model_store, each, number)
                console.print(f"{each}@{number}: good")
            except PublishError as error:
                failed += 1
                problems.print(str(error), style="red")
        if failed:
            raise typer.Exit(2)


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except _EXPECTED as error:
        problems.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        problems.print("interrupted: nothing half-written is left behind")
        raise typer.Exit(130) from error


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise DataError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def _labels(text: str, dataset: Dataset) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(len(dataset.label_names)))
    try:
        labels = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise DataError(f"--normal takes a label, several with commas between, or all; not {text!r}") from error
    dataset.describe(labels)
    return labels


def _model_name(dataset: Dataset, labels: tuple[int, ...], recipe: str) -> str:
    if dataset.noun == "digit" and len(labels) == 1:
        return f"{_WORDS[labels[0]]}-{recipe}"
    classes = "all" if len(labels) == len(dataset.label_names) else "-".join(str(label) for label in labels)
    return f"{dataset.name}-{classes}-{recipe}"


def _reference(model_store: Path, article: str, model: str) -> Detector | None:
    # The article's model of the same class, if it has been published.
    repository = Repository(model_store)
    version = repository.current(article) if article != model and article in _models(repository) else None
    if version is None:
        return None
    console.print(f"the report shows {article}@{version} beside it")
    return Detector.open(repository.open(article, version).model, torch.device("cpu"))


def _make_with_bar(order: Order, dataset: Dataset, reference: Detector | None) -> Made:
    columns = (TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    epochs = order.recipe.parameters.get("epochs")
    with Progress(*columns, console=console, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=epochs, visible=epochs is not None)

        def advance(epoch: int, loss: float) -> None:
            bar.console.print(f"epoch {epoch:>3}  loss {loss:.6f}")
            bar.advance(task)

        return make(order, dataset, progress=advance, say=bar.console.print, reference=reference)


def _tell(manifest: Manifest, promoted: bool) -> None:
    for words, metrics in {manifest.metrics["test"]: manifest.metrics, **manifest.metrics["also"]}.items():
        auroc = "no anomalies to rank" if metrics["auroc"] is None else f"AUROC {metrics['auroc']:.4f}"
        console.print(f"{auroc} on {words}")
    for point in manifest.metrics["operating_points"]:
        console.print(
            f"alpha {point['alpha']:g}: threshold {point['threshold']:.6g}, "
            f"false alarms {_rate(point['false_alarms']['rate'])}, detections {_rate(point['detections']['rate'])}"
        )
    state = (
        "current" if promoted else f"not answering yet: python -m training promote {manifest.name} {manifest.version}"
    )
    console.print(f"published {manifest.name}@{manifest.version} ({state})")


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f} %"


def _models(repository: Repository) -> list[str]:
    if not repository.root.is_dir():
        return []
    names = sorted(path.name for path in repository.root.iterdir() if MODEL_NAME.fullmatch(path.name))
    return [name for name in names if repository.versions(name)]


def _row(manifest: Manifest, is_current: bool) -> tuple[str, ...]:
    auroc = manifest.metrics.get("auroc")
    return (
        manifest.name,
        str(manifest.version),
        "◂ current" if is_current else "",
        manifest.normal_class,
        manifest.recipe.name,
        "-" if auroc is None else f"{auroc:.4f}",
        f"{manifest.alpha:g}",
        f"{manifest.threshold:.6g}",
        f"{manifest.created_at:%Y-%m-%d %H:%M}",
    )


if __name__ == "__main__":
    app(prog_name="python -m training")
