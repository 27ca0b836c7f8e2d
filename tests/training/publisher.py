"""Publish a version in a separate process, once or with a kill at every step; run by test_publish.

    python -m tests.training.publisher once MODEL_STORE VERSION_FOLDER
    python -m tests.training.publisher killed MODEL_STORE VERSION_FOLDER

`killed` forks a publisher for every call that it makes to the disk and lets it kill itself just before that call. It
prints, as a JSON line for each, what the store holds afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.models.manifest import Manifest
from app.models.repository import Repository
from training.publishing.publish import publish

DISK_CALLS = ("mkdir", "fsync", "rename", "replace", "open")


def load(folder: Path) -> tuple[Manifest, dict[str, bytes]]:
    """Read a finished version that was laid out in `folder`."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "draft.json"]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return Manifest.model_validate_json((folder / "draft.json").read_text()), files


def die_before(call: int) -> None:
    """Kill this process just before its `call`-th call to the disk."""
    left = iter(range(call, -1, -1))

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            if next(left, None) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)

        return run

    for name in DISK_CALLS:
        setattr(os, name, counted(getattr(os, name)))


def in_fork(work: Callable[[], Any]) -> int:
    """Run `work` in a fork, and return its wait status: 0 for success, the signal's number if it was killed."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(process, 0)[1]


def killed_everywhere(store: Path, draft: Manifest, files: dict[str, bytes]) -> Iterator[dict[str, Any]]:
    """Publish to copies of the store, killed before the first call to the disk, the second, and so on."""
    for call in range(1000):
        copy = store.with_name(f"{store.name}-{call}")
        shutil.copytree(store, copy)

        def work(call: int = call, copy: Path = copy) -> None:
            die_before(call)
            publish(copy, draft, files, promote=True)

        status = in_fork(work)
        killed = os.WIFSIGNALED(status)
        found = {"call": call, "killed": killed, "status": status, **state(copy, draft.name)}
        found["again"] = in_fork(lambda copy=copy: publish(copy, draft, files))
        found["after"] = state(copy, draft.name)
        yield found
        shutil.rmtree(copy)
        if not killed:
            return


def state(store: Path, name: str) -> dict[str, Any]:
    """Return the current version and all versions, each opened and compared with its checksums."""
    repository = Repository(store)
    versions = repository.versions(name)
    for version in versions:
        manifest = repository.open(name, version).manifest
        for file in manifest.files:
            repository.read(manifest, file)
    hidden = any(path.name.startswith(".") for path in store.rglob("*"))
    return {"versions": versions, "current": repository.current(name), "hidden": hidden}


if __name__ == "__main__":
    mode, root, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    loaded, contents = load(folder)
    if mode == "once":
        sys.stdout.write(f"{publish(root, loaded, contents).version}\n")
    else:
        for line in killed_everywhere(root, loaded, contents):
            sys.stdout.write(json.dumps(line) + "\n")
