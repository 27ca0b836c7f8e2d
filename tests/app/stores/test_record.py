"""Records: the store returns them unchanged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.stores.records import MAX_RECORD_BYTES, DamagedRecord, Record, unpack


@given(
    reply=st.binary(max_size=900),
    planes=st.binary(min_size=784 * 3, max_size=784 * 3),
    peak=st.floats(0, 1e6, width=32),
)
def test_a_record_survives_packing(reply: bytes, planes: bytes, peak: float) -> None:
    """Packing and unpacking a record changes nothing, and no record is above the bound that stores count with."""
    record = Record(reply, planes, peak)
    assert unpack(record.pack(), "") == record
    assert unpack(record._replace(id="7", owner="alice").pack(), "alice/7") == record
    assert len(record.pack()) <= MAX_RECORD_BYTES
    assert record.input + record.reconstruction + record.error_map == planes


@given(st.binary(max_size=4000))
def test_other_bytes_are_no_record(content: bytes) -> None:
    """Bytes that are not a record raise one error, and no other exception."""
    with pytest.raises(DamagedRecord):
        unpack(content, "")


@given(st.data())
def test_a_changed_record_is_found(data: st.DataObject) -> None:
    """A record with a changed byte, or under another id, is not returned."""
    record = Record(b'{"mse": 0.1}', bytes(784 * 3), 0.5, "a" * 44, "alice")
    content, key = bytearray(record.pack()), f"alice/{'a' * 44}"
    with pytest.raises(DamagedRecord):
        unpack(bytes(content), "a" * 44)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DamagedRecord):
        unpack(bytes(content), key)
