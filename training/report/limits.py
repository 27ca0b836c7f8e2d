"""The limits of a version in words, derived from its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.models.manifest import Manifest

_MIN_AUROC = 0.9
_MIN_RECALL = 0.9


def limits(manifest: Manifest, label_names: Sequence[str]) -> Iterator[str]:
    """Yield one or two sentences for each limit."""
    yield _LIMIT_OF_INPUT[manifest.preparation.fit]
    yield "A p-value is the share of normal images with at least this score, not the probability of an anomaly."
    yield "The threshold does not depend on anomalies; the recall depends on the kind of anomaly."
    yield from _label_limits(manifest.metrics, label_names)
    if manifest.data.name == "mnist":
        yield (
            "Printed digits are another population than handwriting, and some of them are normal although they are "
            "other digits. docs/benchmark.md has the numbers for the model `zero`: mostly sixes are missed."
        )
    alpha, probes = f"{manifest.alpha:g}", manifest.metrics["probes"]
    if probes and alpha in probes[0]["flagged"]:
        shares = {(probe["kind"], probe["name"]): probe["flagged"][alpha] for probe in probes}
        yield from _probe_limits(shares, manifest.alpha)
    guards = manifest.recipe.parameters.get("guards", {})
    if "least_ink" in guards and "most_ink" in guards:
        above = ", counted from its own background," if guards.get("own_background") else ""
        yield (
            f"If the pixels in 0..1 of an image{above} add up to less than {guards['least_ink']:g}, its reason is "
            f"`empty`; if they add up to more than {guards['most_ink']:g}, it is `too_much_ink`. "
            "Both are always anomalous."
        )


_LIMIT_OF_INPUT = {
    "strict": "The model is for 28x28 grey images with bright strokes on black, placed and sized as its training "
    "images.",
    "mnist": "The model is for pictures with one handwritten digit, which the service prepares with `fit=mnist`.",
    "resize": "The model is for pictures taken as its training images were: the same distance, place, light and part "
    "of the picture. The service resizes them to 28x28 grey pixels, so a defect must still be visible at this size.",
}


def _label_limits(metrics: Mapping[str, Any], label_names: Sequence[str]) -> Iterator[str]:
    others = {label: of_label for label, of_label in metrics["labels"].items() if of_label["auroc"] is not None}
    weak = [label_names[int(label)] for label, of_label in others.items() if of_label["auroc"] < _MIN_AUROC]
    if weak:
        yield f"The AUROC is below {_MIN_AUROC} for {', '.join(weak)}: do not rely on the model for these."
    if others:
        label, worst = min(others.items(), key=lambda item: item[1]["flagged"]["rate"])
        missed = worst["flagged"]["of"] - worst["flagged"]["count"]
        yield (
            f"The recall is lowest for {label_names[int(label)]}: {missed:,} of {worst['flagged']['of']:,} images are "
            f"normal at alpha {metrics['alpha']:g}."
        )


def _probe_limits(shares: Mapping[tuple[str, str], float], alpha: float) -> Iterator[str]:
    missed = [f"{name} ({100 * share:.0f} %)" for (kind, name), share in shares.items()
              if kind != "variation" and share < _MIN_RECALL]  # fmt: skip
    if missed:
        yield f"Probes with a recall below {100 * _MIN_RECALL:.0f} % at alpha {alpha:g}: {', '.join(missed)}."
    rejected = [f"{name} ({100 * share:.0f} %)" for (kind, name), share in shares.items()
                if kind == "variation" and share > 3 * alpha]  # fmt: skip
    if rejected:
        yield f"Harmless changes that are often anomalous at alpha {alpha:g}: {', '.join(rejected)}."
    tolerated = [name for (kind, name), share in shares.items() if kind == "variation" and share <= 3 * alpha]
    if tolerated:
        yield f"Harmless changes that are tolerated: {', '.join(tolerated)}."
