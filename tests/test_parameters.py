"""Every route rejects query parameters that it does not have, by name."""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx
import pytest

from app.http.routes import ROUTERS, problems, web
from app.settings import Settings
from tests.conftest import SHARED, running

PAGES = (web.router, problems.router)
"""Routers of pages, which ignore parameters: shared links carry tracking parameters."""
ROUTES = sorted(
    (method, route.path)
    for router in ROUTERS
    if router not in PAGES
    for route in router.routes
    for method in route.methods  # type: ignore[attr-defined]
)


def filled(path: str) -> str:
    """Return a path with a value for each of its parameters."""
    values = {"name": "zero-article", "version": "1", "file": "model-card.md", "id": "0" * 44}
    return re.sub(r"{(\w+)}", lambda found: values[found[1]], path)


@pytest.mark.parametrize(("method", "path"), ROUTES)
@SHARED
async def test_an_unknown_parameter_is_rejected_by_name(
    shared_client: httpx.AsyncClient, zero: bytes, method: str, path: str
) -> None:
    """The reply is 422, and its detail names the parameter and not the value."""
    image = {"content": zero, "headers": {"content-type": "image/png"}} if method == "POST" else {}
    reply = await shared_client.request(method, f"{filled(path)}?scal=4711", **image)  # type: ignore[arg-type]
    assert reply.status_code == 422
    if not path.startswith(("/v1/", "/v2")):  # the inference protocol has its own error format
        assert reply.json()["type"] == "/problems/invalid-parameter"
    assert "`scal`" in reply.json().get("detail", reply.json().get("error")) and "4711" not in reply.text


async def test_every_route_documents_the_statuses_of_any_request(client: httpx.AsyncClient) -> None:
    """Each operation lists the problems that need no image: unknown parameters, a foreign host, a damaged head."""
    paths = (await client.get("/openapi.json")).json()["paths"]
    documented = {(method, path): operation["responses"] for path in paths for method, operation in paths[path].items()}
    probes = {"/livez", "/readyz", "/metrics"}
    for method, path in ROUTES:
        if (method.lower(), path) not in documented:
            assert path == "/openapi.json"
            continue
        expected = {"400", "403", "413", "422", "500"} | (set() if path in probes else {"503"})
        assert expected <= set(documented[method.lower(), path]), path


async def test_the_detail_lists_the_parameters_of_the_route(client: httpx.AsyncClient) -> None:
    """The detail lists the parameters of the route, for general routes and for those of scores."""
    detail = (await client.get(f"/reconstruction/{'0' * 44}?scal=2")).json()["detail"]
    assert detail == "unknown parameter `scal`; the route has the parameters error_scale, scale, view"
    detail = (await client.post("/score?alhpa=0.1", content=b"x")).json()["detail"]
    assert detail == "unknown parameter `alhpa`; the route has the parameters alpha, fit, include, model"
    assert (await client.get("/livez?t=1")).json()["detail"] == "unknown parameter `t`; the route has no parameters"


async def test_a_parameter_given_twice_is_rejected(client: httpx.AsyncClient) -> None:
    """No route chooses silently between two values."""
    reply = await client.get(f"/reconstruction/{'0' * 44}?scale=2&scale=3")
    assert (reply.status_code, reply.json()["detail"]) == (422, "the parameter `scale` is given twice")


@pytest.mark.parametrize("path", ["/", "/docs", "/page/page.js", "/problems", "/problems/not-found"])
@SHARED
async def test_pages_ignore_what_links_carry(shared_client: httpx.AsyncClient, path: str) -> None:
    """A page opens from a link with a tracking parameter."""
    assert (await shared_client.get(f"{path}?utm_source=mail")).status_code == 200


@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
async def test_the_document_names_the_prefix(make_settings: Callable[..., Settings]) -> None:
    """The OpenAPI document has the gateway's prefix as its server, and none without a prefix."""
    async with running(make_settings(root_path="/anomaly")) as client:
        assert (await client.get("/openapi.json")).json()["servers"] == [{"url": "/anomaly"}]
    async with running(make_settings()) as client:
        assert "servers" not in (await client.get("/openapi.json")).json()


async def test_openapi_describes_the_fields_of_a_form(client: httpx.AsyncClient) -> None:
    """The form of `POST /score` has the parameters of the query as fields, with the same limits."""
    operation = (await client.get("/openapi.json")).json()["paths"]["/score"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert set(form) == {"file"} | {each["name"] for each in operation["parameters"]}
    assert (form["alpha"]["type"], form["alpha"]["exclusiveMaximum"]) == ("number", 1)
    assert form["fit"]["enum"] == ["strict", "mnist", "resize"]
    assert form["include"]["const"] == "reconstruction"
    assert all("description" in field for name, field in form.items() if name != "file")
