"""Choose between scoring with a service and scoring offline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from anomaly import Fit, ServiceError
from anomaly.cli.formats import Result
from anomaly.cli.messages import Explain, explain
from anomaly.cli.sources import Source


@dataclass(frozen=True)
class Verdict:
    """The parameters of a verdict.

    Attributes:
        model: `name`, `name@version`, or None for the default model.
        alpha: false-positive rate, or None for that of the model version.
        fit: how an image becomes the model's input; None for the way that the version was trained with.
    """

    model: str | None
    alpha: float | None
    fit: Fit | None


@dataclass(frozen=True)
class Connection:
    """The parameters of a connection to a service.

    Attributes:
        url: address of the service.
        key_file: file with the API key, or None.
        concurrency: maximum number of concurrent requests.
        patience: seconds for which a request is retried.
    """

    url: str
    key_file: Path | None
    concurrency: int
    patience: float


class Scorer(Protocol):
    """Scores images with a service or on this machine.

    Attributes:
        fit: how images are prepared.
    """

    fit: str

    def results(self, sources: Iterable[Source]) -> Iterator[Result]:
        """Yield the result of each image, in order.

        Raises:
            ServiceError: an error that every other image would meet too.
        """

    def calibration_size(self, model: str, version: int) -> int:
        """Return the number of calibration scores of a version that has scored an image.

        Raises:
            ServiceError: the service does not reply.
        """

    def close(self) -> None:
        """Release connections."""


class _Explained:
    """A scorer whose errors have the words of the command."""

    def __init__(self, scorer: Scorer, words: Explain) -> None:
        self.fit = scorer.fit
        self._scorer = scorer
        self._words = words

    def results(self, sources: Iterable[Source]) -> Iterator[Result]:
        """Yield the result of each image, in order."""
        try:
            for result in self._scorer.results(sources):
                outcome = result.outcome
                yield replace(result, outcome=self._words(outcome)) if isinstance(outcome, ServiceError) else result
        except ServiceError as error:
            raise self._words(error) from error

    def calibration_size(self, model: str, version: int) -> int:
        """Return the number of calibration scores of a version that has scored an image."""
        return self._scorer.calibration_size(model, version)

    def close(self) -> None:
        """Release connections."""
        self._scorer.close()


def open_scorer(model_store: Path | None, connection: Connection, verdict: Verdict) -> Scorer:
    """Return an offline scorer if a model store is given, else one that uses the service.

    Raises:
        ServiceError: no service, no such version, or an option that the version does not support.
        ValueError: an option or a variable of the environment is not valid.
        NotInstalled: offline scoring needs the service's code.
    """

    def words(error: ServiceError) -> ServiceError:
        return explain(error, fit=verdict.fit, offline=model_store is not None)

    try:
        if model_store is None:
            from anomaly.cli.remote import Remote

            scorer: Scorer = Remote(connection, verdict)
        else:
            scorer = _offline(model_store, verdict)
    except ServiceError as error:
        raise words(error) from error
    return _Explained(scorer, words)


def _offline(model_store: Path, verdict: Verdict) -> Scorer:
    from anomaly.cli.checkout import service_code

    with service_code("offline scoring", "anomaly-api", "serve"):
        from anomaly.cli.offline import Offline
    return Offline(model_store, verdict)
