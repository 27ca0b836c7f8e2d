"""What a version cannot do, in plain words, out of its own figures.

Knows: the manifest. Does not know: Markdown, models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.models.manifest import Manifest

_WEAK_AUROC = 0.9
_MISSED = 0.9


def limits(manifest: Manifest, label_names: Sequence[str]) -> Iterator[str]:
    """Yield one sentence or two for each limit."""
    yield "It judges 28x28 grey images, bright strokes on black, placed and sized as its training images were."
    yield "A p-value says how unusual a score is among normal images; it is not a probability of being an anomaly."
    yield "The threshold was never shown an anomaly: how many anomalies are caught depends on what they look like."
    yield from _labels(manifest.metrics, label_names)
    alpha, table = f"{manifest.alpha:g}", manifest.metrics["probes"]
    if table and alpha in table[0]["flagged"]:
        shares = {(probe["kind"], probe["name"]): probe["flagged"][alpha] for probe in table}
        yield from _probes(shares, manifest.alpha)
    if "too_much_ink" in manifest.reasons or "empty" in manifest.reasons:
        guards = manifest.recipe.parameters["guards"]
        yield (
            f"An image whose brightness adds up to less than {guards['least_ink']:g} white pixels is called `empty`, "
            f"and one with more than {guards['most_ink']:g} `too_much_ink`, whatever they show."
        )


def _labels(metrics: Mapping[str, Any], label_names: Sequence[str]) -> Iterator[str]:
    others = {label: found for label, found in metrics["labels"].items() if found["auroc"] is not None}
    weak = [label_names[int(label)] for label, found in others.items() if found["auroc"] < _WEAK_AUROC]
    if weak:
        yield f"It is weak against {', '.join(weak)} (AUROC below {_WEAK_AUROC}): do not rely on it there."
    if others:
        label, worst = min(others.items(), key=lambda item: item[1]["flagged"]["rate"])
        missed = worst["flagged"]["of"] - worst["flagged"]["count"]
        yield (
            f"Of the other labels, {label_names[int(label)]} is missed most: {missed:,} of "
            f"{worst['flagged']['of']:,} pass at alpha {metrics['alpha']:g}."
        )


def _probes(shares: Mapping[tuple[str, str], float], alpha: float) -> Iterator[str]:
    missed = [f"{name} ({100 * share:.0f} %)" for (kind, name), share in shares.items()
              if kind != "variation" and share < _MISSED]  # fmt: skip
    if missed:
        yield f"Caught less often than nine times in ten, at alpha {alpha:g}: {', '.join(missed)}."
    harmed = [f"{name} ({100 * share:.0f} %)" for (kind, name), share in shares.items()
              if kind == "variation" and share > 3 * alpha]  # fmt: skip
    if harmed:
        yield f"Harmless changes that it holds against a normal image, at alpha {alpha:g}: {', '.join(harmed)}."
    kept = [name for (kind, name), share in shares.items() if kind == "variation" and share <= 3 * alpha]
    if kept:
        yield f"Changes that hardly matter: {', '.join(kept)}."
