"""The contact sheet of `anomaly review` in a browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser

from anomaly.cli.review_sheet import sheet
from anomaly.cli.reviewing import ReviewFolder, read_labels
from app.models.repository import Repository
from app.scoring.review.folder import ReviewFolder as Queue
from app.scoring.review.queue import ReviewQueue
from app.scoring.verdict import Verdict
from app.telemetry.metrics import Metrics
from tests.conftest import MODEL_STORE


@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (320, "dark")])
def test_the_sheet_saves_labels(browser: Browser, axe: str, tmp_path: Path, width: int, scheme: str) -> None:
    """The saved file contains the chosen labels; the sheet is accessible and not wider than the screen."""
    queue = ReviewQueue(Queue(tmp_path / "review", 100, 10**6), Metrics(), share=1.0, near=3)
    manifest = Repository(MODEL_STORE).manifest("zero", 1)
    for level in (0, 100, 200):
        queue.offer(manifest, np.full(784, level, np.uint8).tobytes(), Verdict(0.1, 0.5, False, None))
    assert queue.close(30)
    folder = ReviewFolder(tmp_path / "review")
    (tmp_path / "sheet.html").write_text(sheet(folder.pending()))
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    try:
        page = context.new_page()
        page.goto((tmp_path / "sheet.html").as_uri())
        page.evaluate(axe)
        found = page.evaluate("axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))")
        assert found == [], json.dumps(found, indent=1)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_label("normal").nth(0).check()
        page.get_by_label("anomalous").nth(2).check()
        with page.expect_download() as download:
            page.get_by_role("button").click()
        assert download.value.suggested_filename == "labels.csv"
        download.value.save_as(tmp_path / "labels.csv")
    finally:
        context.close()
    first, _, last = folder.pending()
    assert read_labels(tmp_path / "labels.csv") == {first.id: "normal", last.id: "anomalous"}
