"""Damaged archives, arrays and Parquet files among the inputs of `anomaly bulk`: no image is lost without a row."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anomaly.bulk.inputs import Listing
from anomaly.bulk.locations import BulkError, locate
from anomaly.bulk.readers import Reader
from app.models.manifest import Preparation
from tests.pngs import gradient, plain

IMAGES = 6
MEMBER = 1024
"""Bytes of a member of the tar file: a header and one block."""


def rows(path: Path) -> dict[str, str | None]:
    """Return the error of each row of a file by id."""
    source = locate(str(path))
    reader = Reader(source, "image", Preparation(fit="strict"), max_bytes=1 << 16, max_pixels=1 << 24)
    blocks = [block for unit in Listing(source, "image").units() for block in reader.blocks(unit)]
    return {row["id"]: row["error"] for block in blocks for row in block.select(["id", "error"]).to_pylist()}


def tar(name: str = "{}.png") -> bytes:
    """Return a tar file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for place in range(IMAGES):
            content = plain(gradient(28))[: MEMBER - tarfile.BLOCKSIZE]
            member = tarfile.TarInfo(name.format(place))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def archive_zip() -> bytes:
    """Return a zip file whose names are UTF-8."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for place in range(IMAGES):
            archive.writestr(f"\xe9{place}.png", plain(gradient(28)))
    return file.getvalue()


def parquet(column: str = "label") -> bytes:
    """Return a Parquet file with a column of images and another one."""
    file = io.BytesIO()
    images = pa.array([plain(gradient(28))] * IMAGES, pa.binary())
    pq.write_table(pa.table({"image": images, column: [1] * IMAGES}), file, row_group_size=3)
    return file.getvalue()


def idx() -> bytes:
    """Return an IDX file of noise, which does not compress."""
    pixels = np.random.default_rng(3).integers(0, 256, IMAGES * 784, dtype=np.uint8)
    return struct.pack(">IIII", 2051, IMAGES, 28, 28) + pixels.tobytes()


def replaced(content: bytes, at: int, new: bytes) -> bytes:
    """Return a file with other bytes at a place."""
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: 4 * MEMBER + 200],
        lambda content: content[: 4 * MEMBER],
        lambda content: replaced(content, 4 * MEMBER + 3, b"\xff"),
        lambda content: replaced(content, 4 * MEMBER, bytes(tarfile.BLOCKSIZE)),
    ],
    ids=["cut in a header", "cut before a header", "a changed header", "a header of zeros"],
)
def test_a_damaged_header_does_not_end_a_tar_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """`tarfile` takes damaged headers for the end; here the images before them are rows, and the damage is one."""
    assert list(rows_of(tmp_path, "a.tar", tar()).values()) == [None] * IMAGES
    found = rows_of(tmp_path, "a.tar", damage(tar()))
    assert found == {**{f"a.tar#{place}/{place}.png": None for place in range(4)}, "a.tar": "malformed-file"}


def rows_of(folder: Path, name: str, content: bytes) -> dict[str, str | None]:
    """Return the error of each row of a file with this content."""
    (folder / name).write_bytes(content)
    return rows(folder / name)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
def test_a_link_in_a_tar_file_is_a_row(tmp_path: Path, kind: bytes) -> None:
    """An image that the archive contains as a link to another one is not scored, and a row says so."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(file := tarfile.TarInfo("a.png"), io.BytesIO(b""))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = kind, file.name
        archive.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type, folder.linkname = kind, "elsewhere"
        archive.addfile(folder)
    assert rows(tmp_path / "a.tar") == {"a.tar#0/a.png": "empty-body", "a.tar#1/b.png": "unreadable-file"}


@pytest.mark.parametrize("end", [0, 512, 1024, 10_240], ids=lambda end: f"{end} bytes after the zeros")
def test_a_complete_tar_file_has_no_error(tmp_path: Path, end: int) -> None:
    """Two blocks of zeros end an archive, whatever follows."""
    content = tar()[: IMAGES * MEMBER] + bytes(2 * tarfile.BLOCKSIZE) + b"x" * end
    assert list(rows_of(tmp_path, "a.tar", content).values()) == [None] * IMAGES


@pytest.mark.parametrize("at", [2000, -6], ids=["a pixel", "the checksum"])
def test_a_gzip_file_with_a_wrong_checksum_is_an_error(tmp_path: Path, at: int) -> None:
    """The images of a gzip file whose checksum is wrong may be wrong: a row says so."""
    content = gzip.compress(idx(), 0)
    assert list(rows_of(tmp_path, "a-idx3-ubyte.gz", content).values()) == [None] * IMAGES
    found = rows_of(tmp_path, "a-idx3-ubyte.gz", replaced(content, at % len(content), bytes([content[at] ^ 1])))
    assert found.pop("a-idx3-ubyte.gz") == "malformed-array"
    assert list(found.values()) == [None] * IMAGES


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """A damaged name of a member or of a column costs one row, and a name of a tar file in Latin-1 none."""
    content = archive_zip()
    found = rows_of(tmp_path, "a.zip", replaced(content, content.index("\xe91".encode()), b"\xff"))
    assert found == {f"a.zip#{place}/\xe9{place}.png": "malformed-file" if place == 1 else None for place in range(6)}
    found = rows_of(tmp_path, "a.parquet", parquet("\xe9\xe9\xe9").replace("\xe9\xe9\xe9".encode(), b"\xff" * 6))
    assert found == {"a.parquet": "malformed-file"}
    content = tar("n{}.png")
    at = content.index(b"n1.png")
    header = bytearray(replaced(content, at, b"\xe9"))[at : at + tarfile.BLOCKSIZE]
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * ord(" "))
    found = rows_of(tmp_path, "a.tar", replaced(content, at, bytes(header)))
    assert found == {
        f"a.tar#{place}/" + ("\\udce91.png" if place == 1 else f"n{place}.png"): None for place in range(6)
    }


def test_a_gzip_header_that_is_cut_short(tmp_path: Path) -> None:
    """A compressed tar file that ends within its first header is a row, with an optional field in the header too."""
    for header in (b"\x1f\x8b\x08\0", b"\x1f\x8b\x08\x04"):
        for rest in range(8):
            assert rows_of(tmp_path, "a.tgz", header + bytes(rest)) == {"a.tgz": "malformed-file"}


FILES = {
    "a.tar": tar,
    "a.tgz": lambda: gzip.compress(tar()),
    "a.tar.bz2": lambda: bz2.compress(tar()),
    "a.tar.xz": lambda: lzma.compress(tar()),
    "a.zip": archive_zip,
    "a.parquet": parquet,
    "a-idx3-ubyte": idx,
    "a-idx3-ubyte.gz": lambda: gzip.compress(idx()),
}


@pytest.mark.parametrize("name", FILES)
def test_random_damage_ends_no_run(tmp_path: Path, name: str) -> None:
    """Whichever bytes are changed or missing, a file becomes rows; only an absent column ends the run."""
    whole, generator = FILES[name](), random.Random(11)
    for _ in range(400):
        content = bytearray(whole)
        if generator.random() < 0.2:
            del content[generator.randrange(len(content)) :]
        for _ in range(generator.choice((1, 1, 2, 4)) if content else 0):
            at = generator.randrange(len(content))
            content[at] = generator.randrange(256)
        try:
            rows_of(tmp_path, name, bytes(content))
        except BulkError as error:
            assert "has no column" in str(error)
