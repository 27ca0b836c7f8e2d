"""Bodies that schemathesis cannot invent: real images, arrays and forms besides random bytes.

Schemathesis imports this module in its own environment, which contains neither numpy nor the service.
"""

from __future__ import annotations

from pathlib import Path

import schemathesis
from hypothesis import strategies

_ROOT = Path(__file__).resolve().parent.parent.parent
_PNGS = [path.read_bytes() for path in sorted((_ROOT / "examples").glob("*.png"))]


def _array(count: int) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 28, 28), }}"
    padded = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode() + bytes(784 * count)


_images = strategies.one_of(strategies.sampled_from(_PNGS), strategies.binary(max_size=200))
_arrays = strategies.one_of(strategies.integers(0, 3).map(_array), strategies.binary(max_size=200))

schemathesis.openapi.media_type("image/png", _images)
schemathesis.openapi.media_type("application/x-npy", _arrays)
schemathesis.openapi.media_type("application/octet-stream", strategies.one_of(_images, _arrays))
schemathesis.openapi.format("binary", _images)


@schemathesis.hook
def filter_body(context: object, body: object) -> bool:
    """Leave out forms that are invalid only before they are encoded.

    In a form, a single value is sent like a list of one, and an empty list is not sent.
    """
    if not isinstance(body, dict) or not {"file", "files"} & body.keys():
        return True
    single = (value for name, value in body.items() if name != "files")
    return isinstance(body.get("files", []), list) and not any(
        isinstance(each, list) and len(each) < 2 for each in single
    )
