"""Write docs/performance.md, its charts and its row in README.md: every figure is taken from the results."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
IMAGES = ROOT / "docs" / "images"
MODEL = "zero"
SYSTEMS = {
    "service, raw": ("this service", "#2f5bd0", "o-"),
    "FastAPI empty UploadFile": ("FastAPI that reads an upload, without a model", "#7b8794", "s--"),
    "tutorial server, async": ("FastAPI with the model, without micro-batches", "#b3261e", "^-"),
}
_README_ROW = re.compile(r"(?m)^\| scores per second on .*$")
Cell = dict[str, Any]


def _older(result: dict[str, Any], single: dict[str, Any]) -> str:
    """Return a sentence about the sections that were measured on another day than the single scores."""
    day = single["when"][:10]
    found = sorted({name for name, section in result["zero-article"].items() if section["when"][:10] != day})
    if not found:
        return ""
    names = ", ".join(f"`{name}`" for name in found)
    return f"Measured on another day, maybe on another machine: {names}. The report has the date of each section.\n"


def write(result: Cell, machine: Cell) -> None:
    """Write the page, the charts and the row of the README.

    Args:
        result: sections by name by model, from benchmarks/results/latest.json.
        machine: description of the machine.
    """
    found = result[MODEL]
    single, batch, loop = found["single"], found["batch"], found["open_loop"]
    _chart_single(single["connections"])
    _chart_batch(batch)
    ours = {count: systems["service, raw"] for count, systems in single["connections"].items()}
    naive = {count: systems["tutorial server, async"] for count, systems in single["connections"].items()}
    stages = single["stages_ms"]
    one, two = found["workers"]["1 worker"], found["workers"]["2 workers"]
    workers = median(b / a for a, b in zip(one["rates"], two["rates"], strict=True))
    fair = found["fairness"]
    busy = next(cell for name, cell in fair.items() if isinstance(cell, dict) and name != "alone")
    ceiling = batch["replies"]["raw TorchScript, best batch size"]["images_per_second"]
    npy = batch["replies"]["npy"]["images_per_second"]
    growth, soak = result["zero-article"]["growth"], result["zero-article"]["soak"]["rss_mb"]
    text = f"""# Performance

`python -m benchmarks.write_performance` writes this page from `benchmarks/results/latest.json`. All tables are in
[the report](../benchmarks/report.md). To measure your machine, run `make bench`.

The figures are of the model `{MODEL}` with one worker, the SQLite store and the request log, as `make serve` starts it.
Machine: {machine["cores"]} CPU cores ({machine["processor"]}), {machine["memory_gb"]} GB, no GPU,
Python {machine["python"].partition(" ")[0]}, torch {machine["torch"]}; {single["when"][:10]}, commit
{single["commit"]}. The load generator runs on the same two cores. Compare figures within this page only: other
processes on the machine change the absolute figures by a factor of two.
{_older(result, single)}
## Single scores

![Scores per second and 99th percentile of the latency, by number of connections](images/performance-single.png)

| connections | scores per second | median latency | 99th percentile | without micro-batches, scores per second |
| ---: | ---: | ---: | ---: | ---: |
{_rows(ours, naive)}

* **Micro-batches pay from a few connections on.** Requests that arrive during a forward pass form the next one. With
  64 connections, the service serves {ours["64"]["rate"] / naive["64"]["rate"]:.1f} times as many scores as a FastAPI
  service that runs the model per request.
* **The forward pass dominates a lone request**: {stages["forward"]:.2f} ms of
  {sum(stages.values()):.2f} ms. Decoding takes {stages["decode"]:.2f} ms, the queue {stages["queue"]:.2f} ms and the
  store {stages["store"]:.2f} ms.
* **More than 64 connections add latency only.** The CPU cores are then busy.

## Overload

The service rejects requests that it cannot serve in time. At {loop["twice"]["rate"]:,.0f} requests per second,
twice its maximum, it served {_share(loop["twice"])} of the requests with a 99th percentile of
{loop["twice"]["p99_ms"]:,.0f} ms, and rejected the others with 503. At half of the maximum, the 99th percentile is
{loop["half"]["p99_ms"]:.1f} ms, and no request is rejected. One second after the overload, it is
{loop["after"]["p99_ms"]:.1f} ms.

## Batches

![Images per second of the module alone, by batch size, and of batch requests](images/performance-batch.png)

A batch request of {batch["images"]:,} images in npy reaches {npy:,.0f} images per second,
{100 * npy / ceiling:.0f} % of the module alone with its best batch size, within
the accuracy of the measurement. The service scores the images while
the body arrives.

Batch requests share the model with single scores. Two concurrent clients of batch requests increase the median latency
of single scores on four connections from {fair["alone"]["p50_ms"]:.1f} to {busy["p50_ms"]:.1f} ms. Run a
second instance for batches if that is too much.

## Workers, memory and start

* Two workers serve {workers:.2f} times as many scores as one on these two cores, because one worker already uses the
  second core for the forward pass. Use one worker per two cores.
* One worker takes {single["memory_mb"]["service-" + MODEL][0]:.0f} MB and starts in
  {single["start_seconds"]["service-" + MODEL]:.1f} s.
* Memory does not grow: after {int(list(soak)[-1]):,} requests it is {list(soak.values())[-1]:.0f} MB, and after
  {int(list(soak)[1]):,} it was {list(soak.values())[1]:.0f} MB (model `zero-article`).
* A store of 1,000,000 reconstructions costs
  {100 - 100 * growth["store"]["1000000"]["rate"] / growth["store"]["1000"]["rate"]:.0f} % of the throughput and raises
  the 99th percentile from {growth["store"]["1000"]["p99_ms"]:.0f} to {growth["store"]["1000000"]["p99_ms"]:.0f} ms
  (model `zero-article`). The default limit of 256 MB keeps the store far smaller.

## Which optimisations matter

Each row compares the service with and without one optimisation, in alternating rounds (model `zero-article`).
Differences below 5 % are noise.

| optimisation | gain in throughput |
| --- | ---: |
{_gains(result["zero-article"]["tricks"]["tricks"])}
"""
    PAGE.write_text("\n\n".join(map(_wrapped, text.split("\n\n"))))
    README.write_text(_README_ROW.sub(_readme_row(machine, ours["64"]), README.read_text()))


def _wrapped(block: str) -> str:
    """Wrap a paragraph or a list at 120 characters; leave headings, pictures and tables as they are."""
    if block.startswith(("#", "!", "|")):
        return block
    items = re.split(r"\n(?=\* )", block)
    indent = "  " if block.startswith("* ") else ""
    return "\n".join(textwrap.fill(" ".join(item.split()), 120, subsequent_indent=indent) for item in items) + (
        "\n" if block.endswith("\n") else ""
    )


def _rows(ours: Cell, naive: Cell) -> str:
    return "\n".join(
        f"| {count} | {cell['rate']:,.0f} | {cell['p50_ms']:.1f} ms | {cell['p99_ms']:.1f} ms "
        f"| {naive[count]['rate']:,.0f} |"
        for count, cell in ours.items()
    )


def _readme_row(machine: Cell, cell: Cell) -> str:
    return (
        f"| scores per second on {machine['cores']} CPU cores, 64 connections, 99th percentile {cell['p99_ms']:.0f} ms "
        f"| {cell['rate']:,.0f} | [docs/performance.md](docs/performance.md#single-scores) |"
    )


def _share(cell: Cell) -> str:
    statuses = {int(status): count for status, count in cell["statuses"].items()}
    return f"{100 * statuses[200] / sum(statuses.values()):.0f} %"


def _gains(found: Cell) -> str:
    from benchmarks.without import TRICKS

    gains = {
        name: median(a / b for a, b in zip(cell["with"]["rates"], cell["without"]["rates"], strict=True))
        for name, cell in found.items()
        if name in TRICKS  # else removed from the service since
    }
    best = sorted((name for name in gains if gains[name] >= 1.05), key=lambda name: -gains[name])
    return "\n".join(f"| {TRICKS[name][0]} | {gains[name]:.2f} |" for name in best)


def _chart_single(connections: Cell) -> None:
    figure, (rates, delays) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=110, layout="constrained")
    counts = list(connections)
    for name, (label, colour, style) in SYSTEMS.items():
        rates.plot(counts, [connections[count][name]["rate"] for count in counts], style, color=colour, label=label)
        delays.plot(counts, [connections[count][name]["p99_ms"] for count in counts], style, color=colour)
    rates.set_ylabel("requests per second")
    delays.set_ylabel("99th percentile of the latency, ms")
    delays.set_yscale("log")
    for axes in (rates, delays):
        axes.set_xlabel("connections")
        _plain(axes)
    rates.set_ylim(0, None)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    figure.savefig(IMAGES / "performance-single.png", facecolor="white")
    plt.close(figure)


def _chart_batch(found: Cell) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.2), dpi=110, layout="constrained")
    sizes = list(found["ceiling_by_batch_size"])
    rates = [found["ceiling_by_batch_size"][size]["images_per_second"] for size in sizes]
    axes.plot(sizes, rates, "o-", color="#7b8794", label="module alone, one thread")
    npy = found["replies"]["npy"]["images_per_second"]
    axes.axhline(npy, color="#2f5bd0", linestyle="--", label="batch request in npy")
    axes.set_xlabel("images per forward pass of the module alone")
    axes.set_ylabel("images per second")
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=9)
    _plain(axes)
    figure.savefig(IMAGES / "performance-batch.png", facecolor="white")
    plt.close(figure)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
