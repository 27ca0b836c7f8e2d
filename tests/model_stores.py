"""Model stores for tests: copies of the shipped version under other numbers, and scoring modules that misbehave."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import torch

from app.inference.detector import torchscript_allowed
from tests.conftest import MODEL_STORE

SHIPPED = MODEL_STORE / "zero-article" / "1"
UNREADABLE = "x" * 300
"""A name that is longer than file systems allow, as the target of `link`."""


def copy(root: Path, *versions: int, current: int | None = None, name: str = "zero-article") -> Path:
    """Make a model store at `root` with copies of a shipped version: of the model `name`, or else `zero-article`."""
    shipped = MODEL_STORE / name / "1"
    for version in versions:
        folder = root / name / str(version)
        shutil.copytree(shipped if shipped.is_dir() else SHIPPED, folder)
        change(folder, version=version, name=name)
    promote(root, current or versions[-1], name)
    return root


def promote(root: Path, version: int, name: str = "zero-article") -> None:
    """Replace CURRENT by rename, as the command line does."""
    fresh = root / name / "CURRENT.new"
    fresh.write_text(f"{version}\n")
    fresh.rename(root / name / "CURRENT")


def link(path: Path, target: str | Path) -> Path:
    """Replace `path` by a symbolic link. With the target `UNREADABLE`, each access is an OSError, for root too."""
    fresh = path.with_name("link.new")
    fresh.symlink_to(target)
    return fresh.rename(path)


def change(folder: Path, **members: object) -> None:
    """Change members of a version's manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **members}))


def put_module(folder: Path, module: torch.nn.Module) -> None:
    """Replace a version's module, with its checksum; its golden scores stay those of the shipped one."""
    content = io.BytesIO()
    with torchscript_allowed():
        torch.jit.save(torch.jit.script(module), content)
    put_bytes(folder, content.getvalue())


def put_bytes(folder: Path, content: bytes) -> None:
    """Replace a version's module by any bytes, with their checksum."""
    (folder / "model.pt").write_bytes(content)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    change(folder, files={**files, "model.pt": hashlib.sha256(content).hexdigest()})


def hanging(root: Path) -> Path:
    """Make a model store at `root` with a version of `zero-article` that never returns for a white image."""
    store = copy(root, 1)
    with torchscript_allowed():
        shipped = torch.jit.load(SHIPPED / "model.pt")  # type: ignore[no-untyped-call]
    put_module(store / "zero-article" / "1", HangsOnWhite(shipped))
    return store


class Blind(torch.nn.Module):
    """A scoring module with the right outputs that ignores its input."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return zeros of the contract's shapes."""
        count = images.shape[0]
        picture = torch.zeros(count, 1, 28, 28)
        return picture.mean(dim=[1, 2, 3]), picture, picture.squeeze(1), torch.zeros(count, dtype=torch.int8)


class HangsOnWhite(torch.nn.Module):
    """A scoring module that never returns for an image whose first pixel is white; else as `scoring`."""

    def __init__(self, scoring: torch.nn.Module) -> None:
        super().__init__()
        self.scoring = scoring

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the scores, or loop for ever."""
        while bool((images[:, 0, 0, 0] == 255).any()):
            images = images.clone()
        mse, reconstruction, error_map, reason = self.scoring(images)
        return mse, reconstruction, error_map, reason


class RaisesOnWhite(torch.nn.Module):
    """A scoring module that raises for an image whose first pixel is white; else as `scoring`."""

    def __init__(self, scoring: torch.nn.Module) -> None:
        super().__init__()
        self.scoring = scoring

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the scores, or raise."""
        if bool((images[:, 0, 0, 0] == 255).any()):
            raise RuntimeError("white")
        mse, reconstruction, error_map, reason = self.scoring(images)
        return mse, reconstruction, error_map, reason
