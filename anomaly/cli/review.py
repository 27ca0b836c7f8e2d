"""The command `review`: labels for the images of the review queue."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anomaly.cli.commands import ERROR, plain_errors
from anomaly.cli.formats import console_of, printable
from anomaly.cli.options import existing_folder
from anomaly.cli.review_sheet import describe, sheet
from anomaly.cli.reviewing import Item, Label, ReviewFolder, ReviewFolderError, read_labels
from anomaly.cli.streams import write_message

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_SIDE = 28
_KEYS: dict[str, Label] = {"n": "normal", "a": "anomalous"}
_SHADES = " .:-=+*#%@"


def review(
    folder: Annotated[
        Path, typer.Argument(parser=existing_folder, metavar="FOLDER", help="Folder of the review queue.")
    ],
    *,
    model: Annotated[str | None, typer.Option(help="Only images of this model. Default: all models.")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="CSV file with the columns `id` and `label` (normal or anomalous). Default: the keyboard."),
    ] = None,
    sheet_file: Annotated[
        Path | None, typer.Option("--sheet", help="Write the images to this HTML file, which saves a CSV file.")
    ] = None,
) -> None:
    """Label the images of the review queue as normal or anomalous.

    Labelled images are moved to FOLDER/labelled/MODEL/normal and FOLDER/labelled/MODEL/anomalous, which `anomaly
    calibrate` and `anomaly train` read. Normal images that were chosen because of their scores are moved to
    normal-selected instead: a threshold must not be chosen from them.

    Example: `anomaly review var/review`
    """
    with plain_errors():
        try:
            found = ReviewFolder(folder, model)
            if model is not None and not (found.pending() or found.labelled()):
                raise ReviewFolderError(f"{folder} has no image of the model {printable(model)}")
            if sheet_file is not None:
                _write_sheet(found, sheet_file)
            if labels is not None:
                _apply(found, read_labels(labels))
            if labels is None and sheet_file is None:
                _ask(found)
        except ReviewFolderError as error:
            write_message(f"error: {error}")
            raise typer.Exit(ERROR) from error
        except OSError as error:
            write_message(f"error: {error.filename}: {error.strerror}")
            raise typer.Exit(ERROR) from error


def _write_sheet(folder: ReviewFolder, path: Path) -> None:
    items = folder.pending()
    if not items:
        write_message("no image waits for a label; no contact sheet was written")
        return
    path.touch(0o600)
    path.write_text(sheet(items), encoding="utf-8")
    write_message(
        f"{len(items):,} images are in {path}; label them in a browser, save labels.csv, and pass it with --labels"
    )


def _apply(folder: ReviewFolder, labels: dict[str, Label]) -> None:
    """Give the images their labels. Images that have them already stay as they are."""
    known = {item.id: item for item in [*folder.labelled(), *folder.pending()]}
    for id, label in labels.items():
        item = known.get(id)
        if item is not None and item.folder != item.folder_for(label) and folder.label(item, label) is None:
            del known[id]  # the service has replaced the image since
    _report(folder)
    unknown = [id for id in labels if id not in known]
    if unknown:
        raise ReviewFolderError(
            f"{len(unknown):,} of {len(labels):,} ids are not in the folder, for example {unknown[0]}"
        )


def _ask(folder: ReviewFolder) -> None:
    """Show image by image, and take a label for each by one key."""
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        raise ReviewFolderError("there is no terminal for the keyboard; use --sheet and --labels")
    console = console_of(sys.stdout)
    items = folder.pending()
    done: list[Item | None] = []
    """The labelled images, in the order of `items`; None for those that were skipped."""
    while len(done) < len(items):
        item = items[len(done)]
        _show(console, item, len(done) + 1, len(items))
        key = ""
        while key not in (*_KEYS, "s", "u", "q"):
            key = typer.getchar().lower()
        if key == "q":
            break
        if key in _KEYS:
            done.append(folder.label(item, _KEYS[key]))
        elif key == "s":
            done.append(None)
        elif done and (last := done.pop()) is not None:
            folder.move(last, items[len(done)])
    _report(folder)


def _show(console: Console, item: Item, number: int, count: int) -> None:
    console.print(f"\n{number} of {count}: {printable(str(item.path))}", highlight=False, soft_wrap=True)
    console.print(printable(describe(item)), highlight=False)
    rows = _rows(item.path)
    console.print(
        "the picture cannot be drawn" if rows is None else _drawn(rows, colours=console.color_system is not None)
    )
    console.print("n normal, a anomalous, s skip, u undo, q quit", style="bold", highlight=False)


def _rows(path: Path) -> list[bytes] | None:
    """Return the rows of a PNG as the service writes it: 28x28, 8-bit grey, not filtered. None for other files."""
    try:
        content = path.read_bytes()
        place, compressed = 8, b""
        while place < len(content):
            length, kind = int.from_bytes(content[place : place + 4]), content[place + 4 : place + 8]
            if kind == b"IDAT":
                compressed += content[place + 8 : place + 8 + length]
            place += 12 + length
        rows = zlib.decompressobj().decompress(compressed, _SIDE * (_SIDE + 1))
    except (OSError, zlib.error):
        return None
    if len(rows) != _SIDE * (_SIDE + 1) or any(rows[:: _SIDE + 1]):
        return None
    return [rows[start + 1 : start + 1 + _SIDE] for start in range(0, len(rows), _SIDE + 1)]


def _drawn(rows: list[bytes], *, colours: bool) -> Text:
    """Draw an image with two pixels per character: upper half blocks, or shades without colours."""
    from rich.text import Text

    text = Text()
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        for top, bottom in zip(upper, lower, strict=True):
            if colours:
                text.append("▀", f"rgb({top},{top},{top}) on rgb({bottom},{bottom},{bottom})")
            else:
                text.append(_SHADES[(top + bottom) * len(_SHADES) // 512])
        text.append("\n")
    text.rstrip()
    return text


def _report(folder: ReviewFolder) -> None:
    for model, counts in sorted(folder.counts().items()):
        of = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        write_message(f"{printable(model)}: {of} in {folder.root / 'labelled' / model}")
    write_message(f"{len(folder.pending()):,} images are left")
