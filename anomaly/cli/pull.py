"""The command `pull`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from anomaly.cli.checkout import service_code
from anomaly.cli.commands import ERROR, plain_errors
from anomaly.cli.streams import write_message


def pull(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="Folder, tar or zip archive, or OCI image layout, local or a URL."),
    ],
    *,
    model_store: Annotated[Path, typer.Option(help="Model store; created if it is missing.")] = Path("model_store"),
    model: Annotated[
        str | None, typer.Option(help="`name` or `name@version`, if the source contains several versions.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Tag of the artifact, if an OCI layout contains several.")] = None,
    digest: Annotated[
        str | None, typer.Option(help="Expected SHA-256 of the manifest, as `pull` prints it. Default: not compared.")
    ] = None,
    signature: Annotated[
        Literal["require", "warn", "off"],
        typer.Option(envvar="ANOMALY_MODEL_SIGNATURE", help="Whether the version needs a signature."),
    ] = "off",
    public_key: Annotated[
        Path | None, typer.Option(envvar="ANOMALY_MODEL_PUBLIC_KEY_FILE", help="PEM file with the public key.")
    ] = None,
    digests: Annotated[
        Path | None, typer.Option(envvar="ANOMALY_MODEL_DIGESTS_FILE", help="File with the accepted digests.")
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Make the version the current one.")] = False,
) -> None:
    """Copy a model version from a URL to the model store, under its own number.

    Every file is compared with its checksum, and the version is loaded and scored as in the service. Then it appears
    by an atomic rename. A version that the model store contains already is verified, and not copied again.

    Example: `anomaly pull s3://bucket/models/zero/3 --promote`
    """
    with plain_errors():
        with service_code("`anomaly pull`", None, "bulk"):
            from anomaly.bulk.locations import BulkError, locate
            from anomaly.bulk.versions import read_version
            from app.models.provenance import Provenance, ProvenanceConfigurationError
            from training.publishing.files import PublishError
            from training.publishing.publish import publish_exact
        try:
            provenance = Provenance(signature, public_key, digests)
            version = read_version(locate(url), model=model, tag=tag)
            wanted = (digest or version.digest).removeprefix("sha256:").lower()
            if wanted != version.digest:
                raise BulkError(f"the manifest has the SHA-256 {version.digest}, not {wanted}; nothing was copied")
            manifest, is_new = publish_exact(
                model_store,
                version.manifest,
                version.files,
                signature=version.signature,
                provenance=provenance,
                promote=promote,
            )
        except (BulkError, ProvenanceConfigurationError, PublishError, OSError) as error:
            write_message(f"error: {error}")
            raise typer.Exit(ERROR) from error
        what = "copied to" if is_new else "is already in"
        state = ", and is now current" if promote else ""
        sys.stdout.write(f"{manifest.name}@{manifest.version} {what} {model_store}{state}; sha256:{version.digest}\n")
