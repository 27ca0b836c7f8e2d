"""Options that several commands have, and their parsers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from app.models.provenance import Mode
from training.data.dataset import DataError, Dataset
from training.data.loaders import PACKAGED
from training.recipes.contract import Recipe
from training.recipes.table import RECIPES

MODEL_STORE = Path("model_store")
MAX_SEED = 2**63 - 1
"""Maximum seed of torch."""
MAX_THREADS = 512
"""More than the number of CPU cores. If the kernel cannot start a thread, torch ends with a segmentation fault."""
DATA_DIR_VARIABLE = "ANOMALY_DATA_DIR"

ModelStore = Annotated[Path, typer.Option(help="Folder of the model versions.", envvar="ANOMALY_MODEL_STORE")]
ModelName = Annotated[str, typer.Argument(help="Name of the model, such as `zero-article`.")]
RecipeName = Annotated[str, typer.Option("--recipe", help=f"Recipe: {', '.join(RECIPES)}.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Number of epochs. Default: that of the recipe.")]
Device = Annotated[str, typer.Option(help="Device to train on: auto, cpu, cuda, cuda:n.")]
SIGNATURE_VARIABLE = "ANOMALY_MODEL_SIGNATURE"


def _check_promote(promote: bool) -> bool:
    """Reject `--promote` before a training that would end with a version that may not be promoted."""
    if promote and os.environ.get(SIGNATURE_VARIABLE) == "require":
        raise typer.BadParameter(
            f"{SIGNATURE_VARIABLE} is `require`, and a new version has no signature; leave the option out, then run "
            "`sign` and `promote`"
        )
    return promote


Promote = Annotated[
    bool, typer.Option("--promote", help="Make the new version the current one.", callback=_check_promote)
]
SignatureMode = Annotated[
    Mode,
    typer.Option(
        "--signature", help="Whether a version needs a signature: require, warn, off.", envvar=SIGNATURE_VARIABLE
    ),
]
PublicKey = Annotated[
    Path | None, typer.Option(help="PEM file with the public key.", envvar="ANOMALY_MODEL_PUBLIC_KEY_FILE")
]
Digests = Annotated[
    Path | None, typer.Option(help="File with the accepted digests.", envvar="ANOMALY_MODEL_DIGESTS_FILE")
]


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name.

    Raises:
        DataError: the name is unknown.
    """
    if name not in RECIPES:
        raise DataError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return seeds from text such as `0,1,2`, sorted and without copies.

    Raises:
        DataError: the text is invalid.
    """
    try:
        seeds = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise DataError(f"--seeds is {text!r}; give integers separated by commas") from error
    if seeds[0] < 0 or seeds[-1] > MAX_SEED:
        raise DataError(f"--seeds is {text}; give seeds between 0 and {MAX_SEED}")
    return tuple(seeds)


def parse_labels(text: str, dataset: Dataset) -> tuple[int, ...]:
    """Return labels of a data set from text such as `3,5` or `all`, sorted and without copies.

    Raises:
        DataError: the text is invalid, or a label is unknown.
    """
    if text == "all":
        return tuple(range(len(dataset.label_names)))
    try:
        labels = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise DataError(f"--normal is {text!r}; give a label, labels separated by commas, or all") from error
    dataset.describe(labels)
    return labels


def folder_for(data: str | None, data_dir: Path | None, context: typer.Context) -> Path | None:
    """Return the folder of the data set; None if it is from the environment and the set is in a package."""
    source = context.get_parameter_source("data_dir")
    from_environment = source is not None and source.name == "ENVIRONMENT"
    return None if data in PACKAGED and from_environment else data_dir
