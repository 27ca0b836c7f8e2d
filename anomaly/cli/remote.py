"""Scores by asking a service."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from anomaly import NO_RETRY, Client, Problem, Retry
from anomaly.cli.files import Source
from anomaly.cli.formats import Result
from anomaly.cli.scorers import Ask, Verdict

KEY = "ANOMALY_KEY"


class KeyFileError(ValueError):
    """The file of the API key cannot be read."""


class Remote:
    """A service at a URL.

    Raises:
        ServiceError: nothing answers there, or something else does.
        ValueError: the URL or the key cannot be one.
    """

    def __init__(self, ask: Ask, verdict: Verdict) -> None:
        key = api_key(ask.key_file)
        # A wrong URL is said at once; only a service that was there before is waited for.
        with Client(ask.url, api_key=key, retry=NO_RETRY) as once, suppress(Problem):
            once.models()
        self._client = Client(ask.url, api_key=key, retry=Retry(patience=ask.patience))
        self._verdict, self._concurrency = verdict, ask.concurrency

    def results(self, sources: Iterable[Source]) -> Iterator[Result]:
        """Yield the result of each source, in order.

        Raises:
            ServiceError: what would befall every other image as well.
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

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def api_key(file: Path | None) -> str | None:
    """Return the key: from a file, or from the environment; never from the command line, which others can read.

    Raises:
        KeyFileError: the file cannot be read, or is empty.
    """
    if file is None:
        return os.environ.get(KEY) or None
    try:
        key = file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"the key file {file} cannot be read") from error
    if not key:
        raise KeyFileError(f"the key file {file} is empty")
    return key
