"""All routes except `POST /score`: reconstructions, models, probes, metrics, and unknown paths."""

from __future__ import annotations

import asyncio
import io
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from app import __version__, settings
from app.http.routes import ROUTERS
from app.images import pictures, png
from app.settings import Settings
from tests import model_stores, pngs
from tests.conftest import ROOT, SHARED, running, services
from tests.requests import assert_problem, raw
from tests.waiting import until


def picture(response: httpx.Response) -> Image.Image:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(response.content))


async def test_views_show_what_was_scored(client: httpx.AsyncClient, zero: bytes) -> None:
    """`input` is the image itself, `reconstruction` what the module redrew, `error` their squared difference."""
    reply = (await raw(client, zero)).json()
    path = reply["reconstruction"]
    given = np.frombuffer(png.decode(zero), np.uint8).reshape(28, 28)
    assert np.array_equal(np.asarray(picture(await client.get(f"{path}?view=input"))), given)
    version = services(client).registry.current("zero-article")
    assert version is not None
    found = version.detector.detect(given.reshape(1, 1, 28, 28).copy())
    redrawn = np.asarray(picture(await client.get(path))).astype(float) / 255
    assert np.abs(redrawn - found.reconstruction[0, 0]).max() <= 0.5 / 255 + 1e-6
    error = np.rint(found.error_map[0] / found.error_map[0].max() * 255).astype(np.uint8)
    relative = await client.get(f"{path}?view=error&error_scale=image")
    assert np.array_equal(np.asarray(picture(relative)), pictures.error_picture(error.tobytes()))
    peak = float(relative.headers["x-error-peak"])
    assert peak == float(relative.headers["x-error-limit"]) == pytest.approx(found.error_map[0].max(), rel=1e-5)
    absolute = await client.get(f"{path}?view=error")
    limit = float(absolute.headers["x-error-limit"])
    assert limit == pytest.approx(10 * reply["threshold"], rel=1e-5)
    shown = np.asarray(picture(absolute)).astype(int)
    assert np.abs(shown - pictures.error_picture(error.tobytes(), peak / limit)).max() <= 3
    assert shown.sum() < np.asarray(picture(relative)).sum(dtype=int), "a good reconstruction is darker on this scale"
    assert found.error_map[0].mean() == pytest.approx(reply["mse"], rel=1e-5)


@pytest.mark.parametrize("scale", [1, 8, 16])
@SHARED
async def test_views_scale(shared_client: httpx.AsyncClient, six: bytes, scale: int) -> None:
    """`scale` enlarges every view."""
    path = (await raw(shared_client, six)).json()["reconstruction"]
    assert picture(await shared_client.get(f"{path}?scale={scale}")).size == (28 * scale, 28 * scale)
    assert picture(await shared_client.get(f"{path}?view=panel&scale={scale}")).size[0] == 92 * scale


async def test_drawing_a_panel_holds_up_nothing(
    client: httpx.AsyncClient, zero: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a panel is drawn, other requests are served."""
    drawing, answered = threading.Event(), threading.Event()
    draw = pictures.panel

    def slowly(*arguments: Any, **options: Any) -> bytes:
        drawing.set()
        assert answered.wait(10), "the event loop waits for the panel"
        return draw(*arguments, **options)

    monkeypatch.setattr(pictures, "panel", slowly)
    path = (await raw(client, zero)).json()["reconstruction"]
    panel = asyncio.create_task(client.get(f"{path}?view=panel&scale=16"))
    await until(drawing.is_set)
    assert (await raw(client, zero)).status_code == 200
    answered.set()
    assert (await panel).status_code == 200


async def test_a_picture_whose_client_left_is_not_drawn(
    client: httpx.AsyncClient, zero: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that waits for its picture ends with its connection, and counts as 499."""
    drawn = []
    monkeypatch.setattr("app.images.pictures.panel", lambda *_, **__: drawn.append(1) or b"")
    path, worker, free = (
        (await raw(client, zero)).json()["reconstruction"],
        services(client).pictures,
        threading.Event(),
    )
    worker.submit(lambda: free.wait(10), "another client")
    requests = [asyncio.create_task(client.get(f"{path}?view=panel")) for _ in range(20)]
    await until(lambda: worker.others_waiting[0])
    await left(client, f"{path}?view=panel")
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    free.set()
    await worker.run(lambda: None, "the last client")
    assert not drawn
    count = 'anomaly_http_requests_total{route="/reconstruction/{id}",status="499"} '
    assert f"{count}1.0" in (await client.get("/metrics")).text


async def left(client: httpx.AsyncClient, path: str) -> None:
    """Send a GET whose client closes its connection at once."""
    messages = iter([{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(message: dict[str, Any]) -> None:
        raise AssertionError(message)

    url = httpx.URL(path)
    scope = {"type": "http", "method": "GET", "path": url.path, "query_string": url.query, "headers": []}
    scope |= {"root_path": "", "http_version": "1.1", "scheme": "http", "client": ("192.0.2.1", 1)}
    await client.app(scope, receive, send)  # type: ignore[attr-defined]


async def test_clients_take_turns_with_pictures(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """A client with many panels delays the panel of another client by one of them."""
    order: list[str] = []
    async with running(make_settings()) as client:
        path = (await raw(client, zero)).json()["reconstruction"]
        worker, free = services(client).pictures, threading.Event()
        worker.submit(lambda: free.wait(10), "a third client")
        async with (
            client_at(client, "192.0.2.1") as many,
            client_at(client, "192.0.2.2") as one,
        ):
            waiting = [asyncio.create_task(noted(order, "many", many.get(f"{path}?view=panel"))) for _ in range(8)]
            await until(lambda: worker.others_waiting[0])
            waiting.append(asyncio.create_task(noted(order, "one", one.get(f"{path}?view=panel"))))
            await until(lambda: len(worker._lanes) == 2)
            free.set()
            await asyncio.gather(*waiting)
    assert order.index("one") <= 2, order


def client_at(client: httpx.AsyncClient, address: str) -> httpx.AsyncClient:
    """Return another client of the same application."""
    transport = httpx.ASGITransport(client.app, client=(address, 1))  # type: ignore[attr-defined]
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def noted(order: list[str], name: str, request: Awaitable[httpx.Response]) -> None:
    """Wait for a reply and append the name of its client."""
    assert (await request).status_code == 200
    order.append(name)


@pytest.mark.parametrize("tag", ["{}", "W/{}", '"other", W/{}', "*", " {} "])
@SHARED
async def test_a_page_that_has_not_changed_is_304(shared_client: httpx.AsyncClient, tag: str) -> None:
    """`If-None-Match` may be a list, and weak: a gateway that compresses makes the tag weak (RFC 9110, 13.1.2)."""
    known = (await shared_client.get("/page/page.js")).headers["etag"]
    for given, status in ((tag.format(known), 304), ('W/"other"', 200)):
        assert (await shared_client.get("/page/page.js", headers={"if-none-match": given})).status_code == status


@SHARED
async def test_a_deep_path_gets_no_page(shared_client: httpx.AsyncClient) -> None:
    """The links of an error page repeat `../` for each folder, so 60,000 folders get the problem as JSON."""
    for folders, kind in ((7, "text/html"), (60_000, "application/problem+json")):
        reply = await shared_client.get("/page" + "/" * folders, headers={"accept": "text/html"})
        assert reply.status_code == 404
        assert reply.headers["content-type"].startswith(kind)
        assert len(reply.content) < 10_000


async def test_the_id_gives_the_reply_again(client: httpx.AsyncClient, zero: bytes) -> None:
    """With `Accept: application/json`, an id returns exactly the reply of its score."""
    reply = (await raw(client, zero)).json()
    again = await client.get(reply["reconstruction"], headers={"accept": "application/json"})
    assert again.json() == reply


async def test_reconstructions_are_private(client: httpx.AsyncClient, zero: bytes) -> None:
    """No cache may keep a reconstruction, no browser may guess its type, and ids are random."""
    replies = [(await raw(client, zero)).json() for _ in range(50)]
    headers = (await client.get(replies[0]["reconstruction"])).headers
    assert headers["cache-control"] == "private, no-store"
    assert headers["x-content-type-options"] == "nosniff"
    bits = np.array([[int(digit, 16) for digit in reply["id"][12:]] for reply in replies])
    assert bits.shape == (50, 32)
    assert len({reply["id"] for reply in replies}) == 50
    assert all(len(set(column)) > 4 for column in bits.T)


@pytest.mark.parametrize("key", ["0" * 44, "nope", "A" * 44, "0" * 45])
@SHARED
async def test_unknown_ids_are_404(shared_client: httpx.AsyncClient, key: str) -> None:
    """An unknown id and a text that cannot be an id get the same 404."""
    response = await shared_client.get(f"/reconstruction/{key}")
    assert_problem(response, 404, "reconstruction-not-found")


async def test_expired_ids_are_404(make_settings: Callable[..., Settings], zero: bytes) -> None:
    """After its time to live, an id gets the same reply as an unknown id."""
    async with running(make_settings(store_ttl_seconds=0.001)) as client:
        reply = (await raw(client, zero)).json()
        assert_problem(await client.get(reply["reconstruction"]), 404, "reconstruction-not-found")


@pytest.mark.parametrize("query", ["view=nothing", "scale=0", "scale=17", "scale=big"])
@SHARED
async def test_bad_views_are_422(shared_client: httpx.AsyncClient, zero: bytes, query: str) -> None:
    """An unknown view or scale is rejected, and the problem names the parameter."""
    path = (await raw(shared_client, zero)).json()["reconstruction"]
    document = assert_problem(await shared_client.get(f"{path}?{query}"), 422, "invalid-parameter")
    assert query.partition("=")[0] in document["detail"]


async def test_a_store_that_is_down_stops_no_score(
    make_settings: Callable[..., Settings], tmp_path: Path, zero: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a store, scores have a null id and are counted, and /readyz names the store; ids return with the store.

    The log contains the failure, but not the path of the store.
    """
    folder = tmp_path / "gone"
    folder.write_text("a file where the folder should be")
    async with running(make_settings(store_url=f"sqlite:///{folder}/reconstructions.db")) as client:
        for _ in range(3):
            reply = (await raw(client, zero)).json()
            assert reply["id"] is None
            assert reply["reconstruction"] is None
            assert reply["mse"] > 0
        readiness = (await client.get("/readyz")).json()
        assert readiness["ready"]
        assert readiness["store"] == "down"
        assert_problem(await client.get(f"/reconstruction/{'0' * 44}"), 503, "store-unavailable")
        assert "anomaly_reconstructions_dropped_total 3.0" in (await client.get("/metrics")).text
        assert "store down" in caplog.text
        assert str(tmp_path) not in caplog.text
        folder.unlink()
        await services(client).reconstructions.check()
        assert (await raw(client, zero)).json()["id"] is not None
        assert (await client.get("/readyz")).json()["store"] == "up"


async def test_models_tell_what_is_served(client: httpx.AsyncClient) -> None:
    """The list, the manifest of the current version and of a named version agree."""
    listed = {model["name"]: model for model in (await client.get("/models")).json()["models"]}
    model = listed["zero-article"]
    assert model["current"] in model["versions"]
    manifest = (await client.get("/models/zero-article")).json()
    assert manifest == (await client.get(f"/models/zero-article/versions/{model['current']}")).json()
    assert manifest["threshold"] == model["threshold"]
    assert manifest["metrics"]["auroc"] > 0.5


async def test_report_files_are_served_as_published(client: httpx.AsyncClient) -> None:
    """Every file of the report is fetched with its media type; nothing else of a version is."""
    manifest = (await client.get("/models/zero-article")).json()
    base = f"/models/zero-article/versions/{manifest['version']}/report"
    reports = [path.removeprefix("report/") for path in manifest["files"] if path.startswith("report/")]
    assert {"loss.png", "reconstructions.png", "model-card.md"} <= set(reports)
    for file in reports:
        response = await client.get(f"{base}/{file}")
        assert response.status_code == 200
        assert response.content == (model_stores.SHIPPED / "report" / file).read_bytes()
    for file in ("../model.pt", "..%2fmodel.pt", "model.pt", "nothing.png"):
        assert (await client.get(f"{base}/{file}")).status_code == 404


@pytest.mark.parametrize(
    "path", ["/models/nothing", "/models/zero-article/versions/99", "/models/..%2f..", "/nothing", "/v3"]
)
@SHARED
async def test_what_is_not_there_is_404(shared_client: httpx.AsyncClient, path: str) -> None:
    """Unknown models, versions and paths are problems."""
    response = await shared_client.get(path)
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/score"), ("PUT", "/score"), ("POST", "/models"), ("DELETE", f"/reconstruction/{'0' * 44}")],
)
@SHARED
async def test_wrong_methods_are_405(shared_client: httpx.AsyncClient, method: str, path: str) -> None:
    """An unsupported method of a known path gets 405, and the header Allow lists the supported methods."""
    response = await shared_client.request(method, path)
    assert_problem(response, 405, "method-not-allowed")
    assert response.headers["allow"]


@pytest.mark.parametrize("path", ["/models/", "/readyz/", "/score/", "/score/batch/", "/models/zero-article/"])
@SHARED
async def test_no_reply_sends_anybody_elsewhere(shared_client: httpx.AsyncClient, path: str) -> None:
    """A path with an additional slash gets 404, not a redirect to the host in the request."""
    for method in ("GET", "POST"):
        response = await shared_client.request(method, path, headers={"host": "evil"})
        assert_problem(response, 404, "not-found")
        assert "location" not in response.headers


async def test_metrics_count_what_happened(client: httpx.AsyncClient, zero: bytes) -> None:
    """The metrics count a score and a rejected request, and their labels contain routes instead of paths."""
    await raw(client, zero)
    await raw(client, b"nonsense")
    await client.get("/reconstruction/0123")
    await client.get("/secret/path")
    text = (await client.get("/metrics")).text
    assert 'anomaly_http_requests_total{route="/score",status="200"} 1.0' in text
    assert 'anomaly_http_requests_total{route="/score",status="422"} 1.0' in text
    assert 'anomaly_http_requests_total{route="/reconstruction/{id}",status="404"} 1.0' in text
    assert 'anomaly_http_requests_total{route="unknown",status="404"} 1.0' in text
    assert 'anomaly_score_stage_duration_seconds_count{stage="forward"} 1.0' in text
    assert 'anomaly_model_version{model="zero-article"} 1.0' in text
    assert "ready 1.0" in text
    assert "secret" not in text
    assert "reconstruction/0123" not in text


@pytest.mark.parametrize(
    ("accept", "is_open"),
    [
        ("", False),
        ("*/*", False),
        ("text/html", False),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", False),
        ("application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", True),
    ],
)
async def test_accept_chooses_the_format_of_the_metrics(client: httpx.AsyncClient, accept: str, is_open: bool) -> None:
    """A scraper that prefers OpenMetrics, such as Prometheus, gets it with the same series; others get text."""
    response = await client.get("/metrics", headers={"accept": accept})
    kind = "application/openmetrics-text" if is_open else "text/plain"
    assert response.status_code == 200 and response.headers["content-type"].startswith(f"{kind}; version=1.0.0")
    assert response.headers["vary"] == "accept"
    assert response.text.endswith("# EOF\n") is is_open
    parse = openmetrics.text_string_to_metric_families if is_open else text_string_to_metric_families
    names = {sample.name for family in parse(response.text) for sample in family.samples}
    assert {"anomaly_ready", "anomaly_degraded_total", "anomaly_forward_pass_images_bucket"} <= names


@pytest.mark.parametrize("path", ["/", "/models", "/readyz", "/openapi.json", "/docs", "/nothing"])
@SHARED
async def test_head_is_get_without_the_body(shared_client: httpx.AsyncClient, path: str) -> None:
    """The reply to HEAD has the status and the headers of GET, and no body (RFC 9110, 9.3.2)."""
    asked, got = await shared_client.head(path), await shared_client.get(path)
    assert (asked.status_code, asked.content) == (got.status_code, b"")
    for name in ("content-type", "content-length"):
        assert asked.headers[name] == got.headers[name], name


async def test_what_answers_no_get_answers_no_head(client: httpx.AsyncClient) -> None:
    """HEAD of a `POST` route gets 405 with `Allow: POST`; the header Allow of a GET route also lists HEAD."""
    assert (await client.head("/score")).headers["allow"] == "POST"
    assert (await client.delete("/models")).headers["allow"] == "GET, HEAD"


async def test_no_route_takes_a_model_a_path_or_an_address(client: httpx.AsyncClient) -> None:
    """The API has only these operations: no route loads or registers a model, or takes a path."""
    document = (await client.get("/openapi.json")).json()
    surface = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert {each for each in surface if each[0] != "GET"} == {
        ("POST", "/score"),
        ("POST", "/score/batch"),
        ("POST", "/v1/models/{name}:predict"),
        ("POST", "/v2/models/{name}/infer"),
        ("POST", "/v2/models/{name}/versions/{version}/infer"),
    }


def test_the_list_of_paths_is_complete() -> None:
    """`app.settings` contains the first segment of every route, and nothing else."""
    found = {route.path for router in ROUTERS for route in router.routes} | {"/openapi.json"}  # type: ignore[attr-defined]
    assert {path.split("/")[1] for path in found} - {""} == settings._FIRST_SEGMENTS


def test_the_version_is_that_of_the_package() -> None:
    """The constant and pyproject.toml agree."""
    assert f'\nversion = "{__version__}"\n' in (ROOT / "pyproject.toml").read_text()


async def test_openapi_documents_both_bodies_and_every_problem(client: httpx.AsyncClient) -> None:
    """The document names both body forms of `POST /score`, its parameters and its problems."""
    score = (await client.get("/openapi.json")).json()["paths"]["/score"]["post"]
    assert set(score["requestBody"]["content"]) == {"image/png", "multipart/form-data"}
    assert {parameter["name"] for parameter in score["parameters"]} == {"model", "alpha", "fit", "include"}
    assert {"200", "400", "404", "408", "413", "415", "422", "500", "503", "504"} <= set(score["responses"])
    assert "application/problem+json" in score["responses"]["422"]["content"]


async def test_openapi_shows_no_error_but_problems(client: httpx.AsyncClient) -> None:
    """Every 4xx and 5xx in the document is a problem, except for readiness reports and the inference protocol."""
    document = (await client.get("/openapi.json")).json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if status >= "400" and path not in ("/readyz", "/v2/health/ready"):
                    kind = "json" if path.startswith(("/v1/", "/v2")) else "problem+json"
                    assert set(response["content"]) == {f"application/{kind}"}, (path, status)


async def test_a_failure_nobody_foresaw_is_a_problem(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in a route or on the fast path is a 500 problem without internal details."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("at /secret/path")

    monkeypatch.setattr(services(client).registry, "names", fail)
    monkeypatch.setattr(services(client).registry, "select", fail)
    for response in (await client.get("/models"), await raw(client, pngs.plain())):
        document = assert_problem(response, 500, "internal-error")
        assert "secret" not in str(document)


async def test_a_loop_of_links_in_the_model_store_is_never_a_500(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """Each route of models returns data of the loaded version, or 404 or 503."""
    store = model_stores.copy(tmp_path / "store", 1, 2, current=2)
    ends = ("", "/calibration", "/report/model-card.md")
    paths = ["", "/zero-article", *(f"/zero-article/versions/{n}{end}" for n in (1, 2) for end in ends)]
    async with running(make_settings(model_store=store, watch_seconds=300)) as client:
        for broken in ("2/report/model-card.md", "2/manifest.json", "2", "CURRENT", ""):
            path = store / "zero-article" / broken
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            path.symlink_to(path.name)
            await services(client).registry.refresh()
            replies = [await client.get(f"/models{path}") for path in paths]
            replies += [await client.get("/models/zero-article", headers={"accept": "text/html"})]
            replies += [await client.post(f"/score?model=zero-article@{n}") for n in (1, 2, 3)]
            assert {reply.status_code for reply in replies} <= {200, 400, 404, 503}, [r.status_code for r in replies]


async def test_a_version_has_one_address(client: httpx.AsyncClient) -> None:
    """Other spellings of a number are a 422, as they are in `model=name@version`."""
    for number in ("01", "+1", "1.0", "1e0", "0", "-1", " 1", "１", "1_0", "9999999999"):
        for end in ("", "/calibration", "/report/model-card.md"):
            reply = await client.get(f"/models/zero-article/versions/{number}{end}")
            assert_problem(reply, 422, "invalid-parameter")
