"""Reads the bodies of inference requests: the images, their parameters, and the requested reply."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from app.http.inference_protocol import documents, tensors
from app.http.inference_protocol.outputs import PredictReply, Rows, binary_reply, infer_reply
from app.http.npy import PIXELS
from app.images.prepare import Fit
from app.problems import BodyTooLarge, InvalidParameter, MalformedRequest, WrongArray
from app.scoring.batch import Chunk
from app.settings import Settings


class Reply(Protocol):
    """Collects results and ends as headers and body."""

    @property
    def has_pictures(self) -> bool:
        """Whether it needs the pictures."""

    def add(self, rows: Rows) -> None:
        """Add the results of some images."""

    def finish(self, model: str, version: int, count: int) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
        """Return headers and pieces of the body."""


@dataclass(frozen=True)
class Images:
    """The images of a request: `count`, and the parameters of the request about them."""

    count: int
    parameters: documents.ScoreParameters
    pixels: tensors.Body | None = None
    """Raw pixels; None if the images are encoded."""
    encoded: AsyncIterator[bytes] | None = None

    def chunks(self, size: int, decode: tensors.Decode, largest: int) -> AsyncIterator[Chunk]:
        """Return the images in chunks of `size`. Arguments and errors as for `tensors.encoded_chunks`."""
        if self.pixels is not None:
            return tensors.pixel_chunks(self.pixels, self.count, size)
        assert self.encoded is not None
        return tensors.encoded_chunks(self.encoded, size, decode, largest=largest)


async def read_infer(
    headers: dict[bytes, bytes], body: tensors.Body, settings: Settings, default: Fit
) -> tuple[Images, Reply]:
    """Read a request of v2, as far as its JSON. Binary tensors are read with the chunks of the images.

    Args:
        headers, body: of the request.
        settings: limits.
        default: how encoded images are prepared if the request does not set it.

    Raises:
        Problem: the request is invalid, or exceeds a limit.
    """
    length, limit = documents.header_length(headers), documents.MAX_DOCUMENT_BYTES
    if length == 0:
        content = await body.rest(limit, documents.raw_too_large)
        count, rest = divmod(len(content), PIXELS)
        if rest or not count:
            raise WrongArray(f"the body has {len(content)} bytes, and images of 28x28 have {PIXELS} each")
        return Images(count, documents.ScoreParameters(fit="strict"), tensors.body_of(content)), binary_reply()
    if length is None:
        content = await body.rest(limit, documents.document_too_large)
    else:
        content = bytes(await body.take(length))
    document = documents.parse(documents.InferDocument, content)
    parameters = documents.score_parameters(document.parameters, also=frozenset(("binary_data_output",)))
    tensor, reply = document.tensor, infer_reply(document)
    _check_tensor_parameters(tensor)
    count, size = tensors.count_of(tensor), tensor.binary_size
    if tensor.datatype == "BYTES" and count > settings.batch_max_files:
        raise BodyTooLarge(f"the tensor has {count} images, the maximum is {settings.batch_max_files}")
    parameters = _prepared(parameters, default, encoded=tensor.datatype == "BYTES", hint="Send the datatype BYTES")
    if size is None:
        if length is not None:
            await body.expect_end()
        if tensor.datatype == "UINT8":
            pixels = tensors.json_pixels(tensor.data, count)
            return Images(count, parameters, tensors.body_of(pixels)), reply
        values = tensors.flat_values(tensor, count)
        return Images(count, parameters, encoded=tensors.json_elements(values)), reply
    if length is None:
        raise MalformedRequest("`binary_data_size` without the header Inference-Header-Content-Length")
    tensors.check_size(tensor, count, size)
    if tensor.datatype == "UINT8":
        return Images(count, parameters, body), reply
    elements = tensors.binary_elements(body, count, size, largest=largest(parameters, settings))
    return Images(count, parameters, encoded=elements), reply


async def read_predict(
    _: dict[bytes, bytes],
    body: tensors.Body,
    settings: Settings,  # noqa: ARG001
    default: Fit,
) -> tuple[Images, Reply]:
    """Read a request of v1. Arguments and errors as for `read_infer`."""
    content = await body.rest(documents.MAX_DOCUMENT_BYTES, documents.document_too_large)
    document = documents.parse(documents.PredictDocument, content)
    parameters = documents.score_parameters(document.parameters, known="`alpha` and `fit`")
    pixels, encoded = tensors.instances(document.instances)
    count = len(document.instances)
    parameters = _prepared(parameters, default, encoded=bool(encoded), hint='Send {"b64": "..."}')
    if encoded:
        return Images(count, parameters, encoded=tensors.json_elements(encoded)), PredictReply()
    return Images(count, parameters, tensors.body_of(pixels)), PredictReply()


def largest(parameters: documents.ScoreParameters, settings: Settings) -> int:
    """Return the maximum number of bytes of an encoded image."""
    return settings.max_body_bytes if parameters.fit == "strict" else settings.fit_max_body_bytes


def _prepared(
    parameters: documents.ScoreParameters, default: Fit, *, encoded: bool, hint: str
) -> documents.ScoreParameters:
    """Return the parameters with the preparation that applies."""
    if parameters.fit is not None and parameters.fit != "strict" and not encoded:
        raise WrongArray("`fit` applies to encoded images", hint=f"{hint}, or omit `fit`.")
    fit = (parameters.fit or default) if encoded else "strict"
    return parameters.model_copy(update={"fit": fit})


def _check_tensor_parameters(tensor: documents.InputTensor) -> None:
    unknown = sorted(tensor.parameters.keys() - {"binary_data_size"})
    if unknown:
        detail = f"unknown parameter `{unknown[0][:40]}` of the input"
        raise InvalidParameter(detail, hint="An input has the parameter `binary_data_size`.")
