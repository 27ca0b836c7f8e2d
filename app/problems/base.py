"""The problem types of requests and of the service."""

from __future__ import annotations

from pydantic_core import to_json

MEDIA_TYPE = "application/problem+json"
NO_STORE = "no-store"
"""`Cache-Control` of every reply that depends on the request body or on the state of the service."""


class Problem(Exception):
    """A request that fails.

    Args:
        detail: the cause in this request, without internal details.
        hint: what the client can do. Default: the hint of the class.
        cause: name of the cause in metric and log, for a 503 or 504: one of `app.telemetry.metrics.CAUSES`.
    """

    status = 500
    type = "/problems/internal-error"
    title = "Internal error"
    hint = "Try again. If the error persists, report the request id to the operator."
    retry_after: int | None = None
    cause = ""
    closes_connection = False
    """Whether the connection is closed, because the rest of the request body is not read."""

    def __init__(self, detail: str = "", *, hint: str | None = None, cause: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        if cause:
            self.cause = cause
        if hint is not None:
            self.hint = hint

    def document(self, instance: str | None = None) -> dict[str, str | int]:
        """Return the members of the document; `instance` contains the request id, if there is one."""
        document: dict[str, str | int] = {"type": self.type, "title": self.title, "status": self.status}
        if self.detail:
            document["detail"] = self.detail
        if self.hint:
            document["hint"] = self.hint
        if instance:
            document["instance"] = f"urn:request:{instance}"
        return document

    def headers(self) -> dict[str, str]:
        """Return the HTTP headers of the response."""
        headers = {"content-type": MEDIA_TYPE, "cache-control": NO_STORE}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        return headers


def render(problem: Problem, instance: str | None = None) -> bytes:
    """Return the JSON document of a problem."""
    return to_json(problem.document(instance))


_BODIES = (
    "Send the PNG as the body with Content-Type: image/png, or as the file `file` of a form. "
    "For /score/batch, send an npy array as application/x-npy, or PNGs as files `files` of a form."
)


class InternalError(Problem):
    """The service failed. The log contains the cause, under the request id."""


class MalformedRequest(Problem):
    """The request cannot be parsed."""

    status, type, title = 400, "/problems/malformed-request", "The request cannot be parsed"
    hint = "GET /openapi.json describes the requests of each route."


class EmptyBody(MalformedRequest):
    """The body is empty."""

    type, title = "/problems/empty-body", "The request body is empty"
    hint = _BODIES


class MalformedMultipart(MalformedRequest):
    """The body is not a valid multipart form, or does not have the boundary of its Content-Type."""

    type, title = "/problems/malformed-multipart", "The multipart form cannot be parsed"
    hint = _BODIES


class MissingFile(MalformedRequest):
    """The form has no file in the field that the route reads."""

    type, title = "/problems/missing-file", "The form has no file in the expected field"
    hint = "Send the file in the field `file` for /score, and in `files` for /score/batch."


class TooManyFiles(MalformedRequest):
    """The form has more than one file, or more than 16 parts."""

    type, title = "/problems/too-many-files", "The form has more than one file"
    hint = "Send one image per request, or several to /score/batch."


class MalformedArray(MalformedRequest):
    """The body is not a valid npy file."""

    type, title = "/problems/malformed-array", "The npy array cannot be parsed"
    hint = "Send a file written by numpy.save, of a uint8 array of shape [N, 28, 28]."


class Unauthorized(Problem):
    """The API key is missing or unknown."""

    status, type, title = 401, "/problems/unauthorized", "A valid API key is required"
    hint = "Send a valid key in the header X-API-Key. The operator issues keys."

    def headers(self) -> dict[str, str]:
        """Return the headers with the challenge that 401 requires (RFC 9110, 15.5.2)."""
        return {**super().headers(), "www-authenticate": 'ApiKey realm="score"'}

    closes_connection = True


class HostNotAllowed(Problem):
    """The service does not answer requests with this header Host, or requests of pages of this Origin."""

    status, type, title = 403, "/problems/host-not-allowed", "The host or the origin of the request is not allowed"
    hint = (
        "Use the IP address of the service or localhost, or let the operator add the host name to "
        "ANOMALY_ALLOWED_HOSTS."
    )
    closes_connection = True


class NotFound(Problem):
    """No route or file has this path."""

    status, type, title = 404, "/problems/not-found", "The path does not exist"
    hint = "GET /docs lists all routes."


class ModelNotFound(NotFound):
    """The model version is not in the model store, or its files are damaged."""

    type, title = "/problems/model-not-found", "The model version does not exist"
    hint = "GET /models lists the models and versions. The parameter `model` is `name` or `name@version`."


class ReconstructionNotFound(NotFound):
    """The id is unknown, has expired, or belongs to another API key."""

    type, title = "/problems/reconstruction-not-found", "The reconstruction does not exist or has expired"
    hint = "Score the image again, and fetch the reconstruction within its time to live."


class MethodNotAllowed(Problem):
    """The path does not support the method of the request."""

    status, type, title = 405, "/problems/method-not-allowed", "The path does not support this method"
    hint = "The header Allow lists the supported methods."

    def __init__(self, detail: str = "", allow: str = "") -> None:
        super().__init__(detail)
        self.allow = allow

    def headers(self) -> dict[str, str]:
        """Return the headers with the methods that the path supports (RFC 9110, 15.5.6)."""
        return {**super().headers(), **({"allow": self.allow} if self.allow else {})}


class NotAcceptable(Problem):
    """The route offers none of the media types that the header Accept allows."""

    status, type, title = 406, "/problems/not-acceptable", "The route offers no acceptable media type"
    hint = "Send an Accept header with one of the offered types, or no Accept header."


class BodyTimeout(Problem):
    """The body did not arrive in time."""

    status, type, title = 408, "/problems/body-timeout", "The request body did not arrive in time"
    hint = "Send the body without pauses."
    closes_connection = True


class BodyTooLarge(Problem):
    """The body, or a file in it, exceeds the limit of the route."""

    status, type, title = 413, "/problems/body-too-large", "The request body is too large"
    hint = "A 28x28 PNG has a few hundred bytes. Send fewer or smaller images per request."
    closes_connection = True


class UnsupportedMediaType(Problem):
    """The route does not accept the content type of the body."""

    status, type, title = 415, "/problems/unsupported-media-type", "The route does not accept this content type"
    hint = _BODIES


class UnsupportedEncoding(UnsupportedMediaType):
    """The service does not decode the Content-Encoding of the body."""

    type, title = "/problems/unsupported-encoding", "The content encoding is not supported"
    hint = "Send the body with the Content-Encoding gzip or deflate, or without Content-Encoding."

    def headers(self) -> dict[str, str]:
        """Return the headers with the encodings that the service decodes (RFC 9110, 15.5.16)."""
        return {**super().headers(), "accept-encoding": "gzip, deflate"}


class InvalidParameter(Problem):
    """A parameter in the query or in the form is unknown, is given twice, or has an invalid value."""

    status, type, title = 422, "/problems/invalid-parameter", "A parameter is invalid"
    hint = "GET /docs lists the parameters and their values."


class UnsupportedAlpha(InvalidParameter):
    """The calibration has too few images for the requested false-positive rate."""

    type, title = "/problems/unsupported-alpha", "The calibration does not support this false-positive rate"
    hint = "Request a larger alpha. GET /models/{name} returns the number of calibration images as `calibration.n`."


class ModelUnavailable(Problem):
    """The model version is not loaded: it was rejected, or is being retired."""

    status, type, title = 503, "/problems/model-unavailable", "The model version is not available"
    hint = "Try again after the seconds in Retry-After. GET /models or the log contains the reason of a rejection."
    retry_after = 5


class StoreUnavailable(Problem):
    """The reconstruction store does not reply. Scores are still returned, without ids."""

    status, type, title = 503, "/problems/store-unavailable", "The reconstruction store is not available"
    cause = "store_read"
    hint = "Try again after the seconds in Retry-After."
    retry_after = 5


class Overloaded(Problem):
    """A limit is reached: connections, queued images, batch requests, fitted images, loads or reads of versions."""

    status, type, title = 503, "/problems/overloaded", "The service is overloaded"
    hint = "Try again after the seconds in Retry-After."
    retry_after = 1


class DeadlineExceeded(Problem):
    """The reply was not ready before the deadline."""

    status, type, title = 504, "/problems/deadline-exceeded", "The deadline was exceeded"
    hint = "Try again. The service is busy, is loading the model version, or its model store does not respond."
    retry_after = 1
