"""Every way a call can fail. The classes under `Problem` mirror the service's own problems, by name and by tree.

    ServiceError
    ├── UnreadableImage              the image's file cannot be read here
    ├── Unreachable                  no connection, or it broke
    ├── TimedOut                     no reply in time
    ├── UnexpectedReply              something answers there, but not this service
    └── Problem                      the service said no (RFC 9457): status, type, title, detail, hint, request_id
        ├── MalformedRequest    400  EmptyBody, MalformedMultipart, MissingFile, TooManyFiles, MalformedArray
        ├── Unauthorized        401
        ├── NotFound            404  ModelNotFound, ReconstructionNotFound
        ├── MethodNotAllowed    405
        ├── BodyTimeout         408
        ├── BodyTooLarge        413
        ├── UnsupportedMediaType 415
        ├── InvalidImage        422  NotAPng, TruncatedPng, CorruptPng, AnimatedPng, WrongSize, ImageTooLarge,
        │                            ExtremeShape, NotGrey, Transparent, BlankImage, AmbiguousImage,
        │                            UnsupportedFormat, CorruptImage, AnimatedImage, WrongArray
        ├── InvalidParameter    422  UnsupportedAlpha
        ├── RateLimited         429  by a gateway
        ├── InternalError       500
        ├── BadGateway          502  by a gateway
        ├── ModelUnavailable    503
        ├── StoreUnavailable    503
        ├── Overloaded          503
        └── DeadlineExceeded    504

A problem of a type that this client does not know yet becomes the class of its status: code that catches
`InvalidImage` goes on working when the service learns to refuse images for one more reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any


class ServiceError(Exception):
    """The service gave no result."""


class UnreadableImage(ServiceError):
    """The image's file cannot be read on this machine; nothing was sent."""


class Unreachable(ServiceError):
    """There is no connection: nobody listens, the name is unknown, or the connection broke."""


class TimedOut(ServiceError):
    """The connection stands, but no reply came in time."""


class UnexpectedReply(ServiceError):
    """Something answers at this address, but not as this service does."""


class Problem(ServiceError):
    """The service refused, and said why.

    Attributes:
        status: the HTTP status.
        type: `/problems/...`, stable: what programs branch on.
        title: what kind of problem it is, in words.
        detail: what is wrong with this request; may be empty.
        hint: how to mend it; may be empty.
        request_id: names the request in the service's log, or None.
        retry_after: seconds that the service asks to wait, or None.
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
        # An exception is otherwise made again from its words alone, which fails where it is copied or pickled.
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
    """The form has more images than the route takes."""


class MalformedArray(MalformedRequest):
    """The body is not the npy file that its header announces."""


class Unauthorized(Problem):
    """No API key, or one that is not known."""


class NotFound(Problem):
    """Nothing answers at this path."""


class ModelNotFound(NotFound):
    """The model or version is not in the model store."""


class ReconstructionNotFound(NotFound):
    """The id was never given out, or its time is over."""


class MethodNotAllowed(Problem):
    """The path exists, the method does not."""


class BodyTimeout(Problem):
    """The body did not arrive in time."""


class BodyTooLarge(Problem):
    """The body is above the limit of its route."""


class UnsupportedMediaType(Problem):
    """The content type is none that the route reads."""


class InvalidImage(Problem):
    """The body is not an image that the model can score."""


class NotAPng(InvalidImage):
    """The bytes do not begin as a PNG does."""


class TruncatedPng(InvalidImage):
    """The PNG ends before its end."""


class CorruptPng(InvalidImage):
    """The PNG contradicts itself."""


class AnimatedPng(InvalidImage):
    """The PNG holds several frames."""


class WrongSize(InvalidImage):
    """The image does not have the model's input size."""


class ImageTooLarge(InvalidImage):
    """The header declares more pixels than the service will decode."""


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


class Transparent(InvalidImage):
    """The image has transparent pixels."""


class BlankImage(InvalidImage):
    """There is nothing on the image that `fit=mnist` could crop to."""


class AmbiguousImage(InvalidImage):
    """What is stroke and what is background cannot be told."""


class WrongArray(InvalidImage):
    """The array has another type or shape than the model's input."""


class InvalidParameter(Problem):
    """A query parameter has a value that means nothing."""


class UnsupportedAlpha(InvalidParameter):
    """The calibration is too small for the false-alarm rate that was asked for."""


class RateLimited(Problem):
    """A gateway before the service lets no more requests of this caller through for now."""


class InternalError(Problem):
    """The service failed."""


class BadGateway(Problem):
    """A gateway before the service got no whole answer, from any replica that it asked."""


class ModelUnavailable(Problem):
    """The model or version is not loaded: it was refused, or is on its way."""


class StoreUnavailable(Problem):
    """The store of reconstructions does not answer; scores go on without ids."""


class Overloaded(Problem):
    """Too much is waiting at the service; or, by a gateway, no replica is ready."""


class DeadlineExceeded(Problem):
    """The service had no result in time."""


_OF_STATUS: dict[int, type[Problem]] = {
    400: MalformedRequest,
    401: Unauthorized,
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
"""What befalls one image and says nothing of the next."""


def problem(status: int, document: Mapping[str, Any], retry_after: float | None = None) -> Problem:
    """Make the exception that a problem document describes."""
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
