"""`POST /score/batch?fdr=`: q-values in JSON, the cut-off in the last line of NDJSON, and a problem for npy."""

from __future__ import annotations

import json

import httpx
import numpy as np
from scipy.stats import false_discovery_control

from tests.app.http.test_batch import bulk, digits, form
from tests.requests import assert_problem


async def test_json_has_q_values(client: httpx.AsyncClient, zero: bytes, six: bytes) -> None:
    """Each item with a score has the q-value of scipy; an item with a problem has none and does not count."""
    files = form(zero, b"no image", *[six] * 5, zero)
    found = (await client.post("/score/batch?fdr=0.99", **files)).json()
    scored = [item for item in found["items"] if "problem" not in item]
    assert (len(scored), found["failed"]) == (7, 1)
    expected = false_discovery_control([item["p_value"] for item in scored], method="bh")
    assert np.allclose([item["q_value"] for item in scored], expected)
    assert [item["discovery"] for item in scored] == [bool(q <= 0.99) for q in expected]
    assert found["discoveries"] == sum(item["discovery"] for item in scored) > 0
    assert found["cutoff"] == max(item["p_value"] for item in scored if item["discovery"])
    assert (found["fdr"], found["min_discoveries"], found["resolution_limited"]) == (0.99, 1, False)
    plain = (await client.post("/score/batch", **files)).json()
    assert "fdr" not in plain
    assert all("q_value" not in item for item in plain["items"])


async def test_the_last_line_of_ndjson_has_the_cutoff(client: httpx.AsyncClient) -> None:
    """The discoveries of JSON are the items whose p-value is at most the cut-off of the last line."""
    images = digits(700)
    lines = (await bulk(client, images, "application/x-ndjson", "?fdr=0.05")).text.splitlines()
    *items, last = map(json.loads, lines)
    document = (await bulk(client, images, query="?fdr=0.05")).json()
    assert len(items) == 700
    assert last == {name: document[name] for name in last}
    discovered = [last["cutoff"] is not None and item["p_value"] <= last["cutoff"] for item in items]
    assert discovered == [item["discovery"] for item in document["items"]]


async def test_what_has_no_place_is_rejected(client: httpx.AsyncClient) -> None:
    """npy cannot contain discoveries, and a rate is a number between 0 and 1."""
    reply = await bulk(client, digits(2), "application/x-npy", "?fdr=0.05")
    assert "npy" in assert_problem(reply, 422, "invalid-parameter")["detail"]
    for rate in ("5e-324", "0", "1", "nan", "x"):
        assert_problem(await bulk(client, digits(2), query=f"?fdr={rate}"), 422, "invalid-parameter")
