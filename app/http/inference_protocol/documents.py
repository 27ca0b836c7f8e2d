"""The JSON documents of inference requests: parsed, and checked for what this service can do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError
from pydantic_core import from_json

from app.images.prepare import Fit
from app.problems import BodyTooLarge, InvalidParameter, MalformedRequest

INPUT = "images"
MAX_DOCUMENT_BYTES = 1024 * 1024
"""Maximum number of bytes of JSON. The event loop parses a document in one step, which takes up to 50 ms per MiB."""
_MOST_CONTAINERS = 65_536
"""Maximum number of lists and objects of a document: each takes the event loop as long as several numbers. 1 MiB of
images as rows of numbers has 20,000; an image whose pixels are lists of one number has 813."""
_MOST_PARAMETERS = 64
BINARY_HINT = "Send the tensor as binary data after the JSON, with the header Inference-Header-Content-Length."

_RAW_HINT = "Send a JSON document with the shape before the tensor, and its length in Inference-Header-Content-Length."
_IGNORED_PARAMETERS = frozenset(("priority", "timeout", "sequence_id", "sequence_start", "sequence_end"))
"""Request parameters of Triton's client that have no effect here: each request is scored on its own, in order."""
_DOCUMENT_HINT = "docs/inference-protocol.md describes the request."
_LENGTH = re.compile(rb"[0-9]{1,100}")

Document = TypeVar("Document", bound=BaseModel)
Parameters = Annotated[dict[str, Any], Field(max_length=_MOST_PARAMETERS)]


class _Lenient(BaseModel):
    """A document whose unknown members are ignored, as the protocol demands: clients add members of their own."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class InputTensor(_Lenient):
    """The input of a request; `data` is absent if the tensor follows the JSON as binary data."""

    name: str
    shape: list[Annotated[int, Strict(), Field(ge=0, lt=2**31)]] = Field(max_length=8)
    datatype: str
    parameters: Parameters = {}
    data: Any = None

    @property
    def binary_size(self) -> int | None:
        """Number of bytes of the tensor after the JSON; None if the JSON contains its data.

        Raises:
            MalformedRequest: the tensor has both JSON data and a binary size, neither of them, or an invalid size.
        """
        if "binary_data_size" not in self.parameters:
            if self.data is None:
                raise MalformedRequest("the input has neither `data` nor `binary_data_size`", hint=_DOCUMENT_HINT)
            return None
        size = self.parameters["binary_data_size"]
        if type(size) is not int or not 0 <= size < 2**63:
            raise MalformedRequest("`binary_data_size` is not a number of bytes", hint=_DOCUMENT_HINT)
        if self.data is not None:
            raise MalformedRequest("the input has both `data` and `binary_data_size`", hint=_DOCUMENT_HINT)
        return size


class RequestedOutput(_Lenient):
    """An output that a request names."""

    name: str
    parameters: Parameters = {}


class InferDocument(_Lenient):
    """The JSON of `POST /v2/models/{name}/infer`."""

    id: str | None = None
    parameters: Parameters = {}
    inputs: list[InputTensor] = Field(max_length=64)
    outputs: list[RequestedOutput] | None = Field(None, max_length=64)

    @property
    def tensor(self) -> InputTensor:
        """The one input of a model.

        Raises:
            MalformedRequest: the request does not have exactly one input of this name.
        """
        names = [each.name for each in self.inputs]
        if names != [INPUT]:
            found = ", ".join(f"`{name[:40]}`" for name in names[:4]) or "no input"
            raise MalformedRequest(
                f"the models have one input, `{INPUT}`; the request has {found}", hint=_DOCUMENT_HINT
            )
        return self.inputs[0]


class PredictDocument(_Lenient):
    """The JSON of `POST /v1/models/{name}:predict`."""

    instances: list[Any] = Field(min_length=1)
    parameters: Parameters = {}


class ScoreParameters(BaseModel):
    """The parameters of a request that change its scores or verdicts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: float | None = Field(None, gt=0, lt=1, strict=True)
    fit: Fit | None = None
    """None: of encoded images, the preparation of the version; raw pixels are not prepared."""


def header_length(headers: Mapping[bytes, bytes]) -> int | None:
    """Return the number of bytes of JSON before the binary tensors; None if the whole body is JSON.

    Raises:
        MalformedRequest: the header `Inference-Header-Content-Length` is not a number.
        BodyTooLarge: the JSON is above `MAX_DOCUMENT_BYTES`.
    """
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not _LENGTH.fullmatch(text):
        hint = "The header contains the number of bytes of JSON, before compression."
        raise MalformedRequest("the header Inference-Header-Content-Length is not a number", hint=hint)
    length = int(text)
    if length > MAX_DOCUMENT_BYTES:
        raise document_too_large(f"the JSON has {length} bytes")
    return length


def document_too_large(found: str) -> BodyTooLarge:
    """Return the problem of a document above the limit."""
    return BodyTooLarge(f"{found}, the maximum of a JSON document is {MAX_DOCUMENT_BYTES}", hint=BINARY_HINT)


def raw_too_large(found: str) -> BodyTooLarge:
    """Return the problem of a body without a document above the limit."""
    return BodyTooLarge(f"{found}, the maximum of a body without JSON is {MAX_DOCUMENT_BYTES}", hint=_RAW_HINT)


def parse(kind: type[Document], content: bytes) -> Document:
    """Read a document.

    Raises:
        MalformedRequest: the bytes are not JSON, or a member is missing or has the wrong type.
        BodyTooLarge: the JSON has too many lists and objects.
    """
    if content.count(b"[") + content.count(b"{") > _MOST_CONTAINERS:
        raise BodyTooLarge(f"the JSON has more than {_MOST_CONTAINERS} lists and objects", hint=BINARY_HINT)
    try:
        found = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedRequest(f"the JSON cannot be parsed: {error}", hint=_DOCUMENT_HINT) from None
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])[:80] or "the document"
        raise MalformedRequest(f"{name}: {first['msg']}", hint=_DOCUMENT_HINT) from None


def score_parameters(
    parameters: Mapping[str, Any],
    *,
    also: frozenset[str] = frozenset(),
    known: str = "`alpha`, `fit` and `binary_data_output`",
) -> ScoreParameters:
    """Read the parameters of a request. Unknown parameters are rejected: a misspelt one would silently do nothing.

    Args:
        parameters: of the document.
        also: names that the caller reads itself.
        known: the names of all parameters, for the hint.

    Raises:
        InvalidParameter: a parameter is unknown or has an invalid value.
    """
    read_elsewhere, hint = also | _IGNORED_PARAMETERS, f"The parameters are {known}."
    own = {name: value for name, value in parameters.items() if name not in read_elsewhere}
    for name in own:
        if name not in ScoreParameters.model_fields:
            raise InvalidParameter(f"{name[:40]}: unknown parameter", hint=hint)
    try:
        return ScoreParameters.model_validate(own)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])[:40]
        raise InvalidParameter(f"{name}: {first['msg']}", hint=hint) from None


def flag(parameters: Mapping[str, Any], name: str) -> bool | None:
    """Return a parameter that is true or false; None if it is absent.

    Raises:
        InvalidParameter: it has another value.
    """
    value = parameters.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise InvalidParameter(f"{name} is not true or false", hint=_DOCUMENT_HINT)
