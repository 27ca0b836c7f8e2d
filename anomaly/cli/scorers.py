"""What a scorer is told and what it does, whether it asks a service or scores on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from anomaly import Fit
from anomaly.cli.files import Source
from anomaly.cli.formats import Result


@dataclass(frozen=True)
class Verdict:
    """How to judge.

    Attributes:
        model: `name`, `name@version`, or None for the default model.
        alpha: another false-alarm rate than the model's own, or None.
        fit: how an image is made into the model's input.
    """

    model: str | None
    alpha: float | None
    fit: Fit


@dataclass(frozen=True)
class Ask:
    """Which service to ask, and how.

    Attributes:
        url: of the service.
        key_file: file with the API key, or None.
        concurrency: most requests under way at once.
        patience: seconds for which one image is tried again while the service is busy or away.
    """

    url: str
    key_file: Path | None
    concurrency: int
    patience: float


class Scorer(Protocol):
    """Whatever scores: a service, or a version on this machine."""

    def results(self, sources: Iterable[Source]) -> Iterator[Result]:
        """Yield the result of each source, in order.

        Raises:
            ServiceError: what would befall every other image as well.
        """

    def close(self) -> None:
        """Let go of what it holds."""
