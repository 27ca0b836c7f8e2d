"""The commands of the model store: `publish`, `sign`, `promote`, `rollback`, `list`, `verify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from app.models.manifest import Manifest
from app.models.provenance import Provenance
from app.models.repository import MODEL_NAME, Repository, RepositoryError
from training.commands.console import console, error_console, exit_on_error, print_published
from training.commands.options import (
    MODEL_STORE,
    Digests,
    ModelName,
    ModelStore,
    Promote,
    PublicKey,
    SignatureMode,
)
from training.publishing import publish as model_store_changes
from training.publishing.files import PublishError
from training.publishing.sign import sign as sign_version

_COLUMNS = ("model", "version", "current", "normal class", "recipe", "AUROC", "alpha", "threshold", "created")
_NUMBERS = frozenset(("version", "AUROC", "alpha", "threshold"))


def publish(
    folder: Annotated[Path, typer.Argument(help="Version in another model store, such as `elsewhere/zero/3`.")],
    *,
    promote: Promote = False,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Copy a version of another model store to this one, under the next number.

    Every file is compared with its checksum, and the version is loaded and scored as in the service.

    Example: `anomaly publish /mnt/laptop/model_store/zero/3 --promote`
    """
    with exit_on_error():
        print_published(model_store_changes.publish_copy(model_store, folder, promote=promote), promote)


def sign(
    name: ModelName,
    version: Annotated[int, typer.Argument(help="Number of the version.")],
    *,
    private_key: Annotated[Path, typer.Option(help="PEM file with the private key, of the curve P-256.")],
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Sign a version, after the checks of `verify`. The signature is the file `model.sig` of the version.

    Example: `python -m training sign zero 3 --private-key key.pem`
    """
    with exit_on_error():
        console.print(f"{name}@{version}: signed, {sign_version(model_store, name, version, private_key)}")


def promote(
    name: ModelName,
    version: Annotated[int, typer.Argument(help="Number of the version.")],
    *,
    signature: SignatureMode = "off",
    public_key: PublicKey = None,
    digests: Digests = None,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Make a version the current one, after the checks of `verify`."""
    with exit_on_error():
        model_store_changes.promote(model_store, name, version, Provenance(signature, public_key, digests))
        console.print(f"{name}: version {version} is current")


def rollback(
    name: ModelName,
    to: Annotated[
        int | None, typer.Option(help="Number of an older version. Default: the highest below the current one.")
    ] = None,
    *,
    signature: SignatureMode = "off",
    public_key: PublicKey = None,
    digests: Digests = None,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Make an older version the current one. No version is deleted."""
    with exit_on_error():
        version = model_store_changes.rollback(model_store, name, to, Provenance(signature, public_key, digests))
        console.print(f"{name}: version {version} is current")


def list_versions(model_store: ModelStore = MODEL_STORE) -> None:
    """List all versions of all models. The exit code is 2 if one is damaged."""
    with exit_on_error():
        repository = Repository(model_store)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in _COLUMNS:
            table.add_column(column, justify="right" if column in _NUMBERS else "left")
        errors: list[str] = []
        for name in _model_names(repository):
            for row in _rows(repository, name, errors):
                table.add_row(*row)
        console.print(table if table.row_count else f"no versions in {model_store}")
        for error in errors:
            error_console.print(error, style="red")
        if errors:
            raise typer.Exit(2)


def verify(
    name: Annotated[str | None, typer.Argument(help="Name of a model. Default: all models.")] = None,
    version: Annotated[int | None, typer.Argument(help="Number of a version. Default: all versions.")] = None,
    *,
    signature: SignatureMode = "off",
    public_key: PublicKey = None,
    digests: Digests = None,
    model_store: ModelStore = MODEL_STORE,
) -> None:
    """Load versions as the service does, and compare checksums and golden scores on the CPU.

    Without a version, the file CURRENT is checked as well. The exit code is 2 if a check fails.
    """
    with exit_on_error():
        repository, provenance = Repository(model_store), Provenance(signature, public_key, digests)
        names = [name] if name else _model_names(repository)
        versions = [
            (each, number)
            for each in names
            for number in ([version] if version is not None else repository.versions(each))
        ]
        if not versions and (name or not names):
            raise PublishError(f"no versions{f' of {name}' if name else ''} in {model_store}")
        failures = 0
        for each, number in [*versions, *((each, None) for each in names if version is None)]:
            try:
                if number is None:
                    model_store_changes.check_current(model_store, each)
                else:
                    model_store_changes.verify(model_store, each, number, provenance)
                    console.print(f"{each}@{number}: good")
            except PublishError as error:
                failures += 1
                error_console.print(str(error), style="red")
        if failures:
            raise typer.Exit(2)


def _model_names(repository: Repository) -> list[str]:
    if not repository.root.is_dir():
        return []
    names = {path.name for path in repository.root.iterdir() if MODEL_NAME.fullmatch(path.name)}
    return sorted({name for name in names if repository.versions(name)} | set(repository.names()))


def _rows(repository: Repository, name: str, errors: list[str]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each version, also for damaged ones; append the error messages to `errors`."""
    current = None
    try:
        current = repository.current(name)
    except RepositoryError as error:
        errors.append(str(error))
        yield name, "", "damaged"
    for version in sorted({*repository.versions(name), *([] if current is None else [current])}):
        try:
            yield _row(repository.manifest(name, version), version == current)
        except RepositoryError as error:
            errors.append(str(error))
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
