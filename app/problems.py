"""Every way a request can fail, and how that is said (RFC 9457). Knows no framework.

    Problem
    ├── MalformedRequest        400  EmptyBody, MalformedMultipart, MissingFile, TooManyFiles,
    │                                MalformedArray
    ├── Unauthorized            401
    ├── NotFound                404  ModelNotFound, ReconstructionNotFound
    ├── MethodNotAllowed        405
    ├── NotAcceptable           406
    ├── BodyTimeout             408
    ├── BodyTooLarge            413
    ├── UnsupportedMediaType    415  UnsupportedEncoding
    ├── InvalidImage            422  NotAPng, TruncatedPng, CorruptPng, AnimatedPng, WrongSize, ImageTooLarge,
    │                                ExtremeShape, NotGrey, LowBitDepth, Transparent, BlankImage, AmbiguousImage,
    │                                UnsupportedFormat, CorruptImage, AnimatedImage, WrongArray
    ├── InvalidParameter        422  UnsupportedAlpha
    ├── InternalError           500
    ├── ModelUnavailable        503
    ├── StoreUnavailable        503
    ├── Overloaded              503  with Retry-After
    └── DeadlineExceeded        504

The last part of `type` is stable: clients branch on it. `docs/api.md` explains each.
"""

from __future__ import annotations

from http import HTTPStatus

from pydantic_core import to_json

MEDIA_TYPE = "application/problem+json"
NO_STORE = "no-store"
"""`Cache-Control` of every reply that depends on the request body or on the state of the service."""


class Problem(Exception):
    """A request that cannot be answered as asked.

    Args:
        detail: what is wrong with this request, without internal details.
        hint: what the client can do about this request. Default: the hint of the class.
    """

    status = 500
    type = "/problems/internal-error"
    title = "Something went wrong inside the service"
    hint = "Try again; if it stays, tell the operator the request id."
    retry_after: int | None = None
    closes_connection = False
    """Whether the rest of the request's body is not read, so that the connection cannot be used again."""

    def __init__(self, detail: str = "", *, hint: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        if hint is not None:
            self.hint = hint

    def document(self, instance: str | None = None) -> dict[str, str | int]:
        """Return the problem's members; `instance` is the request id, when there is one."""
        document: dict[str, str | int] = {"type": self.type, "title": self.title, "status": self.status}
        if self.detail:
            document["detail"] = self.detail
        if self.hint:
            document["hint"] = self.hint
        if instance:
            document["instance"] = f"urn:request:{instance}"
        return document

    def headers(self) -> dict[str, str]:
        """Return the HTTP headers that go with the problem."""
        headers = {"content-type": MEDIA_TYPE, "cache-control": NO_STORE}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        return headers


def render(problem: Problem, instance: str | None = None) -> bytes:
    """Return a problem as the bytes of its JSON document."""
    return to_json(problem.document(instance))


_BODIES = (
    "Send the PNG as the body with Content-Type: image/png, or as the file `file` of a form; "
    "to /score/batch, an npy array as application/x-npy, or PNGs as files `files` of a form."
)


class InternalError(Problem):
    """The service failed. What happened is in the log under the request id, not in the reply."""


class MalformedRequest(Problem):
    """The request cannot be read."""

    status, type, title = 400, "/problems/malformed-request", "The request cannot be read"
    hint = "GET /openapi.json says what every route reads."


class EmptyBody(MalformedRequest):
    """There is no body."""

    type, title = "/problems/empty-body", "The request has no body"
    hint = _BODIES


class MalformedMultipart(MalformedRequest):
    """The body is not the multipart form that its Content-Type declares."""

    type, title = "/problems/malformed-multipart", "The multipart form cannot be read"
    hint = _BODIES


class MissingFile(MalformedRequest):
    """The form has no file in the field that the route reads."""

    type, title = "/problems/missing-file", "The form has no file in the expected field"
    hint = "Name the field `file` for /score, and `files` for /score/batch."


class TooManyFiles(MalformedRequest):
    """The form has more than one image."""

    type, title = "/problems/too-many-files", "The form has more than one file"
    hint = "Send one image per request, or several to /score/batch."


class MalformedArray(MalformedRequest):
    """The body is not the npy file that its Content-Type declares."""

    type, title = "/problems/malformed-array", "The npy array cannot be read"
    hint = "Send a file that numpy.save writes for a uint8 array of shape [N, 28, 28]."


class Unauthorized(Problem):
    """No API key, or one that is not known."""

    status, type, title = 401, "/problems/unauthorized", "An API key is needed"
    hint = "Send a key that the operator gave you in the header X-API-Key."

    def headers(self) -> dict[str, str]:
        """Return the headers with the challenge that 401 requires (RFC 9110, 15.5.2)."""
        return {**super().headers(), "www-authenticate": 'ApiKey realm="score"'}

    closes_connection = True


class NotFound(Problem):
    """Nothing answers at this path."""

    status, type, title = 404, "/problems/not-found", "There is nothing at this path"
    hint = "GET /docs lists every route."


class ModelNotFound(NotFound):
    """The model or version is not in the model store."""

    type, title = "/problems/model-not-found", "There is no such model version"
    hint = "GET /models lists what is served; ask for `name` or `name@version`."


class ReconstructionNotFound(NotFound):
    """The id was never given out, or its time is over."""

    type, title = "/problems/reconstruction-not-found", "There is no such reconstruction, or it has expired"
    hint = "Score the image again and fetch the reconstruction before it expires."


class MethodNotAllowed(Problem):
    """The path exists, the method does not."""

    status, type, title = 405, "/problems/method-not-allowed", "This path does not answer that method"
    hint = "The header Allow lists the methods that it answers."

    def __init__(self, detail: str = "", allow: str = "") -> None:
        super().__init__(detail)
        self.allow = allow

    def headers(self) -> dict[str, str]:
        """Return the headers with the methods that the path does answer (RFC 9110, 15.5.6)."""
        return {**super().headers(), **({"allow": self.allow} if self.allow else {})}


class NotAcceptable(Problem):
    """The route offers none of the media types that the header Accept allows."""

    status, type, title = 406, "/problems/not-acceptable", "The route offers no acceptable media type"
    hint = "Send an Accept header with one of the offered types, or none."


class BodyTimeout(Problem):
    """The body did not arrive in time."""

    status, type, title = 408, "/problems/body-timeout", "The request body took too long to arrive"
    hint = "Send the whole body at once."
    closes_connection = True


class BodyTooLarge(Problem):
    """The body is above the limit of its route."""

    status, type, title = 413, "/problems/body-too-large", "The request body is too large"
    hint = "A 28x28 PNG has a few hundred bytes; send one image a request."
    closes_connection = True


class UnsupportedMediaType(Problem):
    """The route does not read this content type."""

    status, type, title = 415, "/problems/unsupported-media-type", "This content type is not accepted here"
    hint = _BODIES


class UnsupportedEncoding(UnsupportedMediaType):
    """The body has a Content-Encoding that the service does not decode."""

    type, title = "/problems/unsupported-encoding", "This content encoding is not accepted here"
    hint = "Send the body without Content-Encoding, or with gzip or deflate."

    def headers(self) -> dict[str, str]:
        """Return the headers with the encodings that the service decodes (RFC 9110, 15.5.16)."""
        return {**super().headers(), "accept-encoding": "gzip, deflate"}


class InvalidImage(Problem):
    """The body is not an image that the model can score."""

    status, type, title = 422, "/problems/invalid-image", "The image cannot be scored"
    hint = "Send a greyscale PNG of 28x28 pixels."


class NotAPng(InvalidImage):
    """The bytes do not begin with the PNG signature."""

    type, title = "/problems/not-a-png", "The file is not a PNG"


class TruncatedPng(InvalidImage):
    """The PNG ends before its chunk IEND is complete."""

    type, title = "/problems/truncated-png", "The PNG is cut short"
    hint = "Send the whole file."


class CorruptPng(InvalidImage):
    """The PNG is inconsistent: checksums, chunk order, compressed data, bytes after its end."""

    type, title = "/problems/corrupt-png", "The PNG is damaged"
    hint = "Save the image again, and transfer the file as binary."


class AnimatedPng(InvalidImage):
    """The PNG holds several frames."""

    type, title = "/problems/animated-png", "The PNG is animated"
    hint = "Send one frame a request."


class WrongSize(InvalidImage):
    """The image does not have the model's input size."""

    type, title = "/problems/wrong-size", "The image does not have the model's input size"
    hint = "Scale the image to 28x28 pixels before sending it, or ask for fit=mnist."


class ImageTooLarge(InvalidImage):
    """The header declares more pixels than the service decodes."""

    type, title = "/problems/image-too-large", "The image declares too many pixels"
    hint = "Scale the image down before sending it."


class ExtremeShape(InvalidImage):
    """The header declares a side that is too long, or sides that differ too much."""

    type, title = "/problems/extreme-shape", "The image is too long or too narrow"
    hint = "Crop the image to the digit, with a margin around it."


class UnsupportedFormat(InvalidImage):
    """The bytes are not in a format that `fit=mnist` decodes."""

    type, title = "/problems/unsupported-format", "The image format is not supported"
    hint = "Convert the image to PNG, JPEG or WebP, upright and of any size."


class CorruptImage(InvalidImage):
    """A JPEG or WebP file is damaged or cut short."""

    type, title = "/problems/corrupt-image", "The image file is damaged"
    hint = "Save the image again, and send the whole file."


class AnimatedImage(InvalidImage):
    """A WebP file has several frames."""

    type, title = "/problems/animated-image", "The image is animated"
    hint = "Send one frame per request."


class NotGrey(InvalidImage):
    """The image has colours, so its grey levels are undefined."""

    type, title = "/problems/not-grey", "The image has colours"
    hint = "Convert the image to greyscale before sending it."


class LowBitDepth(InvalidImage):
    """The 16-bit samples use 12 bits or fewer, so the image would be scored as almost black."""

    type, title = "/problems/low-bit-depth", "The 16-bit samples are not scaled to 16 bits"
    hint = "Scale the samples so that white is 65535, or convert the image to 8 bits so that white is 255."


class Transparent(InvalidImage):
    """The image has transparent pixels, and no background is defined."""

    type, title = "/problems/transparent", "The image has transparent pixels"
    hint = "Flatten the image onto its background before sending it."


class BlankImage(InvalidImage):
    """There is nothing on the image that `fit=mnist` could crop to."""

    type, title = "/problems/blank-image", "The image is blank"
    hint = "Send an image with a clear stroke on a plain background."


class AmbiguousImage(InvalidImage):
    """What is stroke and what is background cannot be told."""

    type, title = "/problems/ambiguous-image", "Stroke and background cannot be told apart"
    hint = "Send one digit on a plain background that is darker or brighter than all of it, with a margin around it."

    def __init__(self, detail: str = "", hint: str = "") -> None:
        super().__init__(detail)
        if hint:
            self.hint = hint


class WrongArray(InvalidImage):
    """The array has another type or shape than uint8 [N, 28, 28]."""

    type, title = "/problems/wrong-array", "The array is not uint8 of shape [N, 28, 28]"
    hint = "Send uint8 of shape [N, 28, 28], where 0 is the background and 255 the full stroke."


class InvalidParameter(Problem):
    """A parameter, in the query or in the form, is unknown or has an invalid value."""

    status, type, title = 422, "/problems/invalid-parameter", "A parameter is not valid"
    hint = "GET /docs lists the parameters and their values."


class UnsupportedAlpha(InvalidParameter):
    """The calibration is too small for the false-alarm rate that was asked for."""

    type, title = "/problems/unsupported-alpha", "The calibration does not support this false-alarm rate"
    hint = "Ask for a larger alpha; GET /models/{name} says under `calibration.n` how many images it has."


class ModelUnavailable(Problem):
    """The model or version is not loaded: it was refused, or is on its way."""

    status, type, title = 503, "/problems/model-unavailable", "The model is not ready"
    hint = "Try again soon; GET /models says what answers, and the log why something else does not."
    retry_after = 5


class StoreUnavailable(Problem):
    """The store of reconstructions does not answer; scores go on without ids."""

    status, type, title = 503, "/problems/store-unavailable", "The store of reconstructions does not answer"
    hint = "Try again soon. Scoring goes on meanwhile."
    retry_after = 5


class Overloaded(Problem):
    """Too much is waiting: images, batches, images to be fitted, versions to be loaded."""

    status, type, title = 503, "/problems/overloaded", "Too much is waiting"
    hint = "Try again after the seconds that Retry-After names."
    retry_after = 1


class DeadlineExceeded(Problem):
    """No result in time."""

    status, type, title = 504, "/problems/deadline-exceeded", "The score was not ready in time"
    hint = "Try again; the service is busy."
    retry_after = 1


def from_status(status: int, detail: str = "", allow: str = "") -> Problem:
    """Return the problem for a status that the framework chose."""
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        return MethodNotAllowed(detail, allow)
    for kind in (MalformedRequest, NotFound, BodyTooLarge, UnsupportedMediaType, InvalidParameter):
        if status == kind.status:
            return kind(detail)
    problem = Problem(detail)
    problem.status = status
    if status < 500:
        problem.type, problem.title, problem.hint = "about:blank", HTTPStatus(status).phrase, ""
    return problem
