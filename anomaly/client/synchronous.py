"""The blocking client. Threads may share it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator, Iterable
from types import TracebackType

import httpx

from anomaly.client import images as forms
from anomaly.client import parallel, wire
from anomaly.client.errors import ConnectionFailed, Problem, ServiceError
from anomaly.client.images import Array, Image
from anomaly.client.replies import Calibration, Model, Readiness, Score, Validity
from anomaly.client.retry import Retry
from anomaly.client.tracing import traced


class Client:
    """A client of one service. Use it in a `with` statement, or call `close`.

    Args:
        url: address of the service, with the gateway's path prefix if there is one: `https://host/anomaly`.
            Default: `ANOMALY_URL`, else `http://127.0.0.1:8000`.
        api_key: API key, sent as `X-API-Key`. Default: the key of `ANOMALY_KEY_FILE` or `ANOMALY_KEY` if `url` is
            not given either, else none.
        timeout: seconds after which a silent service is a timeout.
        retry: when to repeat a request; `NO_RETRY` for never.

    Raises:
        ValueError: the address, the key, or a variable of the environment is not valid.
    """

    def __init__(
        self, url: str | None = None, *, api_key: str | None = None, timeout: float = 10.0, retry: Retry | None = None
    ) -> None:
        self._http = httpx.Client(**wire.options(url, api_key, timeout))
        self._retry = retry or Retry()
        self._never = threading.Event()
        self._connected = False
        self._closed = False

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        self._http.close()

    def score(
        self, image: Image, *, model: str | None = None, alpha: float | None = None, fit: wire.Fit | None = None
    ) -> Score:
        """Score one image.

        Args:
            image: a PNG as a path, bytes or a binary file object, a numpy array of type uint8 and shape [28, 28],
                or a Pillow image.
            model: `name` or `name@version`. Default: the service's default model.
            alpha: false-positive rate of this verdict. Default: that of the model version.
            fit: `mnist` accepts any size; the service crops, scales and centres the strokes as MNIST does. `resize`
                repeats the preparation of the training images, `strict` changes nothing. Default: what the version was
                trained with.

        Raises:
            ServiceError: there is no score; the subclass states the reason.
            TypeError: the image is not one of these forms.
        """
        return self._score(image, model, alpha, fit, self._never)

    def score_many(
        self,
        images: Iterable[Image],
        *,
        model: str | None = None,
        alpha: float | None = None,
        fit: wire.Fit | None = None,
        concurrency: int = 8,
        on_progress: parallel.Progress | None = None,
    ) -> Generator[Score | ServiceError, None, None]:
        """Score images concurrently. Yields the results in the order of `images`, each as soon as it is available.

        An error that concerns one image (not a PNG, wrong size, unreadable file) is yielded as its result. An error
        that every other image would meet too (no service, unknown model, missing key) is raised.

        Args:
            images: images as for `score`. They are read when they are needed, up to twice `concurrency` ahead of the
                results, so a generator of a million files is fine. If the iterable raises, the results of the images
                before that are yielded first.
            model: as for `score`.
            alpha: as for `score`.
            fit: as for `score`.
            concurrency: maximum number of concurrent requests.
            on_progress: called after each image with the number of finished images, and the number of all images if
                `images` has a length.

        Raises:
            ServiceError: the service is not available, or rejects every image.
        """

        def call(image: Image, stop: threading.Event) -> Score:
            return self._score(image, model, alpha, fit, stop)

        return parallel.with_threads(call, images, concurrency, on_progress)

    def score_array(
        self, images: Array, *, model: str | None = None, alpha: float | None = None
    ) -> list[Score | Problem]:
        """Score an array of images with batch requests; the service stores no reconstructions of them.

        Args:
            images: a numpy array of type uint8 and shape [N, 28, 28].
            model: as for `score`.
            alpha: as for `score`.

        Returns:
            One score per image, in order; a `Problem` in place of a score that could not be computed.

        Raises:
            ServiceError: the batch was not scored; the subclass states the reason.
            TypeError: the array has another type or shape.
        """
        results: list[Score | Problem] = []
        for request in wire.batch_requests(images, model, alpha):
            results += wire.batch_reply(self._request(request))
        return results

    def reconstruction(self, score: Score | str, *, view: wire.View = "reconstruction", scale: int = 1) -> bytes:
        """Return a picture of a score as a PNG.

        Args:
            score: result of `score`, or its id.
            view: which picture.
            scale: pixels per side for one pixel of the image, 1 to 16.

        Raises:
            ReconstructionNotFound: the id is unknown or has expired.
            ServiceError: there is no picture; the subclass states the reason.
            ValueError: the service stored no reconstruction of this score.
        """
        return wire.picture_reply(self._request(wire.reconstruction_request(score, view, scale)))

    def models(self) -> tuple[Model, ...]:
        """Return the models of the service."""
        return wire.models_reply(self._request(wire.MODELS_REQUEST))

    def model_card(self, model: str | None = None) -> str:
        """Return the model card of a version, as Markdown.

        Args:
            model: `name` or `name@version`. Default: the service's default model.
        """
        return self._request(wire.model_card_request(*self._version(model))).text

    def calibration(self, model: str | None = None) -> Calibration:
        """Return the calibration of a version: histogram, and the threshold of each false-positive rate.

        Args:
            model: `name` or `name@version`. Default: the service's default model.
        """
        return wire.calibration_reply(self._request(wire.calibration_request(*self._version(model))))

    def validity(self, model: str | None = None) -> Validity:
        """Return whether images still score like the calibration images of a model's current version.

        Args:
            model: name of a model. Default: the service's default model.
        """
        return wire.validity_reply(self._request(wire.validity_request(self._default() if model is None else model)))

    def ready(self) -> Readiness:
        """Return whether the service can score. The client sends one request, without retries.

        Raises:
            ConnectionFailed: nothing listens at the address.
        """
        return wire.readiness_reply(self._send(wire.READY_REQUEST))

    def _default(self) -> str:
        return next((each.name for each in self.models() if each.is_default), "")

    def _version(self, model: str | None) -> tuple[str, str]:
        name = self._default() if model is None else model
        name, _, version = name.partition("@")
        return name, version or wire.version_reply(self._request(wire.manifest_request(name)))

    def _score(
        self, image: Image, model: str | None, alpha: float | None, fit: wire.Fit | None, stop: threading.Event
    ) -> Score:
        return wire.score_reply(self._request(wire.score_request(forms.read(image), model, alpha, fit), stop))

    def _request(self, request: wire.Request, stop: threading.Event | None = None) -> httpx.Response:
        started = time.monotonic()
        for attempt in itertools.count():
            try:
                return wire.check(self._send(request))
            except ServiceError as error:
                if isinstance(error, ConnectionFailed) and not self._connected:
                    raise  # a wrong address is more likely than a service that is about to start
                wait = self._retry.wait(error, attempt, time.monotonic() - started)
                if wait is None or (stop or self._never).wait(wait):
                    raise
        raise AssertionError("unreachable")

    def _send(self, request: wire.Request) -> httpx.Response:
        try:
            response = self._http.request(**traced(request))
        except httpx.HTTPError as error:
            found = wire.transport_error(error, self._http.base_url)
            self._connected |= not isinstance(found, ConnectionFailed)
            raise found from error
        self._connected = True
        if self._closed:
            # A thread opened this connection while `close` ran, so httpx does not close it.
            response.extensions["network_stream"].close()
        return response
