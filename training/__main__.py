"""The command line of training and of the model store: `python -m training`.

Knows: options, words for a person, exit codes. Does not know: how anything is done.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # What follows takes seconds to import, and Ctrl-C meanwhile is no error to be traced.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.inference.detector import Detector, DetectorError
from app.inference.device import DeviceError, choose_device
from app.models.calibration import CalibrationError
from app.models.manifest import Manifest
from app.models.repository import MODEL_NAME, Repository, RepositoryError, is_version
from training.data.dataset import DataError, Dataset
from training.data.loaders import LOADERS, holds_pngs, load, read_pngs, set_in
from training.pipeline.reference import model_name, reference, reference_version
from training.pipeline.summary import summary_table
from training.publishing import publish
from training.publishing.export import ExportError
from training.publishing.publish import PublishError
from training.recipes.article import TrainingError
from training.recipes.table import RECIPES, Recipe

# What only making a model needs, statistics and plots, takes seconds to import: the commands that make one do.
if TYPE_CHECKING:
    from training.pipeline.make import Made, Order

_EXPECTED = (
    CalibrationError,
    DataError,
    DetectorError,
    DeviceError,
    ExportError,
    PublishError,
    RepositoryError,
    TrainingError,
)

app = typer.Typer(
    help="Train autoencoders, and keep the model store that the service answers from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
# Paths are printed, and what stands in their brackets is no markup.
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
console = Console(**_PLAIN, width=None if sys.stdout.isatty() else 160)
problems = Console(**_PLAIN, stderr=True)

ModelStore = Annotated[Path, typer.Option(help="The folder of model versions.", envvar="MODEL_STORE")]
Name = Annotated[str, typer.Argument(help="The model, as in `zero-article`.")]
MODEL_STORE = Path("model_store")
_LAST_SEED = 2**63 - 1
"""What torch takes."""
_MOST_THREADS = 512
"""More than processors have; where the kernel gives no more threads, torch ends with a segmentation fault."""


@app.command()
def train(
    *,
    recipe: Annotated[str, typer.Option(help=f"How to make it: {', '.join(RECIPES)}.")] = "deep",
    normal: Annotated[str, typer.Option(help="The normal class: a label, several (`3,5`), or `all`.")] = "0",
    name: Annotated[
        str | None, typer.Option(help="Name in the model store; else made up, `zero-article`, but not for PNGs.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help=f"Data set: {', '.join(LOADERS)}. Else `folder` where --data-dir holds PNGs, and mnist."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of your own PNGs, or of IDX files. For mnist also the environment's DATA_DIR."),
    ] = None,
    anomalies_dir: Annotated[
        Path | None, typer.Option(help="Beside a folder of PNGs: one of anomalous PNGs, for the evaluation only.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Wanted false-alarm rate of the threshold.")] = 0.01,
    confidence: Annotated[
        float | None, typer.Option(help="Keep the false-alarm rate below alpha with this probability, not on average.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Another number of epochs than the recipe's.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=_LAST_SEED, help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: auto, cpu, cuda, cuda:n.")] = "auto",
    threads: Annotated[
        int, typer.Option(min=1, max=_MOST_THREADS, help="CPU threads; scores repeat exactly for the same number.")
    ] = 1,
    promote: Annotated[bool, typer.Option("--promote", help="Let the new version answer at once.")] = False,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Learn a normal class, export, calibrate, test, and publish the next version of a model.

    The version is written whole or not at all, and answers only with `--promote` or after the command `promote`.

    Example: `python -m training train --data-dir photos/normal --name mine --promote`
    """
    with _plain_errors():
        from training.pipeline.make import Order

        torch.set_num_threads(threads)
        chosen = _recipe(recipe).with_epochs(epochs)
        on = choose_device(device)
        data = data or _set_in(data_dir)
        if data == "folder" and name is None:
            raise DataError("a folder of PNGs needs --name: what its model is called in the store")
        if data == "folder" and normal != "0":
            # Label 1 is the anomalies' folder, which is for the evaluation only.
            raise DataError("all PNGs of --data-dir are normal, and none of --anomalies-dir is: leave --normal out")
        dataset = load(data, data_dir, anomalies_dir)
        labels = _labels(normal, dataset)
        console.print(f"data: {dataset.name}, {len(dataset.labels):,} images from: {dataset.source}")
        _tell_copies(dataset.copies)
        model = publish.check_name(name or model_name(dataset, labels, recipe))
        publish.check_writable(model_store, model_store / model)
        order = Order(model, chosen, labels, seed, alpha, confidence, on)
        beside = reference_version(model_store, dataset, labels, model)
        if beside:
            console.print(f"the report shows {beside[0]}@{beside[1]} beside it")
        made = _make_with_bar(order, dataset, reference(model_store, dataset, labels, model))
        manifest = made.publish(model_store, promote=promote)
        _tell(manifest, promote)


@app.command("all")
def all_labels(
    *,
    recipe: Annotated[str, typer.Option(help=f"How to make them: {', '.join(RECIPES)}.")] = "deep",
    normal: Annotated[str, typer.Option(help="Labels to make models of, with commas between, or all.")] = "all",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between.")] = "0",
    data: Annotated[
        str, typer.Option(help=f"Data set: {', '.join(name for name in LOADERS if name != 'folder')}.")
    ] = "mnist",
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds it, as for `train`.")] = None,
    alpha: Annotated[float, typer.Option(help="Wanted false-alarm rate of the thresholds.")] = 0.01,
    epochs: Annotated[int | None, typer.Option(min=1, help="Another number of epochs than the recipe's.")] = None,
    device: Annotated[str, typer.Option(help="Where to train: auto, cpu, cuda, cuda:n.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Processes, with one thread each.")] = 2,
    results: Annotated[Path, typer.Option(help="Folder of the result files; what is there is not made again.")] = Path(
        "results"
    ),
    publish_too: Annotated[
        bool,
        typer.Option(
            "--publish",
            help="Publish as `zero-deep` and so on, and promote the least seed's; what the store lacks is made.",
        ),
    ] = False,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Make one model of each label and seed, and print the figures of all.

    Ctrl-C is safe: finished results are kept, and the same command goes on with the missing ones.

    Example: `python -m training all --recipe deep --seeds 0,1,2 --jobs 2 --data-dir ../mnist`
    """
    with _plain_errors():
        from training.pipeline import series
        from training.pipeline.make import Order

        if data == "folder" or (data_dir is not None and holds_pngs(data_dir)):
            raise DataError(
                "`all` makes a model of each label, and PNGs have none: python -m training train --data-dir FOLDER"
            )
        chosen, on, dataset = _recipe(recipe).with_epochs(epochs), choose_device(device), load(data, data_dir)
        console.print(f"data: {dataset.name}, {len(dataset.labels):,} images from: {dataset.source}")
        orders = [
            Order(model_name(dataset, (label,), recipe), chosen, (label,), seed, alpha, None, on)
            for seed in _seeds(seeds)
            for label in _labels(normal, dataset)
        ]
        names = sorted({order.name for order in orders}) if publish_too else []
        publish.check_writable(results, *(model_store / name for name in names))
        rows = []
        with _bars() as bars:
            total = bars.add_task("all", total=len(orders))
            shown = {_task_name(order): bars.add_task(_task_name(order), visible=False) for order in orders}

            def watch(order: Order, epoch: int) -> None:
                bars.update(
                    shown[_task_name(order)], completed=epoch, total=chosen.parameters.get("epochs"), visible=True
                )

            source, sha256 = series.Source(data, data_dir, model_store), dataset.sha256

            def lacking(order: Order) -> bool:
                return publish_too and not any(
                    order.made(manifest, sha256) for manifest in _manifests(Repository(model_store), order.name)
                )

            finished = series.run(orders, dataset, source, results, jobs=jobs, watch=watch, again=lacking)
            for order, row, made in finished:
                rows.append(row)
                bars.update(shown[_task_name(order)], visible=False)
                bars.advance(total)
                bars.console.print(f"{_task_name(order)}: AUROC {row['auroc']:.4f}{'' if made else ' (kept)'}")
                if made and publish_too:
                    # Which of several seeds answers must not depend on which process was the last.
                    answers = order.seed == min(_seeds(seeds))
                    manifest = made.publish(model_store, promote=answers)
                    state = " (current)" if answers else ""
                    bars.console.print(f"published {manifest.name}@{manifest.version}{state}")
        console.print(summary_table(rows, dataset.label_names))


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Whose model it is: `name` for the current version, or `name@version`.")],
    *,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of normal PNGs that the model has not learned from; else the version's own scores."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Wanted false-alarm rate; else the version's own.")] = None,
    confidence: Annotated[
        float | None, typer.Option(help="As for `train`; else the version's own, if it has one.")
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Let the new version answer at once.")] = False,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Choose the threshold of a model anew, without training, and publish that as its next version.

    For another camera, pen or scanner: give a folder of normal images made with it. The autoencoder stays as it is.

    Example: `python -m training calibrate mine --data-dir photos/new-camera --promote`
    """
    with _plain_errors():
        from training.pipeline.recalibrate import recalibrate

        torch.set_num_threads(1)
        repository = Repository(model_store)
        origin = _origin(repository, model)
        publish.check_writable(model_store, model_store / origin.name)
        images, copies = (None, 0) if data_dir is None else read_pngs(data_dir)
        _tell_copies(copies)
        made = recalibrate(repository, origin, images, alpha=alpha, confidence=confidence)
        manifest = made.publish(model_store, promote=promote)
        _tell_caught(manifest)
        before, summary = manifest.metrics["before"], manifest.calibration
        console.print(
            f"{summary.n:,} normal images; {_rate(before['flagged']['rate'])} of them lie above the threshold "
            f"{origin.threshold:.6g} of {origin.name}@{origin.version}"
        )
        console.print(
            f"alpha {manifest.alpha:g}: threshold {manifest.threshold:.6g}; false alarms between "
            f"{_rate(summary.band[0])} and {_rate(summary.band[1])} with probability {100 * summary.band_level:g} %"
        )
        _tell_state(manifest, promote)


@app.command("publish")
def publish_folder(
    folder: Annotated[Path, typer.Argument(help="A version of another model store, as in `elsewhere/zero/3`.")],
    *,
    promote: Annotated[bool, typer.Option("--promote", help="Let it answer at once.")] = False,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Publish a version that lies in another model store, under the next number of this one.

    Every file is compared with its manifest, and the version is opened and scored as the service does.

    Example: `python -m training publish /mnt/laptop/model_store/zero/3 --promote`
    """
    with _plain_errors():
        _tell_state(publish.publish_copy(model_store, folder, promote=promote), promote)


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
    """List every version of every model; the current ones are marked. Exit code 2 if one is damaged."""
    with _plain_errors():
        repository = Repository(model_store)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("model", "version", "current", "normal class", "recipe", "AUROC", "alpha", "threshold", "made"):
            table.add_column(
                column, justify="right" if column in {"version", "AUROC", "alpha", "threshold"} else "left"
            )
        damage: list[str] = []
        for name in _models(repository):
            for row in _rows(repository, name, damage):
                table.add_row(*row)
        console.print(table if table.row_count else f"no versions in {model_store}")
        for words in damage:
            problems.print(words, style="red")
        if damage:
            raise typer.Exit(2)


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="One model; else all.")] = None,
    version: Annotated[int | None, typer.Argument(help="One version; else all.")] = None,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Open versions as the service does: every checksum, and the golden scores on the CPU.

    Where no version is named, CURRENT must name one that is there. Exit code 2 if anything fails.
    """
    with _plain_errors():
        repository = Repository(model_store)
        names = [name] if name else _models(repository)
        wanted = [
            (each, number)
            for each in names
            for number in ([version] if version is not None else repository.versions(each))
        ]
        pointers = names if version is None else []
        if not wanted and (name or not names):
            raise PublishError(f"no versions{f' of {name}' if name else ''} in {model_store}")
        failed = 0
        for each, number in [*wanted, *((each, None) for each in pointers)]:
            try:
                if number is None:
                    publish.check_current(model_store, each)
                else:
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
        problems.print(f"error: {error}", style="red")
        raise typer.Exit(2) from error
    except OSError as error:
        words = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        problems.print(f"error: {words}", style="red")
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        problems.print("interrupted: nothing half-written is left behind")
        raise typer.Exit(130) from error


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise DataError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise DataError(f"--seeds takes whole numbers with commas between, not {text!r}") from error
    if seeds[0] < 0 or seeds[-1] > _LAST_SEED:
        raise DataError(f"a seed lies between 0 and {_LAST_SEED}; --seeds is {text}")
    return tuple(seeds)


def _task_name(order: Order) -> str:
    return f"{order.name} seed {order.seed}"


def _bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not sys.stdout.isatty())


def _labels(text: str, dataset: Dataset) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(len(dataset.label_names)))
    try:
        labels = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise DataError(f"--normal takes a label, several with commas between, or all; not {text!r}") from error
    dataset.describe(labels)
    return labels


def _set_in(data_dir: Path | None) -> str:
    found = set_in(data_dir)
    if found == "folder":
        console.print(f"{data_dir} holds PNGs: taken as --data folder")
    return found


def _origin(repository: Repository, reference: str) -> Manifest:
    name, at, version = reference.partition("@")
    number = repository.current(publish.check_name(name)) if not at else int(version) if is_version(version) else None
    if number is None:
        raise PublishError(f"there is no version {reference} in {repository.root}")
    return repository.manifest(name, number)


def _manifests(repository: Repository, name: str) -> Iterator[Manifest]:
    return (repository.manifest(name, version) for version in repository.versions(name))


def _make_with_bar(order: Order, dataset: Dataset, beside: Detector | None) -> Made:
    from training.pipeline.make import make

    columns = (TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    epochs = order.recipe.parameters.get("epochs")
    with Progress(*columns, console=console, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=epochs, visible=epochs is not None)

        def advance(epoch: int, loss: float) -> None:
            bar.console.print(f"epoch {epoch:>3}  loss {loss:.6f}")
            bar.advance(task)

        return make(order, dataset, progress=advance, say=bar.console.print, reference=beside)


def _tell(manifest: Manifest, promoted: bool) -> None:
    _tell_caught(manifest)
    for words, metrics in {manifest.metrics["test"]: manifest.metrics, **manifest.metrics["also"]}.items():
        auroc = "no anomalies to rank" if metrics["auroc"] is None else f"AUROC {metrics['auroc']:.4f}"
        console.print(f"{auroc} on {words}")
    for point in manifest.metrics["operating_points"]:
        console.print(
            f"alpha {point['alpha']:g}: threshold {point['threshold']:.6g}, "
            f"false alarms {_rate(point['false_alarms']['rate'])}, detections {_rate(point['detections']['rate'])}"
        )
    _tell_state(manifest, promoted)


def _tell_copies(copies: int) -> None:
    if copies:
        console.print(f"copies left out: {copies:,} (images with the same pixels as an earlier one)")


def _tell_caught(manifest: Manifest) -> None:
    counts = manifest.metrics.get("calibration_caught")
    if counts:
        from training.evaluation.calibrate import caught_words

        console.print(f"{caught_words(counts, manifest.calibration.n)}: they count among the false alarms")


def _tell_state(manifest: Manifest, promoted: bool) -> None:
    state = (
        "current" if promoted else f"not answering yet: python -m training promote {manifest.name} {manifest.version}"
    )
    console.print(f"published {manifest.name}@{manifest.version} ({state})")


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f} %"


def _models(repository: Repository) -> list[str]:
    if not repository.root.is_dir():
        return []
    names = {path.name for path in repository.root.iterdir() if MODEL_NAME.fullmatch(path.name)}
    return sorted({name for name in names if repository.versions(name)} | set(repository.names()))


def _rows(repository: Repository, name: str, damage: list[str]) -> Iterator[tuple[str, ...]]:
    # What is damaged has a row too, and hides no other; `damage` takes the words.
    current = None
    try:
        current = repository.current(name)
    except RepositoryError as error:
        damage.append(str(error))
        yield name, "", "damaged"
    for version in sorted({*repository.versions(name), *([] if current is None else [current])}):
        try:
            yield _row(repository.manifest(name, version), version == current)
        except RepositoryError as error:
            damage.append(str(error))
            yield name, str(version), "current" if version == current else "", "damaged"


def _row(manifest: Manifest, is_current: bool) -> tuple[str, ...]:
    auroc = manifest.metrics.get("auroc")
    return (
        manifest.name,
        str(manifest.version),
        "current" if is_current else "",
        manifest.normal_class,
        manifest.recipe.name,
        "-" if auroc is None else f"{auroc:.4f}",
        f"{manifest.alpha:g}",
        f"{manifest.threshold:.6g}",
        f"{manifest.created_at:%Y-%m-%d %H:%M}",
    )


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app(prog_name="python -m training")
