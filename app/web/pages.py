"""Loads the files of the web page, and renders model cards as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import fastapi_offline
from markdown_it import MarkdownIt

from app.problems import Problem
from app.web.explanations import Explanation

_FOLDER = Path(__file__).parent / "page"
_SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""No inline scripts or styles, no other origins. Browsers revalidate their cache with each request."""


@dataclass(frozen=True)
class File:
    """A file of the page.

    Attributes:
        content: its bytes.
        media_type: their media type.
        tag: entity tag, which changes with the bytes.
    """

    content: bytes
    media_type: str
    tag: str


@cache
def files() -> dict[str, File]:
    """Load every file of the pages, by path: `index.html`, `swagger/swagger-ui.css`. The result is cached."""
    ours = {str(path.relative_to(_FOLDER)): path for path in sorted(_FOLDER.rglob("*.*")) if path.suffix in _TYPES}
    package = Path(fastapi_offline.__file__).parent / "static"
    return {
        name: File(content, _TYPES[path.suffix], f'"{sha256(content).hexdigest()[:16]}"')
        for name, path in {**ours, **{f"swagger/{name}": package / name for name in _SWAGGER}}.items()
        for content in (path.read_bytes(),)
    }


def model_card(name: str, version: int, card: str, status: str | None = None, chart: str = "") -> bytes:
    """Render a model card as an HTML page for `/models/{name}`.

    Args:
        name: of the model.
        version: the version whose card it is.
        card: Markdown. HTML in it is escaped, and pictures are taken from the report of the version.
        status: whether images still score like the calibration images, in words; None if it is not known.
        chart: of the scores, as HTML below the status.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(card)
    for token in (child for block in tokens for child in block.children or []):
        source = token.attrs.get("src")
        if token.type == "image" and isinstance(source, str) and "/" not in source:
            token.attrs["src"] = f"{name}/versions/{version}/report/{source}"
    body = _arranged(markdown.renderer.render(tokens, markdown.options, {}), html.escape(name))
    if status is not None:
        line = f'<p>Calibration: <a href="{html.escape(name)}/validity">{html.escape(status)}</a></p>\n{chart}'
        head, heading, rest = body.partition("<h2>")
        body = head + line + heading + rest
    body = body.replace("<table>", '<div class="wide" tabindex="0" role="group" aria-label="Table"><table>')
    body = body.replace("</table>", "</table></div>")
    # Markdown requires a table head, and screen readers announce an empty head cell.
    body = body.replace("<th></th>", "<td></td>")
    body = body.replace("<pre>", '<pre tabindex="0" role="group" aria-label="Command">')
    title = html.escape(f"{name}, version {version}")
    return _CARD.format(title=title, body=body, root="../", home="../").encode()


def _arranged(body: str, name: str) -> str:
    """Put limits and use of a model after the summary of its card, and fold the probes.

    Cards of versions that were published by earlier code have another order, and a published card never changes.
    """
    head, *rest = re.split(r"(?=<h2>)", body)
    sections = {re.sub(r"</h2>.*|<h2>", "", section, flags=re.DOTALL): section for section in rest}
    first = sections.pop("Limits", "") + sections.pop("How to use", _HOW_TO_USE.format(name=name))
    if "Probes" in sections:
        text = sections["Probes"].removeprefix("<h2>Probes</h2>")
        sections["Probes"] = f"<details><summary><h2>Probes</h2></summary>{text}</details>\n"
    return "".join([head, first, *sections.values()])


def problem(explanation: Explanation) -> bytes:
    """Render the page of one problem type, for `/problems/{name}`."""
    shown = {name: _with_code(str(value)) for name, value in asdict(explanation).items()}
    body = (
        f"<h1>{shown['title']}</h1>\n"
        f"<p><code>{shown['type']}</code>, status {shown['status']}</p>\n"
        f"<h2>What it means</h2>\n<p>{shown['meaning']}</p>\n"
        f"<h2>What to do</h2>\n<p>{shown['advice']}</p>\n"
        "<p>The member <code>detail</code> of the reply contains what was wrong with the request.</p>\n"
        '<p><a href="../problems">All problem types</a></p>\n'
    )
    return _CARD.format(title=html.escape(explanation.title), body=body, root="../", home="../").encode()


def error(found: Problem, request_id: str | None, *, root: str) -> bytes:
    """Render the response for a problem as a page, for browsers.

    Args:
        found: the problem.
        request_id: id of the request, which the log contains.
        root: relative path from the requested page to the first page of the service: `../` for each folder.
    """
    detail = found.detail and f"{found.detail[0].upper()}{found.detail[1:]}."
    body = "".join(
        (
            f"<h1>{html.escape(found.title)}</h1>\n",
            *(f"<p>{_with_code(text)}</p>\n" for text in (detail, found.hint) if text),
            f'<p><a href="{root or "./"}">Score an image</a> · <a href="{root}docs">API documentation</a> · '
            f'<a href="{root}{html.escape(found.type.removeprefix("/"))}">Meaning of this error</a></p>\n',
            f"<p class=hint>Status {found.status}{f', request {html.escape(request_id)}' if request_id else ''}</p>\n",
        )
    )
    return _CARD.format(title=html.escape(found.title), body=body, root=root, home=root or "./").encode()


def _with_code(text: str) -> str:
    """Return a text with `code` as HTML."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))


def problem_list(found: Sequence[Explanation]) -> bytes:
    """Render the page with all problem types, for `/problems`."""
    rows = "".join(
        f'<tr><td>{each.status}</td><td><a href="problems/{html.escape(each.name)}">{html.escape(each.name)}</a></td>'
        f"<td>{html.escape(each.title)}</td></tr>\n"
        for each in found
    )
    head = "<thead><tr><th>Status</th><th>Type</th><th>Title</th></tr></thead>"
    table = f"<table>{head}<tbody>\n{rows}</tbody></table>"
    body = f'<h1>Problem types</h1>\n<div class="wide" tabindex="0" role="group" aria-label="Table">{table}</div>\n'
    return _CARD.format(title="Problem types", body=body, root="", home="./").encode()


_HOW_TO_USE = """<h2>How to use</h2>
<p>Send a PNG of 28x28 pixels, prepared like the training images. <code>fit=mnist</code> prepares a photo or a scan of a
digit.</p>
<pre><code>curl -F file=@image.png 'http://127.0.0.1:8000/score?model={name}'
anomaly score image.png --model {name}
</code></pre>
"""
_CARD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="{root}page/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="{root}page/page.css">
</head>
<body>
<header class="top">
<a class="brand" href="{home}"><img src="{root}page/icon.svg" alt="" width="28" height="28">
<span>Reconstruction anomaly</span></a>
</header>
<main class="card">
{body}</main>
</body>
</html>
"""
