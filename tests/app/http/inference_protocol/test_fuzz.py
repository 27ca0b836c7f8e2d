"""Generated bodies of inference requests: no reply is a server error.

`make fuzz-protocol` sends 20,000 of them; `PROTOCOL_EXAMPLES` sets the number.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import zlib
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from app.settings import Settings
from tests import pngs
from tests.conftest import running
from tests.infer_requests import HEADER, binary_request, bytes_tensor

EXAMPLES = int(os.environ.get("PROTOCOL_EXAMPLES", "150"))
PNG = pngs.plain()

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
sizes = st.sampled_from([0, 1, 2, 3, 28, 783, 784, 785, 1568, 2**31, 2**62, -1]) | anything
shapes = st.sampled_from([[1, 28, 28], [2, 1, 28, 28], [1], [2], [1, 1], [1, 784], [28, 28], [0, 28, 28]]) | anything
data = (
    st.sampled_from(
        [[0] * 784, [[0] * 28] * 28, [255] * 1568, [base64.b64encode(PNG).decode()], ["QQ=="] * 2, [0.5] * 784]
    )
    | anything
)
parameters = (
    st.fixed_dictionaries(
        {},
        optional={
            "binary_data_size": sizes,
            "binary_data": anything,
            "binary_data_output": st.booleans() | anything,
            "alpha": st.floats() | anything,
            "fit": st.sampled_from(["strict", "mnist"]) | anything,
            "timeout": anything,
        },
    )
    | anything
)
names = st.sampled_from(["images", "mse", "reason", "error_map", "reconstruction"]) | st.text(max_size=8)
tensors = st.fixed_dictionaries(
    {"name": names, "shape": shapes, "datatype": st.sampled_from(["UINT8", "BYTES", "FP32"]) | anything},
    optional={"data": data, "parameters": parameters},
)
outputs = st.lists(st.fixed_dictionaries({"name": names}, optional={"parameters": parameters}), max_size=4)
documents = (
    st.fixed_dictionaries(
        {"inputs": st.lists(tensors, max_size=2) | anything},
        optional={"outputs": outputs | anything, "id": anything, "parameters": parameters},
    )
    | st.fixed_dictionaries({"instances": st.lists(data, max_size=2) | anything}, optional={"parameters": parameters})
    | anything
)
tails = st.sampled_from([b"", bytes(784), bytes(1568), bytes_tensor([PNG]), bytes_tensor([PNG, PNG]), bytes(783)]) | (
    st.binary(max_size=64)
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes, dict[str, str]]:
    """Return path, body and headers: mostly a document that is nearly right, with tensors that nearly fit."""
    document = draw(documents)
    content = draw(st.binary(max_size=64)) if draw(st.integers(0, 9)) == 0 else json.dumps(document).encode()
    tail = draw(tails)
    length = draw(st.sampled_from([len(content), len(content), 0, 1, len(content) + 1, 10**9, None, "x", "٣"]))
    headers = {} if length is None else {HEADER: str(length)}
    body = content + tail if length is not None else content
    encoding = draw(st.sampled_from(["", "", "", "gzip", "deflate", "br", "lie"]))
    if encoding:
        headers["content-encoding"] = "gzip" if encoding == "lie" else encoding
        body = {"gzip": gzip.compress, "deflate": zlib.compress}.get(encoding, bytes)(body)
    path = draw(
        st.sampled_from(
            [
                "/v2/models/zero-article/infer",
                "/v2/models/zero-article/versions/1/infer",
                "/v1/models/zero-article:predict",
            ]
        )
    )
    return path, body, headers


INFER = "/v2/models/zero-article/infer"
KNOWN = {
    200: (INFER, *binary_request(bytes(784), [1, 28, 28])),
    400: (INFER, b"{", {}),
    413: (INFER, b"{}", {HEADER: str(10**9)}),
    415: (INFER, b"{}", {"content-encoding": "br"}),
    422: (INFER, *binary_request(bytes(784), [28, 28])),
}
"""A request per expected status. So few generated requests are valid that a small sample may contain none."""


async def test_no_body_is_a_server_error(make_settings: Callable[..., Settings]) -> None:
    """Each generated request gets 200, or a 4xx error in the format of the protocol."""
    statuses: dict[int, int] = {}
    pending: list[tuple[str, bytes, dict[str, str]]] = []

    @examples(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests())
    def generate(request: tuple[str, bytes, dict[str, str]]) -> None:
        pending.append(request)

    generate()
    async with running(make_settings()) as client:
        for path, body, headers in pending:
            encoded: dict[str, Any] = {name: value.encode() for name, value in headers.items()}
            reply = await client.post(path, content=body, headers=encoded)
            statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
            assert reply.status_code < 500, (path, body, headers, reply.text)
            if reply.status_code != 200:
                assert list(reply.json()) == ["error"], reply.text
            elif path.startswith("/v1"):
                assert reply.json()["predictions"]
        assert (await client.get("/readyz")).status_code == 200
        for status, (path, body, named) in KNOWN.items():
            assert (await client.post(path, content=body, headers=named)).status_code == status
    assert sum(statuses.values()) >= EXAMPLES, statuses
    if EXAMPLES >= 2000:
        assert KNOWN.keys() <= statuses.keys(), statuses
