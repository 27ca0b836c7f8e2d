"""Score with a service."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from anomaly import NO_RETRY, Client, Model, Problem, Retry
from anomaly.cli.formats import Result
from anomaly.cli.scoring import Connection, Verdict
from anomaly.cli.sources import Source
from anomaly.client.environment import api_key


class Remote:
    """Scores with the service at a URL.

    Attributes:
        fit: how images are prepared: the option, else that of the model's current version.

    Raises:
        ServiceError: there is no service at the address.
        ValueError: the address or the key is not valid.
    """

    def __init__(self, connection: Connection, verdict: Verdict) -> None:
        key = api_key(connection.key_file)
        # A wrong address is an error at once. Retries are for a service that was reached before.
        known: tuple[Model, ...] = ()
        with Client(connection.url, api_key=key, retry=NO_RETRY) as once, suppress(Problem):
            known = once.models()
        self._client = Client(connection.url, api_key=key, retry=Retry(patience=connection.patience))
        self.fit: str = verdict.fit or _default_fit(known, verdict.model)
        self._verdict, self._concurrency = verdict, connection.concurrency

    def results(self, sources: Iterable[Source]) -> Iterator[Result]:
        """Yield the result of each image, in order.

        Raises:
            ServiceError: an error that every other image would meet too.
        """
        names: deque[str] = deque()

        def images() -> Iterator[Path | bytes]:
            for source in sources:
                names.append(source.name)
                yield source.image

        verdict = self._verdict
        outcomes = self._client.score_many(
            images(), model=verdict.model, alpha=verdict.alpha, fit=verdict.fit, concurrency=self._concurrency
        )
        for outcome in outcomes:
            yield Result(names.popleft(), outcome)

    def calibration_size(self, model: str, version: int) -> int:
        """Return the number of calibration scores of a version that has scored an image.

        Raises:
            ServiceError: the service does not reply.
        """
        return self._client.calibration(f"{model}@{version}").n

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _default_fit(known: Iterable[Model], reference: str | None) -> str:
    name = None if reference is None else reference.partition("@")[0]
    model = next((each for each in known if (each.is_default if name is None else each.name == name)), None)
    return (model and model.fit) or "strict"
