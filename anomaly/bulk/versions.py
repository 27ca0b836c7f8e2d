"""Reads a model version from a path or URL: a folder, a tar or zip archive, or an OCI image layout (a folder or a tar).

Every file is compared with its checksum in the manifest of the version, and every OCI blob with its digest. Names that
lead out of the version are rejected.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pyarrow import fs
from pydantic import ValidationError

from anomaly.bulk.locations import BulkError, Location
from app.models.manifest import Manifest
from app.models.provenance import SIGNATURE_FILE

MAX_BYTES = 2 * 1024**3
"""Maximum number of bytes of all files of an archive or of an OCI artifact, unpacked."""
_MANIFEST = "manifest.json"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_TAG = "org.opencontainers.image.ref.name"
_TITLE = "org.opencontainers.image.title"
_DELETED = ".wh."
_ZIP = b"PK\3\4"
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)

Files = Mapping[str, Callable[[], bytes]]
"""Readers of files by relative path."""


class Version(NamedTuple):
    """A model version in memory, with verified checksums.

    Attributes:
        manifest: the content of manifest.json.
        files: the content of all other files that the manifest lists, by path.
        signature: the content of the signature, or None. It is not verified here.
    """

    manifest: bytes
    files: dict[str, bytes]
    signature: bytes | None

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which contains the checksums of all other files."""
        return hashlib.sha256(self.manifest).hexdigest()


def read_version(source: Location, *, model: str | None = None, tag: str | None = None) -> Version:
    """Read one version.

    Args:
        source: folder or archive.
        model: `name` or `name@version`; None if the source contains one version only.
        tag: of an OCI artifact; None if the layout contains one artifact only.

    Raises:
        BulkError: the source has no such version or several, or a checksum differs.
    """
    try:
        files = _files(source)
        layout = next((name for name in files if posixpath.basename(name) == "oci-layout"), None)
        if layout is not None:
            files = _artifact(files, posixpath.dirname(layout), tag)
        elif tag is not None:
            raise BulkError(f"{source.url} is not an OCI image layout, so it has no tag {tag}")
        return _version(files, source.url, model)
    except FileNotFoundError as error:
        raise BulkError(f"{source.url} does not exist") from error
    except _DAMAGED as error:
        raise BulkError(f"{source.url} is damaged: {error}") from error
    except OSError as error:
        raise BulkError(f"{source.url} cannot be read: {error}") from error


def _version(files: Files, url: str, model: str | None) -> Version:
    found: dict[str, tuple[str, bytes, Manifest]] = {}
    for name in sorted(files):
        if posixpath.basename(name) != _MANIFEST:
            continue
        content = files[name]()
        try:
            manifest = Manifest.model_validate_json(content)
        except ValidationError:
            continue
        label = f"{manifest.name}@{manifest.version}"
        if model in (None, manifest.name, label):
            found[label] = posixpath.dirname(name), content, manifest
    if not found:
        raise BulkError(f"{url} contains no model version{f' {model}' if model else ''} (a folder with {_MANIFEST})")
    if len(found) > 1:
        raise BulkError(f"{url} contains {', '.join(found)}; choose one with --model NAME@VERSION")
    [(label, (folder, content, manifest))] = found.items()
    contents = {}
    for file, checksum in manifest.files.items():
        path = posixpath.join(folder, file)
        if _is_outside(file) or path not in files:
            raise BulkError(f"{label}: {file} is missing, or does not lie inside the version")
        contents[file] = files[path]()
        if hashlib.sha256(contents[file]).hexdigest() != checksum:
            raise BulkError(f"{label}: {file} is not the file that was published (SHA-256 differs)")
    signature = posixpath.join(folder, SIGNATURE_FILE)
    return Version(content, contents, files[signature]() if signature in files else None)


def _files(source: Location) -> Files:
    """Return the files of a folder or archive."""
    files = source.files
    info = files.get_file_info(source.path)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(source.url)
    if info.type == fs.FileType.Directory:
        entries = files.get_file_info(fs.FileSelector(source.path, recursive=True))
        return {
            entry.path[len(source.path) :].lstrip("/"): lambda path=entry.path: _read(source, path)  # type: ignore[misc]
            for entry in entries
            if entry.is_file
        }
    return _loaded(_members(_read(source, source.path), source.url))


def _read(source: Location, path: str) -> bytes:
    with source.files.open_input_stream(path, compression=None) as stream:  # the default unpacks *.gz
        content = bytes(stream.read(MAX_BYTES + 1))
    if len(content) > MAX_BYTES:
        raise BulkError(f"{path} has more than {MAX_BYTES} bytes")
    return content


def _members(archive: bytes, label: str) -> Iterator[tuple[str, bytes]]:
    """Yield the regular files of a tar or zip archive. Links and devices are skipped."""
    room = MAX_BYTES
    for name, stream in _opened(archive, label):
        path = posixpath.normpath(name)
        if _is_outside(path):
            raise BulkError(f"{label} contains the name {name!r}, which leads out of the version")
        content = stream.read(room + 1)
        room -= len(content)
        if room < 0:
            raise BulkError(f"{label} has more than {MAX_BYTES} bytes when it is unpacked")
        yield path, content


def _opened(archive: bytes, label: str) -> Iterator[tuple[str, Any]]:
    if archive.startswith(_ZIP):  # `zipfile.is_zipfile` accepts a tar archive that ends with a model.pt, which is a zip
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            for member in opened.infolist():
                if not member.is_dir():
                    with opened.open(member) as stream:
                        yield member.filename, stream
        return
    try:
        tar = tarfile.open(fileobj=io.BytesIO(archive), mode="r|*")  # noqa: SIM115 - closed below
    except tarfile.TarError as error:
        raise BulkError(f"{label} is neither a folder nor a tar or zip archive") from error
    with tar:
        for entry in tar:
            content = tar.extractfile(entry) if entry.isreg() else None
            if content is not None:
                yield entry.name, content


def _loaded(members: Iterator[tuple[str, bytes]]) -> Files:
    return {name: lambda content=content: content for name, content in members}  # type: ignore[misc]


def _is_outside(name: str) -> bool:
    return name.startswith("/") or "\\" in name or ".." in name.split("/")


# OCI image layout: https://github.com/opencontainers/image-spec/blob/main/image-layout.md


def _artifact(files: Files, root: str, tag: str | None) -> Files:
    """Return the files of all layers of an artifact."""

    def blob(descriptor: Mapping[str, Any]) -> bytes:
        found = _DIGEST.fullmatch(str(descriptor.get("digest")))
        if found is None:
            raise BulkError(f"the OCI layout names a blob {descriptor.get('digest')!r}; only SHA-256 is supported")
        path = posixpath.join(root, "blobs", "sha256", found[1])
        if path not in files:
            raise BulkError(f"the OCI layout lacks the blob {found[0]}")
        content = files[path]()
        if len(content) != descriptor.get("size") or hashlib.sha256(content).hexdigest() != found[1]:
            raise BulkError(f"the blob {found[0]} has another content (size or SHA-256 differs)")
        return content

    index = _json(files[posixpath.join(root, "index.json")]())
    for _ in range(2):  # an index may contain one further index, of platforms
        chosen = _chosen(index, tag)
        document = _json(blob(chosen))
        if "manifests" not in document:
            break
        index, tag = document, None
    unpacked: dict[str, bytes] = {}
    for layer in document.get("layers", []):
        kind, title = str(layer.get("mediaType")), layer.get("annotations", {}).get(_TITLE)
        if kind.endswith("zstd"):
            raise BulkError(f"a layer has the media type {kind}; save the artifact with gzip or without compression")
        content = blob(layer)
        if not re.search(r"tar(\+gzip)?$|\.tar\.gzip$", kind):
            if title and not _is_outside(title):
                unpacked[title] = content
            continue
        for name, file in _members(content, f"the layer {layer['digest']}"):
            folder, base = posixpath.split(name)
            if base.startswith(_DELETED):
                unpacked.pop(posixpath.join(folder, base.removeprefix(_DELETED)), None)
            else:
                unpacked[name] = file
    return _loaded(iter(unpacked.items()))


def _chosen(index: Mapping[str, Any], tag: str | None) -> Mapping[str, Any]:
    manifests: list[Mapping[str, Any]] = index.get("manifests", [])
    tags = [str(each.get("annotations", {}).get(_TAG, "without a tag")) for each in manifests]
    fitting = [each for each, name in zip(manifests, tags, strict=True) if tag in (None, name)]
    if len(fitting) != 1:
        known = ", ".join(tags) or "nothing"
        raise BulkError(f"the OCI layout contains {known}; choose one artifact with --tag")
    return fitting[0]


def _json(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise BulkError(f"a document of the OCI layout is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BulkError("a document of the OCI layout is not an object")
    return document
