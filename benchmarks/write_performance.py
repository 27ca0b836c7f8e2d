"""Write docs/performance.md and benchmarks/report.md, with all figures, from the results.

What was tried and left out, and what was measured by itself, comes from benchmarks/results/tricks.json, in which each
gain was noted with how it was measured.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks import performance_page
from benchmarks.without import TRICKS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REPORT = ROOT / "benchmarks" / "report.md"
Cell = dict[str, Any]

INTRODUCTION = """# Report of the performance measurements

Written by `python -m benchmarks.write_performance` from `benchmarks/results/`. The conclusions are in
[docs/performance.md](../docs/performance.md). To measure your machine, run `make bench`. Compare figures within one
section only.

Each section is a run of its own, with its date and the commit of its code. Other processes on the machine can double
the times of a section. The time of the raw module for a single image, measured just before a section, shows how
busy the machine was.

The systems are measured in turn, round after round. A figure is the median of the rounds, and a ratio the median of the
ratios per round. `CPU us` is the user and system time of the server's process tree, divided by the number of requests.
It depends least on other processes. The service runs as `make serve` starts it: one worker, SQLite store, request log.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; every column but the first is right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ratio(one: Cell, other: Cell) -> float:
    """Return the median over the rounds of the ratio of two rates."""
    return statistics.median(a / b for a, b in zip(one["rates"], other["rates"], strict=True))


def single(found: Cell) -> str:
    """Return the tables of single scores."""
    text = ""
    for connections, systems in found["connections"].items():
        ours = systems["service, multipart"]
        rows = [
            [
                name,
                f"{cell['rate']:,.0f}",
                f"{ratio(ours, cell):.2f}",
                f"{cell['p50_ms']:.2f}",
                f"{cell['p99_ms']:.2f}",
                f"{cell['cpu_us']:.0f}",
                f"{cell['failed']}",
            ]
            for name, cell in systems.items()
        ]
        head = [
            "system",
            "requests/s",
            "ratio of the service (multipart) to this",
            "p50 ms",
            "p99 ms",
            "CPU us",
            "failed",
        ]
        text += f"\n{connections} connections\n\n{table(head, rows)}"
    rows = [
        [name, f"{seconds:.2f}", f"{found['memory_mb'][name][0]:.0f}", f"{found['memory_mb'][name][1]:.0f}"]
        for name, seconds in found["start_seconds"].items()
    ]
    text += "\nStart and memory, after the load; the service has this model alone\n\n"
    text += table(["system", "start s", "RSS MB", "PSS MB"], rows)
    rows = [[name, f"{took:.2f}"] for name, took in found["stages_ms"].items()]
    return text + "\nStages of a single request\n\n" + table(["stage", "ms"], rows)


def batch(found: Cell) -> str:
    """Return the tables of batch requests."""
    ceiling = found["replies"]["raw TorchScript, best batch size"]
    rows = [
        [
            name,
            f"{cell['images_per_second']:,.0f}",
            f"{ratio(cell, ceiling):.2f}",
            f"{cell['cpu_us']:.1f}",
        ]
        for name, cell in found["replies"].items()
    ]
    text = f"\n{found['images']:,} images per request; the best of three runs per round, and the best batch size\n\n"
    text += table(["", "images/s", "share of the module alone", "CPU us per image"], rows)
    rows = [
        [size, f"{cell['images_per_second']:,.0f}", f"{cell['cpu_us']:.1f}"]
        for size, cell in found["ceiling_by_batch_size"].items()
    ]
    return text + "\nThe raw module, one thread\n\n" + table(["batch", "images/s", "CPU us per image"], rows)


def closed(found: Cell) -> str:
    """Return one table of closed loops by name."""
    rows = [
        [name, f"{cell['rate']:,.0f}", f"{cell['p50_ms']:.2f}", f"{cell['p99_ms']:.2f}", f"{cell['cpu_us']:.0f}"]
        for name, cell in found.items()
        if isinstance(cell, dict)
    ]
    return "\n" + table(["", "requests/s", "p50 ms", "p99 ms", "CPU us"], rows)


def workers(found: Cell) -> str:
    """Return the table of one worker and two, and why the second one brings what it does."""
    one, two = found["1 worker"], found["2 workers"]
    note = (
        f"\nTwo workers serve {ratio(two, one):.2f} times as many requests as one. One worker keeps "
        f"{one['rate'] * one['cpu_us'] / 1e6:.1f} cores busy,\n"
        "because model and store run concurrently with the event loop. The load generator needs a part of the rest.\n"
        "Two workers have smaller micro-batches, which cost more per image. A second worker needs more cores.\n"
    )
    return closed(found) + note


def open_loop(found: Cell) -> str:
    """Return the table of fixed rates."""
    rows = []
    names = {"half": "half", "bare": "half, bare ASGI", "twice": "twice", "after": "after"}
    for name, shown in names.items():
        cell = found[name]
        statuses = ", ".join(f"{status}: {count:,}" for status, count in cell["statuses"].items())
        times = [f"{cell[key]:.1f}" if cell[key] is not None else "-" for key in ("p50_ms", "p99_ms", "max_ms")]
        rows.append([f"{shown}, {cell['rate']:,.0f}/s", statuses, *times, str(cell["unanswered"])])
    note = (
        f"\nThe maximum of the closed loop was {found['most']:,.0f} requests per second. `after` is a\n"
        "tenth of it, one second later. "
        "Latency is measured from the time at which a request was due. Each row is the round with the median p99.\n\n"
    )
    return note + table(["rate", "replies", "p50 ms", "p99 ms", "max ms", "lost"], rows)


def growth(found: Cell) -> str:
    """Return the tables of growth."""
    rows = [
        [f"{int(count):,}", f"{cell['images_per_second']:,.0f}", f"{cell['cpu_us']:.1f}", f"{cell['rss_mb']:.0f}"]
        for count, cell in found["images"].items()
    ]
    text = "\n" + table(["images per request", "images/s", "CPU us per image", "RSS MB"], rows)
    rows = [
        [f"{kilobytes} KiB", f"{cell['rate']:,.0f}", f"{cell['p99_ms']:.1f}", f"{cell['cpu_us']:.0f}"]
        for kilobytes, cell in found["bodies"].items()
    ]
    text += "\n" + table(["text beside the pixels", "requests/s", "p99 ms", "CPU us"], rows)
    rows = [
        [count, f"{cell['rate']:,.0f}", f"{cell['start_seconds']:.2f}", f"{cell['rss_mb']:.0f}"]
        for count, cell in found["models"].items()
    ]
    text += "\n" + table(["models loaded", "requests/s", "start s", "RSS MB"], rows)
    rows = [
        [
            f"{int(count):,}",
            f"{cell['rate']:,.0f}",
            f"{cell['p99_ms']:.1f}",
            f"{cell['cpu_us']:.0f}",
            f"{cell['file_mb']:.0f}",
        ]
        for count, cell in found["store"].items()
    ]
    return text + "\n" + table(["entries in the store", "requests/s", "p99 ms", "CPU us", "file MB"], rows)


def tricks(found: Cell) -> str:
    """Return the table of the gain of each optimisation."""
    rows = [
        [
            TRICKS[name][0],
            f"{cell['without']['rate']:,.0f}",
            f"{cell['with']['rate']:,.0f}",
            f"{ratio(cell['with'], cell['without']):.2f}",
            f"{cell['without']['cpu_us'] - cell['with']['cpu_us']:.0f}",
            f"{cell['without']['p99_ms'] / cell['with']['p99_ms']:.2f}" if "p99_ms" in cell["with"] else "",
        ]
        for name, cell in found["tricks"].items()
        if name in TRICKS  # else removed from the service since
    ]
    head = ["optimisation", "requests/s without", "with", "gain", "CPU us saved", "p99 without, to with"]
    note = (
        "\n64 connections, except where a row names others. The pairs are measured in turn. Differences below 5 % are\n"
        "noise, on a busy machine below 10 %.\n\n"
    )
    return note + table(head, rows)


def soak(found: Cell) -> str:
    """Return the table of memory over requests, at most a dozen rows of it."""
    points = list(found["rss_mb"].items())
    shown = points[: -1 : max(1, len(points) // 10)] + points[-1:]
    return "\n" + table(["requests", "RSS MB"], [[f"{int(count):,}", f"{size:.0f}"] for count, size in shown])


SECTIONS = {
    "single": ("Single scores", single),
    "batch": ("Batches", batch),
    "fairness": ("Single scores on four connections, concurrent with batches", closed),
    "open_loop": ("Fixed rates (open loop)", open_loop),
    "workers": ("Workers, 64 connections", workers),
    "tricks": ("Gain of each optimisation", tricks),
    "growth": ("How cost grows", growth),
    "soak": ("Memory over time", soak),
}


def main() -> None:
    """Read the results and write the page."""
    result: Cell = json.loads((RESULTS / "latest.json").read_text())
    machine = result.pop("machine")
    text = INTRODUCTION
    text += (
        f"\nMachine: {machine['cores']} cores ({machine['processor']}), {machine['memory_gb']} GB, "
        f"{machine['gpu'] or 'no GPU'}; "
        f"Python {machine['python']}, torch {machine['torch']}.\n"
    )
    for model, sections in result.items():
        for name, (title, write) in SECTIONS.items():
            if name in sections:
                found = sections[name]
                text += f"\n## `{model}`: {title}\n\n"
                text += f"{found['rounds']} rounds of {found['seconds']:g} s a cell, {found['when'][:10]}, "
                text += f"commit {found['commit']}"
                text += (
                    f"; the raw module took {found['forward_us']:.0f} us for a single image.\n"
                    if "forward_us" in found
                    else ".\n"
                )
                text += write(found)
    noted = json.loads((RESULTS / "tricks.json").read_text())
    text += "\n## Optimisations measured separately\n\n" + noted["how"] + "\n\n"
    text += table(
        ["optimisation", "without", "with", "unit"],
        [[t["trick"], t["without"], t["with"], t["of"]] for t in noted["kept"]],
    )
    text += "\nTried and rejected\n\n"
    text += table(["idea", "reason"], [[t["trick"], t["why"]] for t in noted["left_out"]])
    REPORT.write_text(text)
    performance_page.write(result, machine)


if __name__ == "__main__":
    main()
