"""The exceptions of the client. The classes under `Problem` have the names and the tree of the service's problems.

    ServiceError
    ├── UnreadableImage              the image cannot be read on this machine
    ├── Unreachable                  the connection failed or broke
    │   └── ConnectionFailed         no connection could be opened
    ├── TimedOut                     no reply in time
    ├── UnexpectedReply              the reply did not come from this service
    └── Problem                      rejected by the service (RFC 9457): status, type, title, detail, hint, request_id
        ├── MalformedRequest    400  EmptyBody, MalformedMultipart, MissingFile, TooManyFiles, MalformedArray
        ├── Unauthorized        401
        ├── HostNotAllowed      403
        ├── NotFound            404  ModelNotFound, ReconstructionNotFound
        ├── MethodNotAllowed    405
        ├── NotAcceptable       406
        ├── BodyTimeout         408
        ├── BodyTooLarge        413
        ├── UnsupportedMediaType 415 UnsupportedEncoding
        ├── InvalidImage        422  NotAPng, TruncatedPng, CorruptPng, AnimatedPng, WrongSize, ImageTooLarge,
        │                            ExtremeShape, NotGrey, LowBitDepth, Transparent, BlankImage, AmbiguousImage,
        │                            UnsupportedFormat, CorruptImage, AnimatedImage, WrongArray
        ├── InvalidParameter    422  UnsupportedAlpha
        ├── RateLimited         429  by a gateway
        ├── InternalError       500
        ├── BadGateway          502  by a gateway
        ├── ModelUnavailable    503
        ├── StoreUnavailable    503
        ├── Overloaded          503
        └── DeadlineExceeded    504

A problem type that this version of the client does not know becomes the class of its status. Code that catches
`InvalidImage` therefore also catches the types that a newer service adds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any


class ServiceError(Exception):
    """Base class: the call returned no result."""


class UnreadableImage(ServiceError):
    """The image cannot be read on this machine; nothing was sent."""


class Unreachable(ServiceError):
    """The connection failed or broke."""


class ConnectionFailed(Unreachable):
    """No connection could be opened: nothing listens at the address, or its name is unknown.

    A client that has never reached the service raises this at once; one that has reached it before retries.
    """


class TimedOut(ServiceError):
    """The service did not reply in time."""


class UnexpectedReply(ServiceError):
    """The reply did not come from this service."""


class Problem(ServiceError):
    """The service rejected the request, and returned the reason.

    Attributes:
        status: HTTP status.
        type: `/problems/...`; never changes its meaning, so programs can branch on it.
        title: kind of the problem.
        detail: what is wrong with this request; may be empty.
        hint: how to correct the request; may be empty.
        request_id: id of the request in the service's log, or None.
        retry_after: seconds to wait before the next attempt, or None.
    """

    def __init__(self, status: int, document: Mapping[str, Any], retry_after: float | None = None) -> None:
        self.status = status
        self.type = str(document.get("type") or "about:blank")
        self.title = str(document.get("title") or f"HTTP {status}")
        self.detail = str(document.get("detail") or "")
        self.hint = str(document.get("hint") or "")
        self.request_id = _request_id(document)
        self.retry_after = retry_after
        self._document = dict(document)
        super().__init__(f"{self.title}: {self.detail}" if self.detail else self.title)

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, copy and pickle call the class with the message only, which does not match its signature.
        return type(self), (self.status, self._document, self.retry_after), self.__dict__


class MalformedRequest(Problem):
    """The request cannot be read."""


class EmptyBody(MalformedRequest):
    """There is no body."""


class MalformedMultipart(MalformedRequest):
    """The body is not the multipart form that its header announces."""


class MissingFile(MalformedRequest):
    """The form has no part named `file`."""


class TooManyFiles(MalformedRequest):
    """The form has more images than the route accepts."""


class MalformedArray(MalformedRequest):
    """The body is not the npy file that its header announces."""


class Unauthorized(Problem):
    """The API key is missing or unknown."""


class HostNotAllowed(Problem):
    """The service does not answer requests that name this host."""


class NotFound(Problem):
    """The path does not exist."""


class ModelNotFound(NotFound):
    """The model or version is not in the model store."""


class ReconstructionNotFound(NotFound):
    """The id is unknown or has expired."""


class MethodNotAllowed(Problem):
    """The path does not support the method."""


class NotAcceptable(Problem):
    """The route offers none of the media types that the request accepts."""


class BodyTimeout(Problem):
    """The body did not arrive in time."""


class BodyTooLarge(Problem):
    """The body is larger than the limit of its route."""


class UnsupportedMediaType(Problem):
    """The route does not read this content type."""


class UnsupportedEncoding(UnsupportedMediaType):
    """The body has a Content-Encoding that the service does not decode."""


class InvalidImage(Problem):
    """The model cannot score this image."""


class NotAPng(InvalidImage):
    """The file is not a PNG."""


class TruncatedPng(InvalidImage):
    """The PNG is incomplete."""


class CorruptPng(InvalidImage):
    """The PNG is corrupt."""


class AnimatedPng(InvalidImage):
    """The PNG has several frames."""


class WrongSize(InvalidImage):
    """The image does not have the model's input size."""


class ImageTooLarge(InvalidImage):
    """The image has more pixels than the service decodes."""


class ExtremeShape(InvalidImage):
    """The header declares a side that is too long, or sides that differ too much."""


class UnsupportedFormat(InvalidImage):
    """The bytes are not in a format that `fit=mnist` decodes."""


class CorruptImage(InvalidImage):
    """A JPEG or WebP file is damaged or cut short."""


class AnimatedImage(InvalidImage):
    """A WebP file has several frames."""


class NotGrey(InvalidImage):
    """The image has colours."""


class LowBitDepth(InvalidImage):
    """The 16-bit samples use 12 bits or fewer."""


class Transparent(InvalidImage):
    """The image has transparent pixels."""


class BlankImage(InvalidImage):
    """`fit=mnist` found no strokes on the image."""


class AmbiguousImage(InvalidImage):
    """The strokes and the background cannot be distinguished."""


class WrongArray(InvalidImage):
    """The array does not have the type and shape of the model's input."""


class InvalidParameter(Problem):
    """A query parameter is not valid."""


class UnsupportedAlpha(InvalidParameter):
    """The calibration is too small for the requested false-positive rate."""


class RateLimited(Problem):
    """A gateway limits the rate of requests of this client."""


class InternalError(Problem):
    """The service failed."""


class BadGateway(Problem):
    """A gateway got no complete reply from any replica."""


class ModelUnavailable(Problem):
    """The model or version is not loaded: it was rejected or is still loading."""


class StoreUnavailable(Problem):
    """The reconstruction store is not available; scores have no ids."""


class Overloaded(Problem):
    """The service is overloaded; from a gateway: no replica is ready."""


class DeadlineExceeded(Problem):
    """The score was not ready within the deadline of the service."""


_OF_STATUS: dict[int, type[Problem]] = {
    400: MalformedRequest,
    401: Unauthorized,
    403: HostNotAllowed,
    404: NotFound,
    405: MethodNotAllowed,
    408: BodyTimeout,
    413: BodyTooLarge,
    415: UnsupportedMediaType,
    422: InvalidImage,
    429: RateLimited,
    500: InternalError,
    502: BadGateway,
    503: Overloaded,
    504: DeadlineExceeded,
}

OF_ONE_IMAGE = (UnreadableImage, MalformedRequest, BodyTooLarge, UnsupportedMediaType, InvalidImage, InternalError)
"""Errors that concern one image only: `score_many` yields them instead of raising them."""


def problem(status: int, document: Mapping[str, Any], retry_after: float | None = None) -> Problem:
    """Return the exception for a problem document."""
    name = str(document.get("type", "")).rpartition("/")[2]
    kind = _OF_TYPE.get(name) or _OF_STATUS.get(status, Problem)
    return kind(status, document, retry_after)


def _request_id(document: Mapping[str, Any]) -> str | None:
    prefix, _, request_id = str(document.get("instance", "")).rpartition(":")
    return request_id if prefix == "urn:request" else None


def _kinds(parent: type[Problem]) -> Iterator[tuple[str, type[Problem]]]:
    for kind in parent.__subclasses__():
        yield re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=A)(?=Png)", "-", kind.__name__).lower(), kind
        yield from _kinds(kind)


_OF_TYPE = dict(_kinds(Problem))
