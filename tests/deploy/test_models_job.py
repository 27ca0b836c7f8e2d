"""The script that fills the volume of the models: the one of docker-compose.yml, which the Kubernetes Job has too."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
import yaml

from tests.conftest import ROOT
from tests.model_stores import copy
from tests.waiting import wait_until
from training.publishing.files import locked

NAME = "zero-article"


class Job:
    """The script with a model store of the image and a volume in `folder`, and programs that go before the usual ones.

    Attributes:
        image: the model store of the image.
        volume: the empty volume.
    """

    def __init__(self, folder: Path) -> None:
        self.image, self.volume, self._programs = copy(folder / "image", 1), folder / "volume", folder / "bin"
        self.volume.mkdir()
        self._programs.mkdir()
        compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
        *self._shell, script = compose["services"]["models"]["command"]
        script = script.replace("$$", "$").replace("/srv/model_store", str(self.image))
        self._script = script.replace("/models", str(self.volume))

    def put_cp(self, lines: str) -> None:
        """Let `lines` be executed instead of `cp`."""
        program = self._programs / "cp"
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)

    def remove_cp(self) -> None:
        """Let `cp` be the usual program again."""
        (self._programs / "cp").unlink()

    def start(self) -> subprocess.Popen[str]:
        """Start the script."""
        environment = {**os.environ, "PATH": f"{self._programs}:{os.environ['PATH']}"}
        return subprocess.Popen([*self._shell, self._script], env=environment, stderr=subprocess.PIPE, text=True)

    def run(self) -> tuple[int, str]:
        """Run the script, and return its exit code and standard error."""
        process = self.start()
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    def missing(self) -> set[str]:
        """Return the files of the image that the volume does not contain, or with another content."""
        files = [path for path in self.image.rglob("*") if path.is_file()]
        copies = {path: self.volume / path.relative_to(self.image) for path in files}
        return {
            str(path.relative_to(self.image))
            for path, copied in copies.items()
            if not copied.is_file() or copied.read_bytes() != path.read_bytes()
        }


def test_the_job_fills_an_empty_volume(tmp_path: Path) -> None:
    """Versions and CURRENT are copied without leftovers; a second run keeps the choice of the current version."""
    job = Job(tmp_path)
    assert job.run() == (0, "")
    assert job.missing() == set()
    assert {path.name for path in (job.volume / NAME).iterdir()} == {"1", "CURRENT"}
    (job.volume / NAME / "CURRENT").write_text("7\n")
    assert job.run() == (0, "")
    assert (job.volume / NAME / "CURRENT").read_text() == "7\n"


def test_a_copy_of_current_that_fails_is_completed_by_the_next_run(tmp_path: Path) -> None:
    """A full disk leaves no empty CURRENT; the next run writes it, also over an empty one of an earlier release."""
    job = Job(tmp_path)
    job.put_cp('case "$1" in */CURRENT) : > "$2"; echo "no space" >&2; exit 1;; esac; exec /bin/cp "$@"')
    assert job.run() == (1, "no space\n")
    assert job.missing() == {f"{NAME}/CURRENT"}
    assert not (job.volume / NAME / "CURRENT").exists()
    job.remove_cp()
    assert job.run() == (0, "")
    assert job.missing() == set()
    (job.volume / NAME / "CURRENT").write_text("")
    assert job.run() == (0, "")
    assert job.missing() == set()


def test_a_version_that_appears_during_the_copy_stays_as_it_is(tmp_path: Path) -> None:
    """If another program publishes the version that the job is copying, the job fails and adds nothing to it."""
    job = Job(tmp_path)
    published = job.volume / NAME / "1"
    job.put_cp(f'/bin/cp "$@"; mkdir "{published}"; echo other > "{published}/manifest.json"')
    code, errors = job.run()
    assert code == 1 and "mv: " in errors
    assert [path.name for path in published.iterdir()] == ["manifest.json"]
    job.remove_cp()
    code, errors = job.run()
    assert code == 0 and f"{NAME}/1 of the image is not copied" in errors
    assert [path.name for path in published.iterdir()] == ["manifest.json"]


def test_the_job_waits_for_the_lock_of_the_store(tmp_path: Path) -> None:
    """While another program holds the lock, the job changes nothing; then it fills the volume."""
    job = Job(tmp_path)
    with locked(job.volume):
        process = job.start()
        children = psutil.Process(process.pid).children
        wait_until(lambda: process.poll() is not None or "flock" in {child.name() for child in children()})
        assert process.poll() is None
        assert list(job.volume.iterdir()) == []
    assert process.communicate(timeout=60) == (None, "")
    assert process.returncode == 0
    assert job.missing() == set()
