"""The page in a browser: drawing, dropping files, the slider, links, a folder, and every problem."""

from __future__ import annotations

import csv
import hashlib
import html
import io
import json
import os
import re
import struct
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from tests import model_stores, pngs
from tests.browser.conftest import draw_six, draw_zero, stroke
from tests.conftest import EXAMPLES, TRUSTS_NOBODY, Server

pytestmark = pytest.mark.browser

WORD = "#verdict-word"


def score_of(page: Page) -> float:
    return float(page.locator("#fact-mse").inner_text())


def answered(page: Page) -> None:
    expect(page.locator("#share")).to_be_visible()
    expect(page.locator("#answer")).not_to_contain_class("stale")
    for view in ("input", "reconstruction", "error"):
        expect(page.locator(f"#picture-{view}")).to_be_visible()


def choose(page: Page, name: str, content: bytes, kind: str = "image/png") -> None:
    page.locator("#file").set_input_files({"name": name, "mimeType": kind, "buffer": content})


def photo() -> bytes:
    """A picture of 400x300 like a photograph: a lit wall, a dark table, grain."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:300, 0:400] / 300
    planes = [160 + 70 * np.sin(2 * x + n) * np.cos(1.5 * y) - 90 * (y > 0.6) for n in range(3)]
    pixels = np.clip(np.stack(planes, 2) + rng.normal(0, 6, (300, 400, 3)), 0, 255).astype(np.uint8)
    return png_of(Image.fromarray(pixels))


def png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pictures(page: Page) -> dict[str, np.ndarray]:
    """The three pictures as the page shows them, uint8 [height, width, 3]."""
    read = """async (id) => {
        const image = document.getElementById(id);
        await image.decode();
        const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight), context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return [canvas.height, canvas.width, ...context.getImageData(0, 0, canvas.width, canvas.height).data];
    }"""
    found = {}
    for view in ("input", "reconstruction", "error"):
        height, width, *values = page.evaluate(read, f"picture-{view}")
        found[view] = np.array(values, np.uint8).reshape(height, width, 4)[:, :, :3]
    return found


def test_a_drawn_zero_and_six_are_told_apart(open_page: Callable[..., Page]) -> None:
    """Drawn with the mouse, a six scores higher than a zero; the default model calls one normal, the other not."""
    page = open_page()
    draw_zero(page)
    answered(page)
    expect(page.locator(WORD)).to_have_text("Normal")
    zero = score_of(page)
    seen = pictures(page)
    assert {picture.shape for picture in seen.values()} == {(28, 28, 3)}
    rows = np.flatnonzero(seen["input"].max((1, 2)))
    assert 20 <= rows[-1] - rows[0] + 1 <= 21
    assert seen["reconstruction"].max() > 100
    assert seen["error"].max() < 60, "the error map of a good reconstruction is dark"
    page.locator("#clear").click()
    expect(page.locator(WORD)).to_have_text("Nothing to judge yet")
    draw_six(page)
    answered(page)
    assert score_of(page) > zero
    assert np.ptp(pictures(page)["error"], axis=2).max() > 100, "the error map of a bad reconstruction has colours"
    if page.locator("#model").input_value() == "zero":
        expect(page.locator(WORD)).to_have_text("Anomalous")


def test_it_answers_while_one_draws(open_page: Callable[..., Page]) -> None:
    """The page shows a verdict during a stroke, and a later verdict replaces it."""
    page = open_page()
    box = page.locator("#pad").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 100, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + 110, box["y"] + 200, steps=8)
    answered(page)
    first = page.locator("#fact-id").inner_text()
    page.mouse.move(box["x"] + 230, box["y"] + 210, steps=8)
    expect(page.locator("#fact-id")).not_to_have_text(first)
    page.mouse.up()
    page.locator("#undo").click()
    expect(page.locator(WORD)).to_have_text("Nothing to judge yet")


def test_a_finger_draws_too(open_page: Callable[..., Page]) -> None:
    """Touch events on a phone draw strokes, and the page does not scroll during a stroke."""
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    box = page.locator("#pad").bounding_box()
    assert box is not None
    session = page.context.new_cdp_session(page)
    x, y = box["x"] + 150, box["y"] + 60
    for kind, points in (
        ("touchStart", [{"x": x, "y": y}]),
        *(("touchMove", [{"x": x, "y": y + 20 * n}]) for n in range(1, 11)),
        ("touchEnd", []),
    ):
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    answered(page)
    assert page.evaluate("scrollY") == 0


INKED = """() => {
  const { width, height } = document.querySelector("#pad");
  const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(document.querySelector("#pad"), 0, 0);
  const { data } = copy.getImageData(0, 0, width, height);
  return data.filter((value, at) => at % 4 === 0 && value > 127).length;
}"""
TWO_FINGERS = """() => {
  const pad = document.querySelector("#pad"), box = pad.getBoundingClientRect();
  pad.setPointerCapture = () => {};  // knows real fingers only
  const send = (type, pointerId, x, y) => pad.dispatchEvent(new PointerEvent(type, {
    pointerId, button: 0, clientX: box.left + x * box.width, clientY: box.top + y * box.height,
  }));
  send("pointerdown", 11, 0.2, 0.2);
  send("pointermove", 11, 0.3, 0.3);
  send("pointerdown", 12, 0.9, 0.9);
  send("pointerup", 12, 0.9, 0.9);
  send("pointermove", 11, 0.8, 0.8);
  send("pointerup", 11, 0.8, 0.8);
}"""


def test_a_tap_is_a_dot_and_a_palm_is_nothing(open_page: Callable[..., Page]) -> None:
    """A stroke may have any length, and ends when its finger is lifted."""
    page = open_page()
    page.locator("#pad").click()
    assert page.evaluate(INKED) > 1000
    expect(page.locator(WORD)).to_have_text(re.compile("Normal|Anomalous|cannot be distinguished"))
    page.locator("#clear").click()
    page.evaluate(TWO_FINGERS)
    # As long as a line from the first finger's beginning to its end, and no longer.
    assert 0.8 < page.evaluate(INKED) / (0.6 * 2**0.5 * 560 * 560 / 12.5) < 1.2


@pytest.mark.parametrize(("width", "height"), [(390, 664), (390, 844), (320, 800), (667, 375), (700, 900)])
def test_it_fits_small_screens(open_page: Callable[..., Page], width: int, height: int) -> None:
    """On a phone, the verdict is visible during drawing, and nothing is distorted or wider than the screen."""
    page = open_page(viewport={"width": width, "height": height}, has_touch=True, is_mobile=True)
    pad, word = page.locator("#pad").bounding_box(), page.locator(WORD).bounding_box()
    example = page.locator("#examples img").first.bounding_box()
    assert pad is not None
    assert word is not None
    assert example is not None
    assert pad["width"] == pytest.approx(pad["height"])
    assert pad["height"] < 0.8 * height
    assert word["y"] + word["height"] < max(height, pad["y"] + 150)
    assert example["width"] == pytest.approx(example["height"])
    for view in ("folder", "model", "one"):
        page.locator(f"[data-view={view}]").click()
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_a_six_from_the_examples_by_keyboard(open_page: Callable[..., Page]) -> None:
    """Without a pointer: tab to an example, press Enter, read the verdict and the score that the service gives."""
    page = open_page()
    page.locator("#examples button").nth(6).focus()
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator("#examples button img").nth(6).get_attribute("alt") == "a six"
    expect(page.locator("#fitted")).to_be_hidden()


def test_a_photograph_is_answered_in_words(open_page: Callable[..., Page]) -> None:
    """For a dropped photograph without a single digit, the page shows the reason and what to do."""
    page = open_page()
    drop(page, {"photo.png": photo()})
    expect(page.locator(WORD)).to_have_text("The stroke and the background cannot be distinguished")
    expect(page.locator("#verdict-why")).to_contain_text("crop the image")


def test_a_dropped_scan_is_inverted_and_said_to_be(open_page: Callable[..., Page]) -> None:
    """A dark digit on a bright 400x300 picture is inverted, cropped and centred, and the page lists these changes."""
    page = open_page()
    scan = Image.new("RGB", (400, 300), "#f4f0e6")
    with Image.open(EXAMPLES / "zero.png") as zero:
        large = zero.convert("L").resize((200, 200), Image.Resampling.BICUBIC)
    scan.paste(Image.new("RGB", large.size, "#22304a"), (150, 60), large)
    drop(page, {"scan.png": png_of(scan)})
    answered(page)
    expect(page.locator("#fitted")).to_contain_text("was inverted")


def test_a_jpeg_is_taken_too(open_page: Callable[..., Page]) -> None:
    """The browser converts other formats to PNG: a large JPEG of a zero is scored."""
    page = open_page()
    with Image.open(EXAMPLES / "zero.png") as zero:
        large = zero.convert("L").resize((3000, 3000), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=90)
    choose(page, "zero.jpg", buffer.getvalue(), "image/jpeg")
    answered(page)


def drop(page: Page, files: dict[str, bytes]) -> None:
    """Drop files on the page, as a person does."""
    page.evaluate(
        """(files) => {
            const transfer = new DataTransfer();
            for (const [name, bytes] of files) {
                transfer.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            }
            const drop = {dataTransfer: transfer, bubbles: true, cancelable: true};
            document.body.dispatchEvent(new DragEvent("drop", drop));
        }""",
        [[name, list(content)] for name, content in files.items()],
    )


def test_the_slider_moves_the_verdict(open_page: Callable[..., Page], service: Server) -> None:
    """When the slider passes an image's score, the verdict changes; the thresholds are those of `?alpha=`."""
    page = open_page()
    choose(page, "six.png", (EXAMPLES / "six.png").read_bytes())
    answered(page)
    model = page.locator("#fact-model").inner_text().rpartition(" ")
    calibration = service.get(f"/models/{model[0]}/versions/{model[2]}/calibration").json()
    mse = score_of(page)
    points = calibration["operating_points"]
    slider = page.locator("#alpha")
    verdicts = set()
    for index in (0, len(points) // 2, len(points) - 1):
        slider.evaluate("(slider, at) => { slider.value = at; slider.dispatchEvent(new Event('input')); }", index)
        wanted = "Anomalous" if mse > points[index]["threshold"] else "Normal"
        expect(page.locator(WORD)).to_have_text(wanted)
        verdicts.add(wanted)
        reply = service.post(
            f"/score?alpha={points[index]['alpha']}&model={model[0]}",
            content=(EXAMPLES / "six.png").read_bytes(),
            headers={"content-type": "image/png"},
        ).json()
        assert reply["threshold"] == points[index]["threshold"]
        assert reply["is_anomaly"] == (wanted == "Anomalous")
    if points[0]["threshold"] >= mse:
        assert verdicts == {"Normal", "Anomalous"}
    slider.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#alpha-text")).not_to_have_text("")
    page.locator("#alpha-reset").click()
    expect(page.locator("#fact-threshold")).not_to_have_text("")


def test_the_slider_crosses_a_score(open_page: Callable[..., Page]) -> None:
    """Some drawing is between the lowest and the highest threshold, so that the slider changes its verdict."""
    page = open_page()
    choose(page, "zero.png", (EXAMPLES / "zero.png").read_bytes())
    answered(page)
    slider = page.locator("#alpha")
    last = int(slider.get_attribute("max") or 0)
    words = []
    for index in (0, last):
        slider.evaluate("(slider, at) => { slider.value = at; slider.dispatchEvent(new Event('input')); }", index)
        words.append(page.locator(WORD).inner_text())
    # The example's score is one of the middle: at a false-alarm rate of one half it is on the other side.
    p_value = float(page.locator("#fact-p").inner_text())
    assert words == (["Normal", "Anomalous"] if p_value <= 0.5 else ["Normal", "Normal"])


def test_a_shared_link_shows_the_same_result(open_page: Callable[..., Page]) -> None:
    """In another browser, the link shows the same verdict, numbers and pictures, pixel for pixel."""
    page = open_page()
    draw_zero(page)
    answered(page)
    link = f"/#id={page.locator('#fact-id').inner_text()}"
    other = open_page(path=link)
    answered(other)
    for part in ("#verdict", "#facts"):
        assert other.locator(part).inner_text() == page.locator(part).inner_text()
    shown = pictures(page)
    assert all(np.array_equal(picture, shown[view]) for view, picture in pictures(other).items())


def test_a_folder_of_200_files(open_page: Callable[..., Page], photograph: Callable[..., None]) -> None:
    """200 files are scored, worst first, sortable, with a CSV that has a line for each."""
    page = open_page(path="/#folder")
    rng = np.random.default_rng(0)
    with Image.open(EXAMPLES / "zero.png") as zero, Image.open(EXAMPLES / "six.png") as six:
        planes = [np.asarray(image.convert("L"), int) for image in (zero, six)]
    files = {
        f"{['zero', 'six'][n % 2]}-{n:03}.png": png_of(
            Image.fromarray(np.clip(planes[n % 2] + rng.integers(0, 2 + n // 4, (28, 28)), 0, 255).astype(np.uint8))
        )
        for n in range(199)
    }
    files["=cut short.png"] = files["zero-000.png"][:60]
    page.locator("#folder-files").set_input_files(
        [{"name": name, "mimeType": "image/png", "buffer": content} for name, content in files.items()]
    )
    expect(page.locator("#folder-status")).to_contain_text("200 of 200 scored", timeout=60_000)
    expect(page.locator("#folder-status")).to_contain_text("1 refused")
    expect(page.locator("#folder-stop")).to_be_hidden()
    cells = page.locator("#folder-table tbody tr td:nth-child(3)")
    scores = [float(text) for text in cells.all_inner_texts() if text]
    assert len(scores) == 199
    assert scores == sorted(scores, reverse=True)
    photograph(page, "page-folder", whole=False)
    with page.expect_download() as download:
        page.locator("#folder-csv").click()
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_bytes().decode())))
    assert {row["name"] for row in rows} == {*(files.keys() - {"=cut short.png"}), "'=cut short.png"}
    assert [row["problem"] for row in rows if row["verdict"] == "refused"] == ["truncated-png"]
    page.get_by_role("button", name="File").click()
    names = page.locator("#folder-table tbody tr td:first-child").all_inner_texts()
    assert names[1] == "six-001.png"
    page.locator("#folder-table tbody a").first.click()
    answered(page)


REFUSALS: dict[str, tuple[str, bytes, str, str]] = {
    "no image": ("notes.png", b"these are words", "image/png", "The file is not an image"),
    "cut short": ("cut.png", (EXAMPLES / "zero.png").read_bytes()[:80], "image/png", "The PNG is truncated"),
    "damaged": ("bad.png", pngs.SIGNATURE + pngs.chunk(b"JUNK", b""), "image/png", "The PNG is corrupt"),
    "blank": ("blank.png", png_of(Image.new("L", (90, 60), 255)), "image/png", "The image is blank"),
    "all transparent": ("clear.png", png_of(Image.new("RGBA", (50, 50))), "image/png", "The image is blank"),
    "in colour": ("red.png", png_of(Image.new("RGB", (28, 28), "red")), "image/png", "The image is not greyscale"),
    "see-through": (
        "half.png",
        png_of(Image.new("RGBA", (28, 28), (9, 9, 9, 90))),
        "image/png",
        "The image has transparent pixels",
    ),
    "too many pixels": (
        "huge.png",
        pngs.SIGNATURE + pngs.header(9000, 9000) + pngs.chunk(b"IDAT", b"") + pngs.chunk(b"IEND"),
        "image/png",
        "The image has too many pixels",
    ),
    "too many bytes": (
        "padded.png",
        pngs.plain(None, pngs.chunk(b"teXt", bytes(100_000))),
        "image/png",
        "The request body is too large",
    ),
    "animated": (
        "moving.png",
        pngs.SIGNATURE + pngs.header() + pngs.chunk(b"acTL", struct.pack(">II", 2, 0)),
        "image/png",
        "The PNG is animated",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_each_refusal_is_in_clear_words(name: str, open_page: Callable[..., Page]) -> None:
    """For a file that cannot be scored, the page shows a title and what to do, and removes the earlier result."""
    file, content, kind, title = REFUSALS[name]
    page = open_page()
    choose(page, "zero.png", (EXAMPLES / "zero.png").read_bytes())
    answered(page)
    choose(page, file, content, kind)
    expect(page.locator(WORD)).to_have_text(title)
    expect(page.locator("#verdict-why")).not_to_be_empty()
    expect(page.locator("#facts")).to_be_hidden()
    expect(page.locator("#picture-input")).to_be_hidden()


def test_a_score_that_comes_too_late_is_said_to(
    open_page: Callable[..., Page], make_server: Callable[..., Server], tmp_path: Path
) -> None:
    """If a score exceeds its deadline, the page shows that the deadline was exceeded, and what to do."""
    environment = {"ANOMALY_MODEL_STORE": str(model_stores.hanging(tmp_path / "store"))}
    environment |= {"ANOMALY_DEFAULT_MODEL": "zero-article"}
    environment |= {"ANOMALY_DEADLINE_MS": "200", "ANOMALY_STORE_TIMEOUT_MS": "100"}
    server = make_server(**environment).start()
    page = open_page(server.url)
    choose(page, "white.png", pngs.plain(np.full((28, 28), 255, np.uint8)))
    expect(page.locator(WORD)).to_have_text("The deadline was exceeded")
    expect(page.locator("#verdict-why")).to_contain_text("Try again")


def test_a_service_without_a_model_is_said_to_be(
    open_page: Callable[..., Page], make_server: Callable[..., Server], tmp_path: Path
) -> None:
    """Without a loaded model, the page shows that no model is ready, and its button tries again."""
    (tmp_path / "empty").mkdir()
    environment = {"ANOMALY_MODEL_STORE": str(tmp_path / "empty"), "ANOMALY_ALLOW_EMPTY": "true"}
    server = make_server(**environment).start(wait=False)
    server.wait_ready("/livez")
    page = open_page(server.url, wait=False)
    expect(page.locator("#trouble")).to_contain_text("No model is ready")
    expect(page.locator("#model")).to_be_disabled()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#trouble")).to_contain_text("No model is ready")


def test_a_pasted_image_is_scored(open_page: Callable[..., Page]) -> None:
    """Ctrl-V with an image on the clipboard scores it, as a dropped one."""
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async (bytes) => {
            const blob = new Blob([new Uint8Array(bytes)], {type: "image/png"});
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }""",
        list((EXAMPLES / "six.png").read_bytes()),
    )
    page.locator("body").press("Control+v")
    answered(page)
    chosen = score_of(page)
    choose(page, "six.png", (EXAMPLES / "six.png").read_bytes())
    answered(page)
    assert score_of(page) == pytest.approx(chosen, rel=1e-3)


def test_a_dropped_folder_is_opened(open_page: Callable[..., Page], tmp_path: Path) -> None:
    """A folder dropped on the page is searched through with its subfolders, and its images are scored."""
    for name, source in (("a.png", "zero.png"), ("deep/b.png", "six.png"), ("deep/er/c.png", "zero.png")):
        target = tmp_path / "digits" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((EXAMPLES / source).read_bytes())
    (tmp_path / "digits" / "notes.txt").write_text("no image")
    page = open_page()
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        data = {"items": [], "files": [str(tmp_path / "digits")], "dragOperationsMask": 1}
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 600, "y": 400, "data": data})
    expect(page.locator("#folder-status")).to_contain_text("3 of 3 scored · 1 anomalous · 1 skipped")
    expect(page.locator("#folder-table tbody tr td:first-child").first).to_have_text("b.png")


def test_clearing_while_a_finger_is_down(open_page: Callable[..., Page]) -> None:
    """Clear and undo end the current stroke: further movement of the pen draws nothing until it is lifted."""
    page = open_page()
    box = page.locator("#pad").bounding_box()
    assert box is not None
    for button in ("clear", "undo"):
        page.mouse.move(box["x"] + 100, box["y"] + 80)
        page.mouse.down()
        page.mouse.move(box["x"] + 110, box["y"] + 200, steps=4)
        page.locator(f"#{button}").evaluate("button => button.click()")
        page.mouse.move(box["x"] + 200, box["y"] + 200, steps=4)
        page.mouse.up()
        expect(page.locator(WORD)).to_have_text("Nothing to judge yet")
    draw_zero(page)
    answered(page)


def test_a_small_jpeg_is_not_fitted(open_page: Callable[..., Page]) -> None:
    """An image of 28x28 pixels is scored unchanged, for any file format."""
    page = open_page()
    with Image.open(EXAMPLES / "zero.png") as zero:
        for kind in ("JPEG", "WEBP"):
            choose(
                page, f"zero.{kind}", pngs.saved(zero.convert("L"), format=kind, quality=95), f"image/{kind.lower()}"
            )
            answered(page)
            expect(page.locator("#fitted")).to_be_hidden()
            expect(page.locator(WORD)).to_have_text("Normal")
            page.locator("#fit").select_option("mnist")
            expect(page.locator("#fitted")).to_be_visible()
            page.locator("#fit").select_option("auto")


def test_the_error_map_has_a_scale(open_page: Callable[..., Page], service: Server) -> None:
    """The number at the bright end of the scale is ten times the threshold, or with the switch the largest error."""
    page = open_page()
    expect(page.locator("#error-most")).to_have_text("most")
    choose(page, "six.png", (EXAMPLES / "six.png").read_bytes())
    answered(page)
    reply = service.get(f"/reconstruction/{page.locator('#fact-id').inner_text()}?view=error")
    assert float(page.locator("#error-most").inner_text()) == pytest.approx(float(reply.headers["x-error-limit"]), 0.06)
    before = page.locator("#error-most").inner_text()
    page.locator("#error-scale").check()
    expect(page.locator("#error-most")).not_to_have_text(before)
    assert float(page.locator("#error-most").inner_text()) == pytest.approx(float(reply.headers["x-error-peak"]), 0.06)
    assert float(reply.headers["x-error-peak"]) > score_of(page)


def test_a_verdict_outlives_its_pictures(
    open_page: Callable[..., Page], service: Server, gateway: Callable[..., str]
) -> None:
    """If the pictures cannot be fetched, the verdict and its numbers remain, and the page shows what is missing."""
    url = gateway(service, refuse=lambda _, path: 503 if path.startswith("/reconstruction/") else None)
    page = open_page(url)
    choose(page, "six.png", (EXAMPLES / "six.png").read_bytes())
    expect(page.locator("#unkept")).to_be_visible()
    expect(page.locator(WORD)).to_have_text("Anomalous")
    expect(page.locator("#facts")).to_be_visible()
    expect(page.locator("#picture-input")).to_be_hidden()


def test_a_folder_tries_again(open_page: Callable[..., Page], service: Server, gateway: Callable[..., str]) -> None:
    """Requests with 429, 503 and 504 are repeated after the time in the reply, and every file gets its score."""
    refusals = iter([429, 503, 504])
    asked: list[float] = []

    def refuse(method: str, path: str) -> int | None:
        if not path.startswith("/score"):
            return None
        asked.append(time.monotonic())
        return next(refusals, None)

    page = open_page(gateway(service, refuse=refuse), path="/#folder")
    page.locator("#folder-files").set_input_files([EXAMPLES / "six.png"])
    expect(page.locator("#folder-status")).to_contain_text("1 of 1 scored · 1 anomalous")
    assert len(asked) == 4
    assert min(later - earlier for earlier, later in pairwise(asked)) >= 0.95


def test_a_file_that_goes_away_is_a_row(
    open_page: Callable[..., Page], service: Server, gateway: Callable[..., str], tmp_path: Path
) -> None:
    """A file that is deleted after it was chosen is a row with the reason, and the others are scored."""
    files = [tmp_path / f"{number}.png" for number in range(12)]
    for file in files:
        file.write_bytes((EXAMPLES / "zero.png").read_bytes())

    def refuse(method: str, path: str) -> None:
        if path.startswith("/score"):
            files[11].unlink(missing_ok=True)

    page = open_page(gateway(service, refuse=refuse), path="/#folder")
    page.locator("#folder-files").set_input_files(files)
    expect(page.locator("#folder-status")).to_contain_text("12 of 12 scored · 0 anomalous · 1 refused")
    expect(page.locator("#folder-table tbody tr").last).to_contain_text("The file cannot be read")


def test_a_wrong_size_is_refused_when_fitting_is_off(open_page: Callable[..., Page]) -> None:
    """Without fitting, the page shows the service's problem for an image of another size; with fitting it is scored."""
    page = open_page()
    with Image.open(EXAMPLES / "zero.png") as zero:
        choose(page, "large.png", png_of(zero.resize((90, 90))))
    answered(page)
    page.locator("#fit").select_option("strict")
    expect(page.locator(WORD)).to_have_text("The image does not have the model's input size")


def test_an_expired_link_is_said_to_be(open_page: Callable[..., Page]) -> None:
    """For a link to an expired reconstruction, the page shows the reason and what to do."""
    page = open_page(path="/#id=" + "0" * 32)
    expect(page.locator(WORD)).to_have_text("The reconstruction does not exist or has expired")
    expect(page.locator("#verdict-why")).to_contain_text("Draw or choose the image again")


def test_a_service_that_is_gone_is_said_to_be(
    open_page: Callable[..., Page], make_server: Callable[..., Server]
) -> None:
    """If the service stops, the page shows that it cannot be reached, and works again when the service is up."""
    server = make_server().start()
    page = open_page(server.url)
    server.stop()
    draw_zero(page)
    expect(page.locator(WORD)).to_have_text("The service cannot be reached")
    server.start()
    stroke(page, [(0.4, 0.5), (0.6, 0.5)])
    answered(page)


def test_an_overloaded_service_is_said_to_be(
    open_page: Callable[..., Page], make_server: Callable[..., Server]
) -> None:
    """While a slow upload takes the only place for fitting, the page shows `busy`, and a folder is retried."""
    server = make_server(ANOMALY_FIT_MAX_WAITING="1", ANOMALY_BODY_TIMEOUT_MS="60000").start()
    page = open_page(server.url)
    with slow_upload(server):
        draw_zero(page)
        expect(page.locator(WORD)).to_have_text("The service is overloaded")


class slow_upload:  # noqa: N801
    """A client that announces a body to `fit=mnist` and never sends all of it."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def __enter__(self) -> None:
        import socket

        self._socket = socket.create_connection(("127.0.0.1", self._server.port))
        head = "POST /score?fit=mnist HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: 999\r\n"
        self._socket.sendall(f"{head}expect: 100-continue\r\n\r\n".encode())
        # The service asks for the body once the place is taken (RFC 9110, 10.1.1).
        assert self._socket.recv(1024).startswith(b"HTTP/1.1 100 ")

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """Return the file of the API keys of a service that knows one key, `sesame`."""
    path = tmp_path / "keys"
    path.write_text(f"{hashlib.sha256(b'sesame').hexdigest()} someone\n")
    return path


def test_an_api_key_is_asked_for_and_sent(
    open_page: Callable[..., Page], make_server: Callable[..., Server], keys_file: Path
) -> None:
    """If the service needs keys, the page asks for one, sends it with every request, and deletes it with the tab.

    An image that was rejected without a key is scored when the user has entered one.
    """
    server = make_server(ANOMALY_API_KEYS_FILE=str(keys_file)).start()
    page = open_page(server.url, wait=False)
    expect(page.locator("#trouble")).to_contain_text("A valid API key is required")
    page.get_by_role("button", name="Enter a key").click()
    page.locator("#key").fill("wrong")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#trouble")).to_contain_text("A valid API key is required")
    page.locator("#key-open").click()
    page.locator("#key").fill("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.locator("#alpha")).to_be_enabled()
    page.evaluate("sessionStorage.setItem('api-key', 'no longer known')")
    draw_zero(page)
    expect(page.locator(WORD)).to_have_text("A valid API key is required")
    expect(page.locator("#answer")).not_to_contain_class("stale")
    page.locator("#key").fill("sesame")
    with page.expect_response("**/score?*") as late:
        page.evaluate("document.getElementById('fit').dispatchEvent(new Event('change'))")
    expect(page.get_by_text(late.value.headers["x-request-id"])).to_be_visible()
    page.keyboard.press("Enter")  # another rejected request does not change the key that is being typed
    answered(page)

    page.evaluate("sessionStorage.setItem('api-key', 'no longer known')")
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/score?*", hold, times=1)
    with page.expect_request("**/score?*"):
        page.evaluate("document.getElementById('fit').dispatchEvent(new Event('change'))")
    page.locator("#key-open").click()
    page.locator("#key").fill("sesame")
    with page.expect_response("**/score?*"):
        page.keyboard.press("Enter")
    held[0].continue_()  # the request with the old key is rejected after the new key was accepted
    answered(page)
    expect(page.locator("#key-dialog")).to_be_hidden()

    page.goto(f"{server.url}/#model")
    expect(page.locator("#card h1")).to_contain_text("Model card")
    expect(page.locator("#card img").first).to_be_visible()
    assert page.evaluate("localStorage.length") == 0
    assert page.evaluate("document.cookie") == ""


def test_it_works_behind_a_path_prefix(
    open_page: Callable[..., Page], make_server: Callable[..., Server], gateway: Callable[..., str]
) -> None:
    """Everything on the page works behind a gateway with a path prefix."""
    server = make_server(ANOMALY_ROOT_PATH="/anomaly").start()
    page = open_page(gateway(server, "/anomaly"), path="/anomaly/")
    draw_zero(page)
    answered(page)
    page.locator("nav a[data-view=model]").click()
    expect(page.locator("#card img").first).to_be_visible()


def test_the_interface_is_shown_and_tried_out(
    open_page: Callable[..., Page],
    make_server: Callable[..., Server],
    gateway: Callable[..., str],
    keys_file: Path,
) -> None:
    """`/docs` shows every route without files of other hosts, and scores a file with the key of the page."""
    server = make_server(ANOMALY_ROOT_PATH="/anomaly", ANOMALY_API_KEYS_FILE=str(keys_file)).start()
    page = open_page(gateway(server, "/anomaly"), path="/anomaly/docs", wait=False)
    described = httpx.get(f"{server.url}/openapi.json", verify=TRUSTS_NOBODY).json()["paths"]
    expect(page.locator(".opblock")).to_have_count(sum(map(len, described.values())))
    page.evaluate("sessionStorage.setItem('api-key', 'sesame')")
    page.reload()
    route = page.locator("#operations-Scores-score")
    route.locator(".opblock-summary-control").click()
    route.locator("input[type=file]").set_input_files(EXAMPLES / "six.png")
    route.locator(".execute").click()
    expect(page.locator(".live-responses-table td.response-col_status").last).to_contain_text("200")
    expect(page.locator(".live-responses-table")).to_contain_text('"is_anomaly": true')


def test_what_the_model_page_shows(open_page: Callable[..., Page], service: Server) -> None:
    """`/models/{name}` is a readable page for a browser and JSON for programs; its pictures load."""
    name = service.get("/readyz").json()["model"]
    page = open_page(path=f"/models/{name}", wait=False)
    expect(page.locator("h1")).to_contain_text(name)
    expect(page.locator("table").first).to_be_visible()
    sizes = page.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
    assert len(sizes) >= 5
    assert min(sizes) > 0
    assert service.get(f"/models/{name}").json()["name"] == name
    titles = page.locator("h2").all_inner_texts()
    assert titles[:2] == ["Limits", "How to use"]
    probes = page.locator("details", has_text="Probes")
    expect(probes.locator("table").first).to_be_hidden()
    probes.locator("summary").click()
    expect(probes.locator("table").first).to_be_visible()


SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
# Each width and each scheme once; the documentation's pictures need all pairs.
LOOKS = [("desktop", "light"), ("phone", "dark")]
if os.environ.get("SCREENSHOTS"):
    LOOKS += [("desktop", "dark"), ("phone", "light")]


@pytest.mark.parametrize(("device", "scheme"), LOOKS)
def test_everybody_can_use_it(
    device: str,
    scheme: str,
    open_page: Callable[..., Page],
    axe: str,
    photograph: Callable[..., None],
) -> None:
    """axe-core finds no violation on any view, wide or narrow, light or dark, and nothing is wider than the screen."""
    width, height = SCREENS[device]
    page = open_page(viewport={"width": width, "height": height}, color_scheme=scheme)

    def check(state: str) -> None:
        page.evaluate(axe)
        found = page.evaluate("axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))")
        assert found == [], f"{state}: {json.dumps(found, indent=1)}"
        assert page.evaluate("document.documentElement.scrollWidth") <= width, state

    check("before anything")
    draw_zero(page)
    answered(page)
    check("a zero")
    if scheme == "dark":
        photograph(page, f"page-{device}-dark")
    page.locator("#clear").click()
    draw_six(page)
    answered(page)
    check("a six")
    if scheme == "light":
        photograph(page, f"page-{device}-light")
    choose(page, "blank.png", REFUSALS["blank"][1])
    expect(page.locator(WORD)).to_have_text("The image is blank")
    check("a refusal")
    page.locator("#key-open").click()
    check("the key")
    page.keyboard.press("Escape")
    page.locator("nav a[data-view=folder]").click()
    check("the folder")
    page.locator("#folder-files").set_input_files(
        [{"name": "six.png", "mimeType": "image/png", "buffer": (EXAMPLES / "six.png").read_bytes()}]
    )
    expect(page.locator("#folder-status")).to_contain_text("1 of 1")
    check("a folder's table")
    page.locator("nav a[data-view=model]").click()
    expect(page.locator("#card img").last).to_be_visible()
    check("the model")
    photograph(page, f"model-{device}-{scheme}", whole=False)


@pytest.mark.parametrize(("device", "scheme"), LOOKS)
def test_an_unknown_path_is_a_page(
    device: str, scheme: str, open_page: Callable[..., Page], axe: str, photograph: Callable[..., None]
) -> None:
    """An unknown model gets a page that is accessible and leads to the first page."""
    width, height = SCREENS[device]
    size = {"width": width, "height": height}
    page = open_page(path="/models/unknown", wait=False, viewport=size, color_scheme=scheme)
    expect(page.locator("h1")).to_have_text("The model version does not exist")
    page.evaluate(axe)
    found = page.evaluate("axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))")
    assert found == [], json.dumps(found, indent=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    photograph(page, f"error-{device}-{scheme}", whole=False)
    page.get_by_role("link", name="Score an image").click()
    expect(page.locator("#alpha")).to_be_enabled()


def test_the_start_shows_the_address(
    open_page: Callable[..., Page], make_server: Callable[..., Server], photograph: Callable[..., None]
) -> None:
    """On a terminal, the log of a start has one readable line per model, and the address of the page."""
    server = make_server(ANOMALY_LOG_FORMAT="text").start()
    lines = server.log().splitlines()
    assert len(lines) >= 3
    assert server.url in next(line for line in lines if " started " in line)
    page = open_page(server.url)
    shown = ["$ make serve", *(line for line in lines if " request " not in line)]
    text = html.escape("\n".join(shown).replace(str(server.port), "8000"))
    page.goto("about:blank")
    page.set_content(f'<body style="background:#101319;color:#e9ecf2"><pre style="font:16px monospace">{text}</pre>')
    page.set_viewport_size({"width": 1120, "height": 110})
    photograph(page, "start", whole=False)
