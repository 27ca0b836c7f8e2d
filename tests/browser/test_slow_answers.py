"""The page with replies that arrive late, in another order, or never."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Error, FilePayload, Page, Route, expect

from tests.browser.conftest import draw_six, draw_zero, stroke
from tests.browser.test_page import WORD, answered, choose
from tests.conftest import EXAMPLES, Server

pytestmark = pytest.mark.browser

SIX = (EXAMPLES / "six.png").read_bytes()
ZERO = (EXAMPLES / "zero.png").read_bytes()


class Held:
    """Requests that are held until `release`."""

    def __init__(self, page: Page, pattern: str, **options: int) -> None:
        self.routes: list[Route] = []
        self._page = page
        self._pattern = pattern
        page.route(pattern, self._hold, **options)

    def _hold(self, route: Route) -> None:
        self.routes.append(route)

    def wait(self, count: int = 1) -> None:
        """Return when `count` requests are waiting."""
        for _ in range(100):
            if len(self.routes) >= count:
                return
            self._page.wait_for_timeout(50)
        raise AssertionError(f"{len(self.routes)} of {count} requests to {self._pattern}")

    def release(self) -> None:
        """Forward the held requests and all later ones. Requests that the page has aborted are ignored."""
        self._page.unroute(self._pattern)
        for route in self.routes:
            with contextlib.suppress(Error):
                route.continue_()


def kept(service: Server, content: bytes, **query: str | float) -> dict[str, object]:
    """Score an image by HTTP without the page, and return the reply."""
    reply = service.post("/score", params=query, content=content, headers={"content-type": "image/png"}).json()
    assert isinstance(reply, dict)
    return reply


def queries(page: Page) -> list[str]:
    """Return a list to which the URL of each later score request is added."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/score?" in request.url else None)
    return asked


def test_a_link_is_judged_at_its_own_rate(open_page: Callable[..., Page], service: Server) -> None:
    """A link with a rate between steps of the slider shows its own verdict; later scores use the slider's rate."""
    reply = kept(service, ZERO, alpha=0.73)
    assert reply["is_anomaly"], "the example's score is one of the middle"
    page = open_page(path=f"/#id={reply['id']}")
    answered(page)
    expect(page.locator(WORD)).to_have_text("Anomalous")
    expect(page.locator("#alpha-text")).to_have_text("73 %")
    expect(page.locator("#alpha")).to_be_enabled()
    page.locator("#alpha-reset").click()
    expect(page.locator(WORD)).to_have_text("Normal")
    expect(page).to_have_url(f"{service.url}/#one")
    answered(page)
    for change in ("fit", "drawing", "model"):
        page.goto(f"{service.url}/#id={reply['id']}")
        expect(page.locator("#alpha-text")).to_have_text("73 %")
        answered(page)
        asked = queries(page)
        if change == "fit":
            page.locator("#fit").select_option("mnist")
        elif change == "model":
            page.locator("#model").select_option("zero-article")
        else:
            page.locator("#pad").scroll_into_view_if_needed()
            draw_zero(page)
        expect(page).to_have_url(f"{service.url}/#one")
        expect(page.locator("#fact-id")).not_to_have_text(str(reply["id"]))
        answered(page)
        rate = "73 %" if change == "fit" else "1 %"  # no fit changes an image of a link
        expect(page.locator("#alpha-text")).to_have_text(rate)
        assert [("alpha=0.73" in url) for url in asked] == [change == "fit"] * len(asked)


def test_the_newest_question_is_answered(open_page: Callable[..., Page], service: Server) -> None:
    """A link that loads slowly replaces neither a drawing that was begun after it nor a newer link."""
    links = [str(kept(service, content)["id"]) for content in (SIX, ZERO)]
    page = open_page()
    for newer in ("drawing", "link"):
        late = Held(page, f"**/reconstruction/{links[0]}")
        page.evaluate(f"location.hash = '#id={links[0]}'")
        late.wait()
        if newer == "link":
            page.evaluate(f"location.hash = '#id={links[1]}'")
        else:
            draw_zero(page)
        expect(page.locator(WORD)).to_have_text("Normal")
        answered(page)
        late.release()
        page.wait_for_timeout(400)
        expect(page.locator(WORD)).to_have_text("Normal")
        expect(page.locator("#fact-id")).not_to_have_text(links[0])


def test_models_are_not_mixed_up(open_page: Callable[..., Page]) -> None:
    """Of two models selected one after the other, the later one is used, even if its threshold arrives first."""
    page = open_page()
    choose(page, "six.png", SIX)
    answered(page)
    threshold = page.locator("#fact-threshold").inner_text()
    late = Held(page, "**/models/zero-article/versions/*/calibration")
    page.locator("#model").select_option("zero-article")
    late.wait()
    page.locator("#model").select_option("zero")
    answered(page)
    scores = Held(page, "**/score?*")
    late.release()
    page.wait_for_timeout(400)
    expect(page.locator("#fact-model")).to_have_text("zero 1")
    expect(page.locator("#fact-threshold")).to_have_text(threshold)
    scores.release()


def test_an_old_verdict_is_no_answer(open_page: Callable[..., Page], service: Server) -> None:
    """While another image or model is requested, the old verdict fades, and is removed if the request takes long."""
    page = open_page()
    choose(page, "six.png", SIX)
    answered(page)
    for held, change in (
        ("**/score?*", lambda: choose(page, "zero.png", ZERO)),
        ("**/models", lambda: page.locator("#model").select_option("zero-article")),
    ):
        slow = Held(page, held)
        change()
        expect(page.locator("#answer")).to_have_attribute("aria-busy", "true")
        for part in ("#facts", "#share"):
            expect(page.locator(part)).to_have_css("opacity", "0.55")
        expect(page.locator(WORD)).to_have_text("Judging…")
        page.set_viewport_size({"width": 1000, "height": 900})
        page.locator("#copy").click()
        expect(page.locator(WORD)).to_have_text("Judging…")
        slow.release()
        answered(page)
        expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
        expect(page.locator("#verdict")).to_have_css("opacity", "1")
    page.evaluate(
        """() => {
            window.words = [];
            const word = document.getElementById("verdict-word");
            new MutationObserver(() => words.push(word.textContent)).observe(word, {childList: true});
        }"""
    )
    reply = kept(service, SIX)
    page.route("**/score?*", lambda route: route.fulfill(json=reply))
    choose(page, "six.png", SIX)
    expect(page.locator("#fact-id")).to_have_text(str(reply["id"]))
    assert "Judging…" not in page.evaluate("words"), "what is fast does not flicker"


def test_a_slow_line_answers_while_one_draws(open_page: Callable[..., Page]) -> None:
    """During drawing, the page sends one score request at a time; the final drawing is always scored."""
    page = open_page()
    given_up: list[str] = []
    page.on("requestfailed", lambda request: given_up.append(request.url) if "/score?" in request.url else None)
    slow = Held(page, "**/score?*")
    draw_six(page)
    slow.wait()
    for x in (0.2, 0.8, 0.9):
        stroke(page, [(x, 0.2), (x, 0.8)])
        page.wait_for_timeout(200)
    assert (len(slow.routes), given_up) == (1, [])
    slow.routes.pop().continue_()
    slow.wait()
    drawn = page.evaluate("document.getElementById('pad').toDataURL()")
    assert slow.routes[0].request.post_data_buffer == base64.b64decode(drawn.partition(",")[2])
    slow.release()
    answered(page)
    assert given_up == []


def test_what_is_known_outlives_a_failure(open_page: Callable[..., Page]) -> None:
    """If a score at a new rate fails, the verdict stays without its link, and 'Try again' repeats the request."""
    page = open_page()
    choose(page, "six.png", SIX)
    answered(page)
    page.route("**/score?*", lambda route: route.abort())
    page.locator("#alpha").press("ArrowRight")
    expect(page.locator("#unlinked")).to_contain_text("The service cannot be reached")
    expect(page.locator(WORD)).to_have_text("Anomalous")
    expect(page.locator("#picture-input")).to_be_visible()
    expect(page.locator("#share")).to_be_hidden()
    page.unroute("**/score?*")
    page.locator("#alpha").press("ArrowRight")
    answered(page)
    expect(page.locator("#unlinked")).to_be_hidden()

    page.route("**/score?*", lambda route: route.abort())
    choose(page, "zero.png", ZERO)
    expect(page.locator(WORD)).to_have_text("The service cannot be reached")
    page.unroute("**/score?*")
    page.get_by_role("button", name="Try again").focus()
    page.keyboard.press("Enter")
    answered(page)
    expect(page.locator(WORD)).to_have_text("Normal")
    expect(page.locator("#again")).to_be_hidden()
    expect(page.locator("#verdict")).to_be_focused()


def test_a_link_without_a_clipboard(open_page: Callable[..., Page]) -> None:
    """Without a clipboard, the link is put into the address bar, and the drawing is unchanged."""
    page = open_page()
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    draw_zero(page)
    answered(page)
    link = page.locator("#fact-id").inner_text()
    page.locator("#copy").click()
    expect(page.locator("#copy")).to_have_text("The link is in the address bar")
    assert page.url.endswith(f"#id={link}")
    page.wait_for_timeout(300)
    expect(page.locator("#undo")).to_be_enabled()
    expect(page.locator("#fact-id")).to_have_text(link)


def images(**contents: bytes) -> list[FilePayload]:
    """Return files for a file input: the name and the content of each keyword argument."""
    return [{"name": f"{name}.png", "mimeType": "image/png", "buffer": content} for name, content in contents.items()]


def need_key(route: Route) -> None:
    """Reply like a service that needs a key."""
    problem = {
        "type": "/problems/unauthorized",
        "title": "A valid API key is required",
        "status": 401,
        "hint": "Send a valid key in the header X-API-Key. The operator issues keys.",
    }
    route.fulfill(status=401, json=problem, content_type="application/problem+json")


def has_key(route: Route) -> bool:
    return route.request.headers.get("x-api-key") == "sesame"


def test_a_table_has_one_model_and_one_rate(open_page: Callable[..., Page], service: Server) -> None:
    """A folder is scored with the model and rate that are selected at its start, not with the rate of a link."""
    page = open_page(path=f"/#id={kept(service, ZERO, alpha=0.73)['id']}")
    answered(page)
    page.locator("nav a[data-view=folder]").click()
    asked = queries(page)
    slow = Held(page, "**/score?*")
    page.locator("#folder-files").set_input_files(images(**{f"n{number}": ZERO for number in range(8)}))
    slow.wait(4)
    page.locator("#model").select_option("zero-article")
    slow.release()
    status = page.locator("#folder-status")
    expect(status).to_have_text("8 of 8 scored · 0 anomalous · model zero, false-alarm rate 1 %")
    assert [url for url in asked if "alpha" in url] == []
    assert len([url for url in asked if "model=zero&" in url]) == 8


def test_a_folder_waits_for_models_and_a_key(open_page: Callable[..., Page]) -> None:
    """A folder waits for the list of models; if a key is needed, the page asks for it and starts the folder again."""
    page = open_page(path="/#folder")
    slow = Held(page, "**/models")
    page.reload()
    slow.wait()
    expect(page.locator("#view-folder")).to_be_visible()
    expect(page).to_have_title("A folder · Reconstruction anomaly")
    page.locator("#folder-files").set_input_files(images(a=ZERO, b=SIX))
    page.wait_for_timeout(300)
    slow.release()
    status = page.locator("#folder-status")
    expect(status).to_contain_text("2 of 2 scored · 1 anomalous · model zero")

    page.route("**/score?*", need_key)
    page.locator("#folder-files").set_input_files(images(**{f"n{number}": ZERO for number in range(9)}))
    expect(page.locator("#key-dialog")).to_be_visible()
    expect(status).to_have_text("0 of 9 scored · 0 anomalous · stopped: A valid API key is required")
    page.unroute("**/score?*")
    page.locator("#key").fill("sesame")
    page.keyboard.press("Enter")
    expect(status).to_contain_text("9 of 9 scored · 0 anomalous")


def test_a_folder_is_stopped_at_once_and_keeps_the_focus(open_page: Callable[..., Page]) -> None:
    """'Stop' ends a retry wait at once; new rows do not move the focus; announcements are not repeated for each row.

    Files without a suffix are tried, and a dropped file that cannot be read is counted and does not end the run.
    """
    page = open_page(path="/#folder")
    slow = Held(page, "**/score?*")
    page.locator("#folder-files").set_input_files(images(**{f"n{number}": ZERO for number in range(12)}))
    slow.wait(4)
    slow.routes.pop(0).continue_()
    page.locator("#folder-table a").first.focus()
    page.evaluate(
        """() => {
            window.news = 0;
            const status = document.querySelector("#view-folder [role=status]");
            new MutationObserver(() => (news += 1)).observe(status, {childList: true});
        }"""
    )
    for _ in range(4):
        slow.routes.pop(0).continue_()
        page.wait_for_timeout(250)
    expect(page.locator("#folder-table tbody tr")).to_have_count(5)
    assert page.evaluate("document.activeElement.matches('#folder-table a')")
    assert page.evaluate("news") <= 1
    slow.wait(4)
    while slow.routes:
        slow.routes.pop().fulfill(status=503, headers={"retry-after": "30"}, body="")
    page.wait_for_timeout(300)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#folder-status")).to_contain_text("5 of 12 scored · 0 anomalous · stopped")
    slow.release()

    page.evaluate(
        """(bytes) => {
            const entry = (name, found) => ({ webkitGetAsEntry: () => ({ isFile: true, name, file: found }) });
            const files = ["zero", "one"].map((name) => new File([new Uint8Array(bytes)], name));
            const items = [
                entry("gone.png", (resolve, reject) => reject(new Error("gone"))),
                ...files.map((file) => entry(file.name, (resolve) => resolve(file))),
            ];
            const drop = new Event("drop", { bubbles: true, cancelable: true });
            document.body.dispatchEvent(Object.assign(drop, { dataTransfer: { items, files: [] } }));
        }""",
        list(ZERO),
    )
    expect(page.locator("#folder-status")).to_contain_text("3 of 3 scored · 0 anomalous · 1 refused · model zero")


def test_a_card_stands_under_its_own_name(open_page: Callable[..., Page]) -> None:
    """Of two model cards, the page shows the one selected last, without missing pictures, and shows its error there."""
    page = open_page(path="/#model")
    card = page.locator("#card")
    expect(card.locator("h1")).to_contain_text("zero")
    late = Held(page, "**/models/zero-article")
    page.locator("#model").select_option("zero-article")
    late.wait()
    expect(card.locator("h1")).to_have_count(0)
    page.route("**/report/*", lambda route: route.abort(), times=1)
    page.locator("#model").select_option("zero")
    expect(card.locator("img[src]").last).to_be_visible()
    late.release()
    page.wait_for_timeout(300)
    expect(card.locator("h1")).not_to_contain_text("article")
    old = card.locator("img[src]").last.get_attribute("src")
    page.route("**/models/zero-article", lambda route: route.abort())
    page.locator("#model").select_option("zero-article")
    expect(card).to_contain_text("The service cannot be reached")
    loads = """(source) => new Promise((done) => {
        const image = new Image();
        Object.assign(image, { onload: () => done(true), onerror: () => done(false), src: source });
    })"""
    assert not page.evaluate(loads, old), "the old pictures are let go"


def test_a_drawing_comes_back(open_page: Callable[..., Page]) -> None:
    """A row of a folder shows its result in place of the drawing, which is there again on return.

    If undo and clear become disabled, the focus moves to the pad; an image pasted into the folder is scored there.
    """
    page = open_page()
    draw_zero(page)
    answered(page)
    drawn = "document.getElementById('pad').toDataURL()"
    before = page.evaluate(drawn)
    page.locator("nav a[data-view=folder]").click()
    page.locator("#folder-files").set_input_files(images(six=SIX))
    page.locator("#folder-table a").click()
    expect(page.locator(WORD)).to_have_text("Anomalous")
    answered(page)
    page.locator("nav a[data-view=folder]").click()
    page.locator("nav a[data-view=one]").click()
    expect(page.locator(WORD)).to_have_text("Normal")
    answered(page)
    assert page.evaluate(drawn) == before
    page.locator("#undo").press("Enter")
    expect(page.locator("#pad")).to_be_focused()
    page.locator("nav a[data-view=folder]").click()
    expect(page.locator("#folder-table")).to_be_visible()
    page.evaluate(
        """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "zero.png", { type: "image/png" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
        }""",
        list(ZERO),
    )
    expect(page.locator("#folder-table a")).to_have_text("zero.png")


def test_an_answer_that_breaks_off(open_page: Callable[..., Page]) -> None:
    """For an incomplete reply, the page shows that the service cannot be reached, and a folder repeats the request."""
    page = open_page()

    def cut(route: Route) -> None:
        route.fulfill(body='{"id": "0', content_type="application/json")

    page.route("**/score?*", cut, times=1)
    choose(page, "six.png", SIX)
    expect(page.locator(WORD)).to_have_text("The service cannot be reached")
    page.get_by_role("button", name="Try again").click()
    answered(page)
    page.locator("nav a[data-view=folder]").click()
    page.route("**/score?*", cut, times=1)
    page.locator("#folder-files").set_input_files(images(a=SIX))
    expect(page.locator("#folder-status")).to_contain_text("1 of 1 scored · 1 anomalous · model zero")


def test_noise_of_any_size_is_sent(open_page: Callable[..., Page]) -> None:
    """A large photograph that PNG does not compress well is still below the service's limit."""
    page = open_page()
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1100, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=95)
    choose(page, "noise.jpg", buffer.getvalue(), "image/jpeg")
    expect(page.locator(WORD)).to_have_text("The stroke and the background cannot be distinguished")


def test_a_key_without_a_place_to_keep_it(open_page: Callable[..., Page]) -> None:
    """Without session storage, the page keeps the key in memory, and it rejects text that cannot be a key."""
    page = open_page(wait=False)
    page.add_init_script("Object.defineProperty(window, 'sessionStorage', { get() { throw new Error('blocked'); } })")
    page.route("**/models", lambda route: route.continue_() if has_key(route) else need_key(route))
    page.reload()
    expect(page.locator("#trouble")).to_contain_text("A valid API key is required")
    expect(page.locator("#trouble")).not_to_contain_text("X-API-Key")
    for key in ("schlüssel", "秘密"):
        page.get_by_role("button", name="Enter a key").click()
        page.locator("#key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#trouble")).to_contain_text("This cannot be an API key")
    page.get_by_role("button", name="Enter a key").click()
    page.locator("#key").fill("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#alpha")).to_be_enabled()
    draw_zero(page)
    answered(page)


def test_a_newer_drawing_is_never_beside_an_older_verdict(open_page: Callable[..., Page], service: Server) -> None:
    """A reply that arrives after a newer action has begun is dimmed, and a link's late reply has no effect."""
    page = open_page()
    draw_six(page)
    answered(page)
    slow, pictures = Held(page, "**/score?*"), Held(page, "**/reconstruction/*view=*")
    stroke(page, [(0.36, 0.6), (0.36, 0.63)])  # on the six, so that it is scored again
    slow.wait()
    stroke(page, [(0.2, 0.2), (0.2, 0.8)])
    slow.routes.pop().continue_()
    pictures.wait()
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "true")
    pictures.release()
    slow.release()
    answered(page)

    identity = kept(service, SIX)["id"]
    late = Held(page, f"**/reconstruction/{identity}")
    page.evaluate(f"location.hash = '#id={identity}'")
    late.wait()
    asked = queries(page)
    stroke(page, [(0.2, 0.2), (0.2, 0.8)])
    late.release()
    answered(page)
    page.wait_for_timeout(300)
    assert [("fit=mnist" in url) for url in asked] == [True]
    expect(page.locator("#clear")).to_be_enabled()


def test_nothing_is_judged_for_ever(open_page: Callable[..., Page]) -> None:
    """The page does not show 'Judging…' permanently if a model loads slowly or a key is entered during a score."""
    page = open_page()
    page.route("**/calibration", lambda _: None)
    page.locator("#model").select_option("zero-article")
    page.wait_for_timeout(500)
    expect(page.locator(WORD)).to_have_text("Nothing to judge yet")
    page.unroute("**/calibration")
    page.locator("#model").select_option("zero")
    expect(page.locator("#alpha")).to_be_enabled()

    slow = Held(page, "**/score?*")
    choose(page, "six.png", SIX)
    slow.wait()
    expect(page.locator(WORD)).to_have_text("Judging…")
    page.route("**/models", lambda route: route.fulfill(status=503, json={"title": "Busy", "status": 503}))
    page.locator("#key-open").click()
    page.locator("#key").fill("key")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#trouble")).to_be_visible()
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
    page.unroute("**/models")
    slow.release()
    page.locator("#trouble button").click()
    expect(page.locator(WORD)).to_have_text("Anomalous")
