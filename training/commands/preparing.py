"""The options and the table that say how the images of a folder are prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from app.models.manifest import Preparation
from training.commands.console import console
from training.data import preflight
from training.data.dataset import DataError, Dataset
from training.data.loaders import own_images
from training.data.pictures import Folder, read_folder
from training.data.splits import standard

Fit = Annotated[
    Literal["strict", "mnist", "resize"] | None,
    typer.Option(
        help="Preparation of the images of a folder, in training and in the service: `strict` (28x28 PNGs, unchanged), "
        "`mnist` (one handwritten digit on any picture), `resize` (the whole picture or a --crop, any size). "
        "Default: strict."
    ),
]
Invert = Annotated[
    bool | None,
    typer.Option(
        "--invert/--no-invert",
        help="With --fit resize: whether bright becomes dark. Default: inverted if most backgrounds are bright.",
    ),
]
Crop = Annotated[
    str | None,
    typer.Option(
        help="With --fit resize: the part of each picture to use, as shares of its sides: left,top,right,bottom, "
        "`0.1,0,0.9,1` for example. Default: the whole picture."
    ),
]


def parse_preparation(
    fit: Literal["strict", "mnist", "resize"] | None, invert: bool | None, crop: str | None
) -> Preparation:
    """Return the preparation that the options describe, not inverted if that is still to be decided.

    Raises:
        DataError: an option does not belong to `--fit`, or the crop is invalid.
    """
    if fit != "resize" and (crop is not None or invert):
        raise DataError("--invert and --crop are options of --fit resize; add it")
    return Preparation(fit=fit or "strict", invert=bool(invert), crop=_parse_crop(crop))


def prepare_folder(data_dir: Path, preparation: Preparation, invert: bool | None) -> tuple[Folder, Preparation]:
    """Read the normal images of a folder, and decide whether they are inverted.

    Args:
        data_dir: the folder.
        preparation: of `parse_preparation`.
        invert: the option; None to decide by the images.

    Raises:
        DataError: the images cannot be used; the message says what to do.
    """
    folder = read_folder(data_dir, preparation)
    if preparation.fit == "resize" and invert is None and preflight.choose_inversion(folder.images):
        preparation = preparation.model_copy(update={"invert": True})
        folder = read_folder(data_dir, preparation)
    preflight.check(folder, preparation, inversion_chosen=invert is not None)
    return folder, preparation


def load_own_images(
    data_dir: Path, anomalies_dir: Path | None, preparation: Preparation, invert: bool | None, *, alpha: float
) -> Dataset:
    """Return a data set of the user's own images, and print the table about them.

    Raises:
        DataError: the images cannot be used; the message says what to do.
    """
    folder, preparation = prepare_folder(data_dir, preparation, invert)
    dataset = own_images(folder, data_dir, anomalies_dir, preparation)
    split = standard(dataset, (0,), seed=0)
    parts = (len(split.train), len(split.calibration), len(folder.images) - len(split.train) - len(split.calibration))
    print_table(preflight.table(folder, preparation, parts=parts, alpha=alpha))
    return dataset


def print_table(rows: list[tuple[str, str]]) -> None:
    """Print the table of `training.data.preflight.table`."""
    shown = Table(box=None, show_header=False, pad_edge=False)
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column()
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def _parse_crop(text: str | None) -> tuple[float, float, float, float] | None:
    if text is None:
        return None
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        left = top = right = bottom = 0.0
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1 and min(right - left, bottom - top) >= 0.02):
        raise DataError(
            f"--crop is {text!r}; give left,top,right,bottom as shares of the sides between 0 and 1, "
            "0.1,0,0.9,1 for example"
        )
    return left, top, right, bottom
