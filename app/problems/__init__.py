"""The problem types of the service: every error response as an RFC 9457 document. Independent of the framework.

    Problem
    ├── MalformedRequest        400  EmptyBody, MalformedMultipart, MissingFile, TooManyFiles,
    │                                MalformedArray
    ├── Unauthorized            401
    ├── HostNotAllowed          403
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

The last part of `type` is stable, because clients branch on it. `docs/api.md` describes each type.
"""

from __future__ import annotations

from http import HTTPStatus

from app.problems.base import (
    MEDIA_TYPE,
    NO_STORE,
    BodyTimeout,
    BodyTooLarge,
    DeadlineExceeded,
    EmptyBody,
    HostNotAllowed,
    InternalError,
    InvalidParameter,
    MalformedArray,
    MalformedMultipart,
    MalformedRequest,
    MethodNotAllowed,
    MissingFile,
    ModelNotFound,
    ModelUnavailable,
    NotAcceptable,
    NotFound,
    Overloaded,
    Problem,
    ReconstructionNotFound,
    StoreUnavailable,
    TooManyFiles,
    Unauthorized,
    UnsupportedAlpha,
    UnsupportedEncoding,
    UnsupportedMediaType,
    render,
)
from app.problems.images import (
    AmbiguousImage,
    AnimatedImage,
    AnimatedPng,
    BlankImage,
    CorruptImage,
    CorruptPng,
    ExtremeShape,
    ImageTooLarge,
    InvalidImage,
    LowBitDepth,
    NotAPng,
    NotGrey,
    Transparent,
    TruncatedPng,
    UnsupportedFormat,
    WrongArray,
    WrongSize,
)

__all__ = [
    "MEDIA_TYPE",
    "NO_STORE",
    "AmbiguousImage",
    "AnimatedImage",
    "AnimatedPng",
    "BlankImage",
    "BodyTimeout",
    "BodyTooLarge",
    "CorruptImage",
    "CorruptPng",
    "DeadlineExceeded",
    "EmptyBody",
    "ExtremeShape",
    "HostNotAllowed",
    "ImageTooLarge",
    "InternalError",
    "InvalidImage",
    "InvalidParameter",
    "LowBitDepth",
    "MalformedArray",
    "MalformedMultipart",
    "MalformedRequest",
    "MethodNotAllowed",
    "MissingFile",
    "ModelNotFound",
    "ModelUnavailable",
    "NotAPng",
    "NotAcceptable",
    "NotFound",
    "NotGrey",
    "Overloaded",
    "Problem",
    "ReconstructionNotFound",
    "StoreUnavailable",
    "TooManyFiles",
    "Transparent",
    "TruncatedPng",
    "Unauthorized",
    "UnsupportedAlpha",
    "UnsupportedEncoding",
    "UnsupportedFormat",
    "UnsupportedMediaType",
    "WrongArray",
    "WrongSize",
    "from_status",
    "render",
]


def from_status(status: int, detail: str = "", allow: str = "") -> Problem:
    """Return the problem for an error status of the framework."""
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
