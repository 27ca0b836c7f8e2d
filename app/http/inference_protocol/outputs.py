"""The outputs of an inference request, collected chunk by chunk as JSON or as binary tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from app.http.inference_protocol.documents import InferDocument, RequestedOutput, flag
from app.problems import InvalidParameter
from app.scoring.verdict import Verdict

MAX_PICTURES = 128
"""Maximum number of images of a request with the outputs `reconstruction` or `error_map`, which are as large as the
images, or four times as large. As JSON, they are written in one step of the event loop."""


class Rows(NamedTuple):
    """The results of consecutive images.

    Attributes:
        verdicts: one per image.
        planes: uint8 [N, 3, 28, 28], input, reconstruction and error map; empty unless an output needs them.
        peak: float32 [N], the squared error that 255 stands for in the error map.
    """

    verdicts: list[Verdict]
    planes: NDArray[np.uint8]
    peak: NDArray[np.float32]


@dataclass(frozen=True)
class Output:
    """An output that the models have.

    Attributes:
        datatype: of the protocol.
        dtype: of a binary tensor; None for BYTES.
        values: returns the values of some images: an array, or a list of texts for BYTES.
        shape: of one image.
        picture: whether it needs the pictures.
    """

    datatype: str
    dtype: str | None
    values: Callable[[Rows], Any]
    shape: tuple[int, ...] = ()
    picture: bool = False


def _column(index: int) -> Callable[[Rows], list[Any]]:
    return lambda rows: [verdict[index] for verdict in rows.verdicts]


OUTPUTS = {
    "mse": Output("FP32", "<f4", _column(0)),
    "is_anomaly": Output("BOOL", "?", _column(2)),
    "p_value": Output("FP64", "<f8", _column(1)),
    "reason": Output("BYTES", None, lambda rows: [verdict.reason or "" for verdict in rows.verdicts]),
}
"""The outputs of the metadata, which a request without `outputs` gets."""
PICTURES = {
    "reconstruction": Output("UINT8", "u1", lambda rows: rows.planes[:, 1], (28, 28), picture=True),
    "error_map": Output(
        "FP32", "<f4", lambda rows: rows.planes[:, 2] * (rows.peak[:, None, None] / np.float32(255)), (28, 28), True
    ),
}
"""Further outputs, which a request has to name."""
_ALL = {**OUTPUTS, **PICTURES}


class OutputTensor:
    """One output of one request.

    Args:
        name: of `OUTPUTS` or `PICTURES`.
        binary: whether the reply contains it as binary data.
    """

    def __init__(self, name: str, *, binary: bool) -> None:
        self.name = name
        self.binary = binary
        self.output = _ALL[name]
        self.parts: list[bytes] = []

    def add(self, rows: Rows) -> None:
        """Add the values of some images."""
        values = self.output.values(rows)
        if self.binary and self.output.dtype is None:
            texts = [text.encode() for text in values]
            self.parts += [b"%b%b" % (len(text).to_bytes(4, "little"), text) for text in texts]
        elif self.binary:
            self.parts.append(np.ascontiguousarray(values, self.output.dtype).tobytes())
        else:
            flat = values.ravel().tolist() if isinstance(values, np.ndarray) else values
            self.parts.append(to_json(flat)[1:-1])

    def document(self, count: int) -> bytes:
        """Return the JSON of the output of `count` images."""
        head = {"name": self.name, "datatype": self.output.datatype, "shape": [count, *self.output.shape]}
        if self.binary:
            return to_json({**head, "parameters": {"binary_data_size": sum(map(len, self.parts))}})
        return b'%b,"data":[%b]}' % (to_json(head)[:-1], b",".join(self.parts))


class InferReply:
    """The reply of one request.

    Args:
        tensors: its outputs.
        id: the id of the request, which the reply repeats.
    """

    def __init__(self, tensors: list[OutputTensor], id: str | None) -> None:
        self._tensors = tensors
        self._id = id

    @property
    def has_pictures(self) -> bool:
        """Whether an output needs the pictures."""
        return any(tensor.output.picture for tensor in self._tensors)

    def add(self, rows: Rows) -> None:
        """Add the results of some images."""
        for tensor in self._tensors:
            tensor.add(rows)

    def finish(self, model: str, version: int, count: int) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
        """Return the headers and the pieces of the body, after the results of `count` images."""
        head = {"model_name": model, "model_version": str(version), **({"id": self._id} if self._id else {})}
        outputs = b",".join(tensor.document(count) for tensor in self._tensors)
        document = b'%b,"outputs":[%b]}' % (to_json(head)[:-1], outputs)
        binary = [part for tensor in self._tensors if tensor.binary for part in tensor.parts]
        if not any(tensor.binary for tensor in self._tensors):
            return [(b"content-type", b"application/json")], [document]
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"inference-header-content-length", b"%d" % len(document)),
        ]
        return headers, [document, *binary]


class PredictReply:
    """The reply of v1 `:predict`: a list of verdicts."""

    has_pictures = False

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def add(self, rows: Rows) -> None:
        """Add the results of some images."""
        self._parts.append(to_json([verdict._asdict() for verdict in rows.verdicts])[1:-1])

    def finish(self, model: str, version: int, count: int) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:  # noqa: ARG002
        """Return the headers and the pieces of the body."""
        head = to_json({"model_name": model, "model_version": str(version)})[:-1]
        return [(b"content-type", b"application/json")], [b'%b,"predictions":[%b]}' % (head, b",".join(self._parts))]


def infer_reply(document: InferDocument) -> InferReply:
    """Return the reply with the outputs that a request names, or with all of `OUTPUTS`.

    Raises:
        InvalidParameter: an output is unknown or named twice, or has an unsupported parameter.
    """
    binary = flag(document.parameters, "binary_data_output") or False
    wanted = document.outputs or [RequestedOutput(name=name) for name in OUTPUTS]
    return InferReply([_tensor(each, binary) for each in _distinct(wanted)], document.id)


def binary_reply() -> InferReply:
    """Return the reply to a body that is one raw tensor: all of `OUTPUTS` as binary data."""
    return InferReply([OutputTensor(name, binary=True) for name in OUTPUTS], None)


def _distinct(wanted: list[RequestedOutput]) -> list[RequestedOutput]:
    names = [each.name for each in wanted]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise InvalidParameter(f"the output `{name[:40]}` is requested twice", hint="Name each output once.")
    return wanted


def _tensor(wanted: RequestedOutput, binary: bool) -> OutputTensor:
    if wanted.name not in _ALL:
        raise InvalidParameter(f"unknown output `{wanted.name[:40]}`", hint=f"The outputs are {', '.join(_ALL)}.")
    unknown = sorted(wanted.parameters.keys() - {"binary_data"})
    if unknown:
        detail = f"unknown parameter `{unknown[0][:40]}` of the output `{wanted.name}`"
        raise InvalidParameter(detail, hint="An output has the parameter `binary_data`.")
    own = flag(wanted.parameters, "binary_data")
    return OutputTensor(wanted.name, binary=binary if own is None else own)
