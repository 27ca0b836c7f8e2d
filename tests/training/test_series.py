"""The command `all`: parallel, resumable, and safe to interrupt."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from app.models.repository import Repository
from tests.training.conftest import CPU, MODEL_STORE, ROOT, small_job
from tests.waiting import wait_until
from training.__main__ import app
from training.pipeline.make import TrainingJob
from training.pipeline.series import Source, result_of, result_path
from training.pipeline.series import run as series
from training.publishing.publish import publish_copy
from training.recipes.contract import TrainingError
from training.recipes.table import RECIPES

ALL = ("-m", "training", "all", "--data", "mnist-5000", "--device", "cpu", "--alpha", "0.05")


def command(folder: Path, *arguments: str) -> list[str]:
    """Return the command with its result files in a folder of the test's own."""
    return [sys.executable, *ALL, "--results", str(folder / "results"), *arguments]


def run(folder: Path, *arguments: str) -> str:
    """Run the command to its end and return what it printed."""
    found = subprocess.run(
        command(folder, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=280, check=True
    )
    return found.stdout


def test_all_digits_are_ten_models(monkeypatch, tmp_path):
    """By default there is one job for every label and seed."""
    asked = []
    monkeypatch.setattr("training.pipeline.series.run", lambda jobs, *_, **__: asked.extend(jobs) or [])
    result = CliRunner().invoke(app, [*ALL[2:], "--recipe", "instant", "--seeds", "3,4", "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert [(job.seed, job.normal) for job in asked] == [(seed, (label,)) for seed in (3, 4) for label in range(10)]


def test_the_least_seed_answers(monkeypatch, draft, tmp_path):
    """The version of the lowest seed is promoted, in any order of completion."""
    monkeypatch.setattr(
        "training.pipeline.series.run",
        lambda jobs, *_, **__: ((job, result_of(draft, 1.0), draft) for job in jobs[::-1]),
    )
    options = ("--seeds", "2,1", "--normal", "0", "--publish", "--model-store", str(tmp_path))
    result = CliRunner().invoke(app, [*ALL[2:], *options, "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert Repository(tmp_path).versions("small") == [1, 2]
    assert Repository(tmp_path).current("small") == 2
    assert "published small@1\npublished small@2 (current)" in re.sub(
        "^.*AUROC.*\n", "", result.output, flags=re.MULTILINE
    )


def test_a_version_that_was_not_promoted_is_promoted_later(monkeypatch, draft, tmp_path):
    """If the disk is full after the publication, the error says what to do; the next run promotes the version."""
    made = iter([draft, None, None])
    monkeypatch.setattr("training.commands.series.model_name", lambda *_: "small")
    monkeypatch.setattr(
        "training.pipeline.series.run",
        lambda jobs, *_, **__: ((job, result_of(draft, 1.0), next(made)) for job in jobs),
    )
    monkeypatch.setattr("training.pipeline.make.TrainingJob.matches", lambda *_: True)

    def fill_the_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = tmp_path / "store"
    options = [*ALL[2:], "--normal", "0", "--publish", "--model-store", str(store), "--results", str(tmp_path / "out")]
    with monkeypatch.context() as full:
        full.setattr("training.publishing.publish.write_current", fill_the_disk)
        result = CliRunner().invoke(app, options)
        assert result.exit_code == 2
        assert "small@1 is published, but is not the current version: [Errno 28]" in " ".join(result.output.split())
    assert Repository(store).current("small") is None
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert "promoted small@1" in result.output
    assert (Repository(store).versions("small"), Repository(store).current("small")) == ([1], 1)
    draft.publish(store, promote=True)
    output = CliRunner().invoke(app, options).output
    assert "small@2 is current, not small@1; to change that: anomaly promote small 1" in " ".join(output.split())
    assert Repository(store).current("small") == 2


@pytest.mark.long
def test_models_are_made_kept_and_published(tmp_path):
    """A series publishes versions and writes results; a second run creates only missing ones.

    With `--publish`, a job is run again if its version is missing, even if its result file exists. Reports compare with
    the article's model of the same label if the store contains it.
    """
    store = ("--recipe", "instant", "--normal", "0,1,2", "--publish", "--model-store", str(tmp_path / "store"))
    publish_copy(tmp_path / "store", MODEL_STORE / "zero-article" / "1", promote=True)
    out = run(tmp_path, *store)
    files = sorted((tmp_path / "results").glob("*.json"))
    rows = [json.loads(path.read_text()) for path in files]
    assert [row["normal"] for row in rows] == [[0], [1], [2]]
    assert all(row["auroc"] > 0.9 for row in rows)
    last = out.splitlines()[-1].split()
    assert last[:2] == ["mean", "3"]
    assert float(last[2]) == round(100 * sum(row["auroc"] for row in rows) / 3, 2)
    repository = Repository(tmp_path / "store")
    assert repository.current("zero-instant") == repository.current("two-instant") == 1
    with_article, without = (
        repository.read(repository.manifest(name, 1), "report/kinds.png") for name in ("zero-instant", "one-instant")
    )
    assert height(with_article) > 1.2 * height(without)

    shutil.rmtree(tmp_path / "store" / "one-instant")
    kept = files[2].read_text()
    files[2].unlink()
    out = run(tmp_path, *store)
    assert out.count("(from its result file)") == 1
    assert "published one-instant@1 (current)" in out
    assert repository.versions("zero-instant") == [1]
    assert repository.versions("two-instant") == [1, 2]
    again = json.loads(files[2].read_text())
    assert again["auroc"] == json.loads(kept)["auroc"]


def height(png: bytes) -> int:
    """Return a picture's height in pixels."""
    with Image.open(io.BytesIO(png)) as picture:
        return picture.height


@pytest.mark.long
def test_an_interruption_keeps_what_is_finished(tmp_path):
    """Ctrl-C exits with 130, and leaves no process and no incomplete file."""
    arguments = ("--recipe", "instant", "--jobs", "2")
    process = subprocess.Popen(
        command(tmp_path, *arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "AUROC" in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted; no incomplete files were left behind\n"
    wait_for_the_end_of(process.pid)
    finished = sorted((tmp_path / "results").iterdir())
    assert 1 <= len(finished) < 10
    assert all(json.loads(path.read_text())["normal"] for path in finished)


ENDLESS = """
import sys
from pathlib import Path
from tests.training.conftest import MODEL_STORE, small_job
from training.pipeline import series
from training.data.loaders import load

source = series.Source("mnist-5000", None, MODEL_STORE)
jobs, tell = [small_job(epochs=1_000_000)], lambda *_: print("an epoch", flush=True)
list(series.run(jobs, load(source.data), source, Path(sys.argv[1]), processes=1, on_epoch=tell))
"""


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """After `kill -9` of the command, all its processes exit."""
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"an epoch\n"
            process.kill()
            process.wait(60)
            wait_for_the_end_of(process.pid)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_result_is_of_one_recipe_and_one_seed(tmp_path):
    """Another parameter, seed, alpha, label or data set has another result file; another name has the same."""
    recipe = RECIPES["deep"]
    job = TrainingJob("a", recipe, (0,), seed=0, alpha=0.01, confidence=None, device=CPU)
    others = [
        TrainingJob("a", recipe.with_epochs(3), (0,), seed=0, alpha=0.01, confidence=None, device=CPU),
        TrainingJob("a", recipe, (0,), seed=1, alpha=0.01, confidence=None, device=CPU),
        TrainingJob("a", recipe, (0,), seed=0, alpha=0.05, confidence=None, device=CPU),
        TrainingJob("a", recipe, (1,), seed=0, alpha=0.01, confidence=None, device=CPU),
    ]
    names = {result_path(each, "d", tmp_path).name for each in [job, *others]} | {result_path(job, "e", tmp_path).name}
    assert len(names) == 6
    same = TrainingJob("b", recipe.with_epochs(None), (0,), seed=0, alpha=0.01, confidence=None, device=CPU)
    assert result_path(job, "d", tmp_path) == result_path(same, "d", tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"recipe": "deep", "seed', b"\xff\xff"])
def test_a_damaged_result_is_named(digits, tmp_path, content):
    """The error for a damaged result file contains its path, and the file is unchanged."""
    job = small_job()
    path = result_path(job, digits.sha256, tmp_path)
    path.write_bytes(content)
    source = Source("mnist-5000", None, tmp_path)
    with pytest.raises(TrainingError, match=f"{path} is damaged; delete it"):
        next(series([job], digits, source, tmp_path, processes=1, on_epoch=lambda *_: None))
    assert path.read_bytes() == content


def wait_for_the_end_of(group: int) -> None:
    """Wait until a process group has no process; fail after 20 seconds."""

    def has_ended() -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(has_ended, 20)
