"""The command `validity`: whether images still score like the calibration images."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from anomaly import Client, ServiceError, Validity
from anomaly.cli.commands import plain_errors
from anomaly.cli.formats import console_of, printable
from anomaly.cli.messages import explain
from anomaly.cli.options import DEFAULT_URL, KeyFile, Url
from anomaly.client.environment import api_key

CHANGED = 1


def validity(
    names: Annotated[list[str] | None, typer.Argument(help="Models. Default: all models of the service.")] = None,
    *,
    url: Url = DEFAULT_URL,
    key_file: KeyFile = None,
) -> None:
    """Show whether images still score like the calibration images.

    Exit codes: 0 no model has changed, 1 at least one model has changed, 2 an error.
    """
    with plain_errors():
        try:
            with Client(url, api_key=api_key(key_file)) as service:
                chosen = names or [each.name for each in service.models() if each.current is not None]
                found = [_validity(service, name) for name in chosen]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        except ServiceError as error:
            raise explain(error) from error
        _show(found)
        raise typer.Exit(CHANGED if any(each.status == "changed" for each in found) else 0)


def _validity(service: Client, reference: str) -> Validity:
    """Return the validity of a model, named with or without its current version as in the table."""
    name, _, number = reference.partition("@")
    found = service.validity(name)
    if number not in ("", str(found.version)):
        raise typer.BadParameter(f"{printable(reference)} is not the current version, which is {name}@{found.version}")
    return found


def _show(found: list[Validity]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("model", "status", "images", "p-value", "evidence (log10)", "anomalous", "alpha"):
        table.add_column(column)
    for each in found:
        low, high = each.anomalous_interval
        share = "-" if each.anomalous_share is None else f"{each.anomalous_share:.2%} ({low:.2%} to {high:.2%})"
        table.add_row(
            printable(f"{each.model}@{each.version}"),
            printable(each.status),
            f"{each.images:,}",
            f"{each.p_value:.2g}",
            f"{each.evidence_log10:.2f}",
            share,
            f"{each.alpha:g}",
        )
    console = console_of(sys.stdout)
    console.print(table)
    for each in found:
        if each.reason is not None:
            console.print(printable(f"{each.model}: {each.reason}"), highlight=False, soft_wrap=True)
