"""`anomaly bulk` in the process: formats, problems, resumption, equality with offline scoring and the batch route."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from anomaly.bulk import outputs, q_values
from anomaly.bulk.locations import BulkError, locate
from anomaly.bulk.runs import Request, execute
from anomaly.cli.offline import Offline
from anomaly.cli.scoring import Verdict
from tests import model_stores
from tests.cli.conftest import Anomaly
from tests.conftest import MODEL_STORE
from tests.pngs import plain, saved
from training.data.loaders import mnist_sample

MODEL = "zero-article"


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score on the CPU, as the service of these tests does."""
    monkeypatch.setenv("ANOMALY_DEVICE", "cpu")


@pytest.fixture(scope="session")
def digits() -> np.ndarray:
    """Return 300 real digits, uint8 [300, 28, 28]."""
    return np.ascontiguousarray(mnist_sample().images.reshape(-1, 28, 28)[::17][:300])


def score(source: Path | str, output: Path | str, store: Path = MODEL_STORE, **options: Any) -> pa.Table:
    """Score an input and return the rows by id."""
    execute(Request(str(source), str(output), store, **{"model": MODEL, "workers": 2, **options}))
    return rows(output)


def rows(output: Path | str) -> pa.Table:
    """Return the rows of an output by id."""
    place = locate(str(output))
    tables = [pq.read_table(path, filesystem=place.files) for path in outputs.parts(place)]
    return pa.concat_tables(tables).sort_by("id")


def by_id(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Return the rows as documents."""
    found = {row["id"]: row for row in table.to_pylist()}
    assert len(found) == len(table), "an id occurs twice"
    return found


def add_member(archive: tarfile.TarFile, name: str, content: bytes, headers: dict[str, str] | None = None) -> None:
    """Add a file to an archive, with PAX headers if there are any."""
    member = tarfile.TarInfo(name)
    member.pax_headers = headers or {}
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def idx(images: np.ndarray) -> bytes:
    """Return images as an IDX file."""
    return b"\0\0\x08\x03" + np.array(images.shape, ">u4").tobytes() + images.tobytes()


def write_all(folder: Path, digits: np.ndarray) -> dict[str, list[str]]:
    """Write the same images in every format, and return the ids of each format in the order of the images."""
    pngs = [plain(image) for image in digits]
    (folder / "deep" / "er").mkdir(parents=True)
    for place, content in enumerate(pngs):
        (folder / "deep" / "er" / f"{place:03}.PNG").write_bytes(content)
    for mode in ("", "gz", "bz2", "xz"):
        with tarfile.open(folder / f"a.tar{'.' * bool(mode)}{mode}", f"w:{mode}") as archive:
            for place, content in enumerate(pngs):
                add_member(archive, f"{place}.png", content)
            add_member(archive, "labels.txt", b"not an image")
    with zipfile.ZipFile(folder / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._x.png", b"metadata")
        for place, content in enumerate(pngs):
            archive.writestr(f"in/{place}.png", content)
    np.save(folder / "c.npy", digits)
    (folder / "d-idx3-ubyte").write_bytes(idx(digits))
    (folder / "e-idx3-ubyte.gz").write_bytes(gzip.compress(idx(digits)))
    flat = digits.reshape(len(digits), -1)
    columns = {
        "encoded": pa.array(pngs, pa.binary()),
        "structs": pa.array([{"bytes": content, "path": None} for content in pngs]),
        "raw": pa.array([row.tobytes() for row in flat], pa.binary(784)),
        "lists": pa.array(flat.tolist(), pa.list_(pa.uint8())),
        "nested": pa.array(digits.tolist(), pa.list_(pa.list_(pa.uint8(), 28), 28)),
    }
    for name, column in columns.items():
        pq.write_table(pa.table({"label": [0] * len(digits), "image": column}), folder / f"{name}.parquet", 100)
    places = range(len(digits))
    return {
        "folder": [f"deep/er/{place:03}.PNG" for place in places],
        **{name: [f"{name}#{place}/{place}.png" for place in places]
           for name in ("a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz")},
        "b.zip": [f"b.zip#{place}/in/{place}.png" for place in places],
        **{name: [f"{name}#{place}" for place in places]
           for name in ("c.npy", "d-idx3-ubyte", "e-idx3-ubyte.gz", *(f"{each}.parquet" for each in columns))},
    }  # fmt: skip


def test_every_format_gives_the_rows_of_offline_scoring(tmp_path: Path, digits: np.ndarray) -> None:
    """The same images in each format have the verdict and the p-value of `anomaly score`, and nearly its mse."""
    names = write_all(tmp_path / "in", digits[:40])
    found = by_id(score(tmp_path / "in", tmp_path / "out"))
    assert len(found) == sum(map(len, names.values()))
    offline = Offline(MODEL_STORE, Verdict(MODEL, None, "strict"))
    expected = [offline.score(plain(image)) for image in digits[:40]]
    assert len({each.is_anomaly for each in expected}) == 2
    for ids in names.values():
        for id, one in zip(ids, expected, strict=True):
            row = found[id]
            assert row["verdict"] == ("anomalous" if one.is_anomaly else "normal")
            assert row["p_value"] == one.p_value
            assert row["mse"] == pytest.approx(one.mse, rel=1e-5)
            assert (row["reason"], row["model"], row["version"]) == (one.reason, one.model, one.version)
            assert row["error"] is None and row["detail"] is None
            assert re.fullmatch("[0-9a-f]{64}", row["digest"])


async def test_rows_are_those_of_the_batch_route(client: httpx.AsyncClient, tmp_path: Path, digits: np.ndarray) -> None:
    """Bulk scoring and `POST /score/batch` give the same scores, p-values and verdicts, bit by bit."""
    np.save(tmp_path / "images.npy", digits)
    body = (tmp_path / "images.npy").read_bytes()
    reply = await client.post("/score/batch", content=body, headers={"content-type": "application/x-npy"})
    found = by_id(score(tmp_path / "images.npy", tmp_path / "out"))
    for item in reply.json()["items"]:
        row = found[f"images.npy#{item['index']}"]
        assert (row["mse"], row["p_value"]) == (item["mse"], item["p_value"])
        assert (row["verdict"] == "anomalous") is item["is_anomaly"]


def test_bad_images_and_files_become_rows(tmp_path: Path, digits: np.ndarray) -> None:
    """Every image and every file that cannot be scored has one row with its problem; the others are scored."""
    folder = tmp_path / "in"
    folder.mkdir()
    good = plain(digits[0])
    colour = saved(Image.new("RGB", (28, 28), (255, 0, 0)))
    for name, content in {
        "good.png": good, "empty.png": b"", "cut.png": good[:-20], "large.png": plain(np.zeros((30, 30), np.uint8)),
        "colour.png": colour, "photo.jpg": saved(Image.new("L", (28, 28)), format="JPEG"),
        "huge.png": good + bytes(100_000), "text.npy": b"text", "text.parquet": b"text", "text.tar": b"text" * 500,
        "text.zip": b"text", "text-idx3-ubyte": b"text", "cut-idx3-ubyte.gz": gzip.compress(idx(digits))[:5000],
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    np.save(folder / "floats.npy", digits.astype(np.float32))
    np.save(folder / "short.npy", digits[:5])
    (folder / "short.npy").write_bytes((folder / "short.npy").read_bytes()[:-10])
    np.save(folder / "long.npy", digits[:5])
    (folder / "long.npy").write_bytes((folder / "long.npy").read_bytes() + b"x")
    with tarfile.open(folder / "mixed.tar", "w") as archive:
        add_member(archive, "bad.png", b"bad")
        add_member(archive, "good.png", good)
    (folder / "cut.tar").write_bytes((folder / "mixed.tar").read_bytes()[:700])
    images = pa.array([good, None, b"bad"], pa.binary())
    pq.write_table(pa.table({"image": images}), folder / "mixed.parquet")
    numbers = pa.array([[0] * 784, [0] * 783], pa.list_(pa.uint8()))
    pq.write_table(pa.table({"image": numbers}), folder / "lengths.parquet")
    pq.write_table(pa.table({"image": pa.array([[0] * 784], pa.list_(pa.int64()))}), folder / "types.parquet")
    found = by_id(score(folder, tmp_path / "out"))
    errors = {id: row["error"] for id, row in found.items() if row["error"] is not None}
    assert errors == {
        "empty.png": "empty-body", "cut.png": "truncated-png", "large.png": "wrong-size", "colour.png": "not-grey",
        "photo.jpg": "not-a-png", "huge.png": "body-too-large", "gone.png": "unreadable-file",
        "text.npy": "malformed-array", "text.parquet": "malformed-file", "text.tar": "malformed-file",
        "text.zip": "malformed-file", "text-idx3-ubyte": "malformed-array", "cut-idx3-ubyte.gz": "malformed-array",
        "floats.npy": "wrong-array", "short.npy": "malformed-array", "long.npy": "malformed-array",
        "mixed.tar#0/bad.png": "not-a-png", "cut.tar#0/bad.png": "not-a-png", "cut.tar": "malformed-file",
        "mixed.parquet#1": "empty-body", "mixed.parquet#2": "not-a-png", "lengths.parquet#1": "wrong-array",
        "types.parquet#0": "wrong-array",
    }  # fmt: skip
    for id in errors:
        row = found[id]
        assert row["verdict"] == "not scored" and row["detail"]
        assert (row["mse"], row["p_value"], row["reason"]) == (None, None, None)
    assert {f"short.npy#{place}" for place in range(4)} | {f"long.npy#{place}" for place in range(5)} <= set(found)
    assert {"good.png", "mixed.tar#1/good.png", "mixed.parquet#0", "lengths.parquet#0"} <= set(found)


def test_damage_within_files_becomes_rows(tmp_path: Path, digits: np.ndarray) -> None:
    """Damage that the readers of archives and arrays meet only later costs one row per file, and the run goes on."""
    folder = tmp_path / "in"
    folder.mkdir()
    good = plain(digits[0])
    (folder / "good.png").write_bytes(good)
    with zipfile.ZipFile(folder / "bzip2.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.png", good + bytes(3000))
        archive.writestr("b.png", good)
    overwrite(folder / "bzip2.zip", 60, b"\xaa" * 20)
    for name in ("name.zip", "version.zip"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("caf\xe9.png", good)
    content = (folder / "name.zip").read_bytes()
    (folder / "name.zip").write_bytes(content.replace("caf\xe9".encode(), b"caf\xff\xff"))
    overwrite(folder / "version.zip", content.index(b"PK\1\2") + 6, b"\x63")
    for name, sparse in {
        "major.tar": {"major": "1", "minor": "0", "name": "x.png", "realsize": "abc"}, "map.tar": {"map": "a,b"},
    }.items():  # fmt: skip
        with tarfile.open(folder / name, "w", format=tarfile.PAX_FORMAT) as archive:
            headers = {f"GNU.sparse.{key}": value for key, value in sparse.items()}
            add_member(archive, "a.png", good, headers)
    pq.write_table(pa.table({"image": [good] * 90}), folder / "pages.parquet", row_group_size=30, compression="none")
    for group in range(2):
        at = pq.ParquetFile(folder / "pages.parquet").metadata.row_group(group).column(0).dictionary_page_offset
        overwrite(folder / "pages.parquet", at, b"\xff" * 50)
    np.save(folder / "count.npy", digits[:3])
    content = (folder / "count.npy").read_bytes()
    (folder / "count.npy").write_bytes(content.replace(b"(3, 28, 28), }" + b" " * 12, b"(3000000000000, 28, 28), }"))
    (folder / "count.idx").write_bytes(idx(digits[:3])[:4] + b"\xff" * 4 + idx(digits[:3])[8:])
    os.mkfifo(tmp_path / "pipe")
    (folder / "pipe.png").symlink_to(tmp_path / "pipe")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "loop.tar").symlink_to(folder / "loop.tar")
    found = by_id(score(folder, tmp_path / "out"))
    assert {id: row["error"] for id, row in found.items() if row["error"] is not None} == {
        "bzip2.zip#0/a.png": "malformed-file", "name.zip": "malformed-file", "version.zip": "malformed-file",
        "major.tar": "malformed-file", "map.tar": "malformed-file",
        "pages.parquet#row-group-0": "malformed-file", "pages.parquet#row-group-1": "malformed-file",
        "count.npy": "malformed-array", "count.idx": "malformed-array",
        "loop.png": "unreadable-file", "loop.tar": "unreadable-file",
    }  # fmt: skip
    arrays = {f"count.{kind}#{place}" for kind in ("npy", "idx") for place in range(3)}
    rows = {f"pages.parquet#{place}" for place in range(60, 90)}
    assert {id for id, row in found.items() if row["error"] is None} == {
        "good.png",
        "bzip2.zip#1/b.png",
    } | arrays | rows


def overwrite(path: Path, at: int, content: bytes) -> None:
    """Overwrite a part of a file."""
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(content)


def test_fit_scores_photos(tmp_path: Path, digits: np.ndarray) -> None:
    """With `--fit mnist`, a JPEG of any size has the score of offline scoring."""
    folder = tmp_path / "in"
    folder.mkdir()
    photo = saved(Image.fromarray(255 - digits[0]).resize((200, 200)).convert("RGB"), format="JPEG", quality=95)
    (folder / "photo.jpg").write_bytes(photo)
    found = by_id(score(folder, tmp_path / "out", fit="mnist"))["photo.jpg"]
    expected = Offline(MODEL_STORE, Verdict(MODEL, None, "mnist")).score(photo)
    assert (found["mse"], found["p_value"]) == (pytest.approx(expected.mse, rel=1e-5), expected.p_value)


def test_a_second_run_does_only_what_is_missing(tmp_path: Path, digits: np.ndarray) -> None:
    """After one file of rows is deleted and images are added, only their rows are new; no id occurs twice."""
    write_all(tmp_path / "in", digits[:30])
    expected = score(tmp_path / "in", tmp_path / "out", workers=1)
    [part] = (tmp_path / "out").glob("*.parquet")
    table = pq.read_table(part)
    pq.write_table(table.slice(100), part)
    np.save(tmp_path / "in" / "added.npy", digits[:7])
    summary = execute(Request(str(tmp_path / "in"), str(tmp_path / "out"), MODEL_STORE, MODEL, workers=2))
    assert summary.new == 107
    found = by_id(rows(tmp_path / "out"))
    assert [found[row["id"]] for row in expected.to_pylist()] == [
        {**row, "mse": pytest.approx(row["mse"], rel=1e-5)} for row in expected.to_pylist()
    ]
    assert execute(Request(str(tmp_path / "in"), str(tmp_path / "out"), MODEL_STORE, MODEL)).new == 0


def test_an_interrupted_run_goes_on(tmp_path: Path, digits: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails in the middle leaves complete files of rows only; the next run adds the rest."""
    monkeypatch.setattr(outputs, "ROWS_PER_FILE", 50)
    source = tmp_path / "in"
    source.mkdir()
    for number in range(4):
        np.save(source / f"{number}.npy", digits[number * 60 : number * 60 + 60])
    before = outputs.write_part

    def fail_later(output: Any, path: str, table: pa.Table) -> None:
        before(output, path, table)
        if len(outputs.parts(output)) == 2:
            raise OSError("the disk is full")

    monkeypatch.setattr(outputs, "write_part", fail_later)
    with pytest.raises(BulkError, match="the disk is full; run the command again to go on"):
        score(source, tmp_path / "out", workers=1)
    monkeypatch.setattr(outputs, "write_part", before)
    (tmp_path / "out" / ".part-killed.parquet.new").write_bytes(b"half")
    assert 0 < len(rows(tmp_path / "out")) < 240
    assert len(by_id(score(source, tmp_path / "out"))) == 240
    assert not list((tmp_path / "out").glob(".*"))


def test_versions_never_mix(tmp_path: Path, digits: np.ndarray) -> None:
    """Another version, alpha, input or engine is rejected for a folder with rows, and nothing is written."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=1)
    np.save(tmp_path / "a.npy", digits[:5])
    np.save(tmp_path / "b.npy", digits[:5])
    score(tmp_path / "a.npy", tmp_path / "out", store)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    for message, source, options in (
        ("version 1, and this run has 2", "a.npy", {"model": f"{MODEL}@2"}),
        ("alpha 0.01, and this run has 0.02", "a.npy", {"alpha": 0.02}),
        ("b.npy'; choose another folder", "b.npy", {}),
        ("fit 'strict', and this run has 'mnist'", "a.npy", {"fit": "mnist"}),
        ("engine 'process', and this run has 'ray'", "a.npy", {"address": "local"}),
    ):
        with pytest.raises(BulkError, match=re.escape(message)):
            score(tmp_path / source, tmp_path / "out", store, **options)
    model_stores.change(store / MODEL / "1", normal_class="another")
    with pytest.raises(BulkError, match="a run with digest"):
        score(tmp_path / "a.npy", tmp_path / "out", store)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_two_runs_do_not_write_the_same_folder(tmp_path: Path, digits: np.ndarray) -> None:
    """While a run writes to a folder, another run is rejected."""
    np.save(tmp_path / "a.npy", digits[:5])
    score(tmp_path / "a.npy", tmp_path / "out")
    with outputs.exclusive(locate(str(tmp_path / "out"))), pytest.raises(BulkError, match="another run writes to"):
        score(tmp_path / "a.npy", tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "output", "options", "message"),
    [
        ("nowhere", "out", {}, "nowhere does not exist"),
        ("empty", "out", {}, "empty contains no PNG, JPEG or WebP images, tar or zip"),
        ("a.txt", "out", {}, "a.txt is not a folder, and its name does not end with .png"),
        ("a.parquet", "out", {}, "a.parquet has no column 'image'; choose one of picture with --image-column"),
        ("a.npy", "empty/../used", {}, "used contains files that are not of a bulk run; choose an empty folder"),
        ("a.npy", "a.txt", {}, "a.txt is a file; name a folder for the results"),
        ("empty", "empty", {}, "the input and the output are the same folder"),
        ("what://x/y", "out", {}, "the scheme of what://x/y is not supported here"),
        ("a.npy", "out", {"model": "nothing"}, "has no nothing; `anomaly list"),
        ("a.npy", "out", {"model": f"{MODEL}@x"}, "is neither `name` nor `name@version`"),
        ("a.npy", "out", {"alpha": 1e-9}, "use a larger --alpha"),
    ],
)
def test_a_run_that_cannot_begin_names_the_reason(
    tmp_path: Path, digits: np.ndarray, source: str, output: str, options: dict[str, Any], message: str
) -> None:
    """An input, an output or an option that is not valid ends the run with its reason."""
    for name in ("empty", "used"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "used" / "thesis.parquet").write_text("x")
    np.save(tmp_path / "a.npy", digits[:3])
    pq.write_table(pa.table({"picture": [b""]}), tmp_path / "a.parquet")
    source = source if "://" in source else str(tmp_path / source)
    with pytest.raises(BulkError, match=re.escape(message)):
        score(source, tmp_path / output, **options)


def test_urls_of_fsspec(digits: np.ndarray) -> None:
    """Input and output may be on a file system of fsspec."""
    import fsspec

    files = fsspec.filesystem("memory")
    buffer = io.BytesIO()
    np.save(buffer, digits)
    files.pipe("/bulk-in/a/x.npy", buffer.getvalue())
    files.pipe("/bulk-in/b/y.png", plain(digits[0]))
    found = by_id(score("memory://bulk-in", "memory://bulk-out"))
    assert set(found) == {"b/y.png", *(f"a/x.npy#{place}" for place in range(len(digits)))}
    assert execute(Request("memory://bulk-in", "memory://bulk-out", MODEL_STORE, MODEL)).new == 0


def test_q_values_are_those_of_the_definition(tmp_path: Path, digits: np.ndarray) -> None:
    """The q-values equal the Benjamini-Hochberg adjustment by its definition, over all files of rows."""
    np.save(tmp_path / "a.npy", digits)
    (tmp_path / "bad.png").write_bytes(b"bad")
    found = score(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", q_values=True)
    p_values = found.column("p_value").drop_null().to_numpy()
    order = np.sort(p_values)
    expected = [
        min(len(order) * p / np.searchsorted(order, p, "right") for p in order[order >= each]) for each in p_values
    ]
    assert found.column("q_value").drop_null().to_numpy() == pytest.approx(np.minimum(expected, 1.0))
    assert found.column("q_value").null_count == 1
    assert q_values.adjust(np.array([0, 0, 4])).tolist() == [1.0, 1.0, 1.0]


def test_reconstructions_are_those_of_the_service(tmp_path: Path, digits: np.ndarray) -> None:
    """`--reconstructions` adds the picture that the service stores, as PNG."""
    from app.images import png
    from app.inference.detector import Detector
    from app.inference.device import choose_device, one_thread
    from app.models.repository import Repository

    np.save(tmp_path / "a.npy", digits[:70])
    found = by_id(score(tmp_path / "a.npy", tmp_path / "out", reconstructions=True))
    with one_thread():
        detector = Detector.load(Repository(MODEL_STORE).open(MODEL, 1), choose_device("cpu"))
        expected = detector.draw(np.ascontiguousarray(digits[:64].reshape(-1, 1, 28, 28))).planes[:, 1]
    for place, picture in enumerate(expected):
        assert png.decode(found[f"a.npy#{place}"]["reconstruction"]) == picture.tobytes()
    assert len(found) == 70


def test_a_large_array_is_divided(tmp_path: Path) -> None:
    """An npy file of 100 million images is divided into units of a bounded size by its header alone."""
    from anomaly.bulk.inputs import UNIT_IMAGES, Listing

    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (100_000_000, 28, 28)}
    np.lib.format.write_array_header_1_0(header, shape)
    with (tmp_path / "sparse.npy").open("wb") as stream:
        stream.write(header.getvalue())
        stream.truncate(len(header.getvalue()) + 100_000_000 * 784)
    units = list(Listing(locate(str(tmp_path / "sparse.npy")), "image").units())
    assert len(units) == -(-100_000_000 // UNIT_IMAGES)
    assert [piece.stop - piece.start for [piece] in units[:-1]] == [UNIT_IMAGES] * (len(units) - 1)


def test_the_command(in_process: Anomaly, tmp_path: Path, digits: np.ndarray) -> None:
    """The command writes a summary, and its exit codes are 0 for a complete run and 2 for an error."""
    folder = tmp_path / "in"
    folder.mkdir()
    np.save(folder / "a.npy", digits[:3])
    (folder / "readme.txt").write_text("x")
    store = ("--model-store", MODEL_STORE, "--model", MODEL)
    done = in_process("bulk", folder, tmp_path / "out", *store)
    assert done.returncode == 0, done.stderr
    assert re.match(r"3 rows: \d normal, \d anomalous, 0 not scored; 3 new in ", done.stdout)
    assert "ignored 1 file" in done.stderr
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["model"] == MODEL
    (tmp_path / "bad.png").write_bytes(b"bad")
    assert in_process("bulk", tmp_path / "bad.png", tmp_path / "out2", *store).returncode == 2
    failed = in_process("bulk", tmp_path / "nowhere", tmp_path / "out3", *store)
    assert failed.returncode == 2 and "does not exist" in failed.stderr
