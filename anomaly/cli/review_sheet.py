"""The contact sheet of a review: one HTML file with all images, which writes the file of labels in a browser."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from anomaly.cli.reviewing import LABELS, Item

_STYLE = """
:root { color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif }
body { margin: 1rem }
header { position: sticky; top: 0; padding: .5rem 0; background: Canvas }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)) }
fieldset { border: 1px solid GrayText; border-radius: 4px; min-width: 0; overflow-wrap: anywhere }
img { width: 100%; image-rendering: pixelated; background: #000 }
small { display: block }
label { display: block }
"""
_SCRIPT = """
document.querySelector("button").addEventListener("click", () => {
  const rows = [...document.querySelectorAll("input:checked")].map((input) => `${input.name},${input.value}`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([["id,label", ...rows, ""].join("\\n")], { type: "text/csv" }));
  link.download = "labels.csv";
  link.click();
});
"""


def sheet(items: Sequence[Item]) -> str:
    """Return an HTML document that needs no other file. It shows each image with its id, and takes labels.

    Raises:
        OSError: an image cannot be read.
    """
    figures = "\n".join(_figure(number, item) for number, item in enumerate(items, start=1))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Images to label</title>
<style>{_STYLE}</style>
<header>
<h1>{len(items):,} images to label</h1>
<button type="button">Save labels.csv</button>
</header>
<main>
{figures}
</main>
<script>{_SCRIPT}</script>
</html>
"""


def describe(item: Item) -> str:
    """Return the facts about an image in one line."""
    line = item.line
    facts = [f"{item.model}@{line.get('version')}", f"chosen: {item.chosen}"]
    facts += [f"{name} {line[name]:.4g}" for name in ("mse", "threshold", "p_value") if _is_number(line.get(name))]
    return ", ".join([*facts, *([f"guard {line['reason']}"] if line.get("reason") else [])])


def _figure(number: int, item: Item) -> str:
    name = html.escape(item.id)
    picture = base64.b64encode(item.path.read_bytes()).decode()
    inputs = "".join(f'<label><input type="radio" name="{name}" value="{label}"> {label}</label>' for label in LABELS)
    return (
        f'<fieldset><legend>{number}</legend><img alt="Image {number}" src="data:image/png;base64,{picture}">'
        f"<small>{html.escape(describe(item))}</small><small><code>{name}</code></small>{inputs}</fieldset>"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
