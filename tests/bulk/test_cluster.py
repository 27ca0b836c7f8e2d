"""`anomaly bulk --address` on a real cluster of two nodes. `make test-bulk` runs these tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import environment
from tests.conftest import ROOT
from tests.waiting import wait_until
from training.data.loaders import mnist_sample

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not os.environ.get("TEST_BULK"), reason="`make test-bulk` runs the tests of a Ray cluster"),
]

COPIES = int(os.environ.get("TEST_BULK") or 40)
"""Of the 5,000 digits, each copy with another pixel changed. `TEST_BULK=200` scores 1,000,000 images."""

_PATIENCE = 900
"""Seconds. Ray takes half a minute to start, and several minutes on a busy machine."""


@pytest.fixture
def nodes() -> Iterator[subprocess.Popen[str]]:
    """Yield a cluster; its processes end with the test."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bulk.nodes"],
        cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.communicate(timeout=60)
        for child in children:
            if child.is_running():
                child.kill()


def read_line(process: subprocess.Popen[str]) -> str:
    """Return the next line of a process."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def bulk(*arguments: str | Path, log: Path) -> subprocess.Popen[bytes]:
    """Start `anomaly bulk`; both of its streams go to a file."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "anomaly.cli", "bulk", *map(str, arguments), "--model", "zero-article"],
            cwd=ROOT, env=environment(), stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip


def write_input(folder: Path) -> None:
    """Write digits with known mutations as npy files of 20,000 images, and three files that cannot be scored."""
    digits = mnist_sample().images
    folder.mkdir()
    for number in range(COPIES // 4):
        copies = [digits.copy() for _ in range(4)]
        for place, images in enumerate(copies):
            pixel = (4 * number + place) * 7 % 784
            images.reshape(-1, 784)[:, pixel] ^= 0xFF
        np.save(folder / f"{number:02}.npy", np.concatenate(copies))
    (folder / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "damaged.tar").write_bytes(b"x" * 2000)
    np.save(folder / "floats.npy", np.zeros((3, 28, 28), np.float32))


def test_rows_are_exact_after_a_node_and_the_driver_are_killed(
    tmp_path: Path, nodes: subprocess.Popen[str], request: pytest.FixtureRequest
) -> None:
    """A node and the driver are killed in the middle; the resumed run has each row of a run in the process once."""
    write_input(tmp_path / "in")
    log = tmp_path / "log"
    address = read_line(nodes)
    output, checkpoint = tmp_path / "out", tmp_path / "out.checkpoint"
    arguments = (tmp_path / "in", output, "--address", address, "--workers", "2")

    def committed() -> int:
        return len([path for path in checkpoint.rglob("*.parquet") if "pending" not in path.name])

    driver = bulk(*arguments, log=log)
    request.addfinalizer(lambda: (driver.kill(), driver.wait()))
    running = lambda: driver.poll() is None or pytest.fail(f"the driver has ended:\n{log.read_text()}")  # noqa: E731
    wait_until(lambda: running() and committed() >= 1, _PATIENCE, describe=log.read_text)
    assert nodes.stdin is not None
    nodes.stdin.write("kill\n")
    nodes.stdin.flush()
    assert read_line(nodes) == "killed"
    before = committed()
    wait_until(lambda: running() and committed() > before, _PATIENCE, describe=log.read_text)
    driver.kill()
    driver.wait()
    resumed_from = 0
    for path in output.glob("*.parquet"):
        with contextlib.suppress(pa.ArrowInvalid):  # a file that was being written: the resumed run must replace it
            resumed_from += len(pq.read_table(path))
    assert 0 < resumed_from < 5_000 * COPIES

    assert bulk(*arguments, log=log).wait(_PATIENCE) == 0, log.read_text()
    assert bulk(tmp_path / "in", tmp_path / "here", "--quiet", log=log).wait(_PATIENCE) == 0, log.read_text()
    found, expected = (pq.read_table(folder).sort_by("id") for folder in (output, tmp_path / "here"))
    assert len(expected) == 5_000 * COPIES + 3
    assert found.column("id").equals(expected.column("id"))
    for name in set(expected.column_names) - {"mse"}:
        assert found.column(name).equals(expected.column(name)), name
    difference = np.abs(found.column("mse").to_numpy() - expected.column("mse").to_numpy())
    assert np.nanmax(difference) <= 1e-5
    assert found.column("error").null_count == 5_000 * COPIES
