"""Write docs/performance.md from a results file: no figure on that page was typed by hand.

What was tried and left out, and what was measured by itself, comes from benchmarks/results/tricks.json, in which each
gain was noted with how it was measured.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.without import TRICKS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
Cell = dict[str, Any]

INTRODUCTION = """# Performance

Written by `python -m benchmarks.write_performance` from `benchmarks/results/`. Measure your own machine with
`make bench`; compare figures within one run only, never across machines or days. The interpreter counts as well: under
Debian's, which the image has, a score takes a tenth less than under one that was built without a profile
(`make install PYTHON=` chooses).

Sections are runs of their own, each with its date and the commit whose code it ran. Neighbours on the machine make one
section two or three times as slow as another, and slow the model down more than anything else: what is to be compared
stands in one table. How busy they were shows in the time that the raw module took for a lone image just before; where
it is missing, it was not measured.

Each system is measured in turn, round after round. Figures are medians of the rounds, and a ratio is the median of each
round's, where the rounds were kept. `CPU us` is user and system time of the server's whole process tree, divided by
requests: the figure that a busy neighbour disturbs least.
The service runs as `make serve` runs it: one worker, SQLite store on, a log line for each request.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; every column but the first is right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ratio(one: Cell, other: Cell) -> float:
    """Return how many times the rate of the other this one has: the median of the rounds' ratios."""
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
        head = ["system", "requests/s", "service, multipart, to this", "p50 ms", "p99 ms", "CPU us", "failed"]
        text += f"\n{connections} connections\n\n{table(head, rows)}"
    rows = [
        [name, f"{seconds:.2f}", f"{found['memory_mb'][name][0]:.0f}", f"{found['memory_mb'][name][1]:.0f}"]
        for name, seconds in found["start_seconds"].items()
    ]
    text += "\nStart and memory, after the load; the service has this model alone\n\n"
    text += table(["system", "start s", "RSS MB", "PSS MB"], rows)
    rows = [[name, f"{took:.2f}"] for name, took in found["stages_ms"].items()]
    return text + "\nWhere the time of a lone request goes\n\n" + table(["stage", "ms"], rows)


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
    text = f"\n{found['images']:,} images a request; in each round the best of three, and the best batch size\n\n"
    text += table(["", "images/s", "to the ceiling", "CPU us an image"], rows)
    rows = [
        [size, f"{cell['images_per_second']:,.0f}", f"{cell['cpu_us']:.1f}"]
        for size, cell in found["ceiling_by_batch_size"].items()
    ]
    return text + "\nThe raw module, one thread\n\n" + table(["batch", "images/s", "CPU us an image"], rows)


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
        f"\nTwo workers answer {ratio(two, one):.2f} times as many. One alone keeps "
        f"{one['rate'] * one['cpu_us'] / 1e6:.1f} cores busy,\n"
        "because model and store run beside the event loop, and the generator needs a part of the rest;\n"
        "two fill smaller micro-batches, which cost more an image. A second worker is for more than two cores.\n"
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
        f"\nThe closed loop's most was {found['most']:,.0f} a second; `after` is a tenth of it, one second later.\n"
        "Latency counts from when a request was due. Each row is the round whose p99 is in the middle.\n\n"
    )
    return note + table(["rate", "replies", "p50 ms", "p99 ms", "max ms", "lost"], rows)


def growth(found: Cell) -> str:
    """Return the tables of growth."""
    rows = [
        [f"{int(count):,}", f"{cell['images_per_second']:,.0f}", f"{cell['cpu_us']:.1f}", f"{cell['rss_mb']:.0f}"]
        for count, cell in found["images"].items()
    ]
    text = "\n" + table(["images a request", "images/s", "CPU us an image", "RSS MB"], rows)
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
    """Return the table of what each trick is worth."""
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
    ]
    head = ["trick", "requests/s without", "with", "gain", "CPU us saved", "p99 without, to with"]
    note = (
        "\n64 connections unless told; each pair measured in turn. Below a twentieth is noise, on a busy machine\n"
        "below a tenth; the table at the end is finer.\n\n"
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
    "fairness": ("Single scores on four connections, beside batches", closed),
    "open_loop": ("Fixed rates (open loop)", open_loop),
    "workers": ("Workers, 64 connections", workers),
    "tricks": ("What each trick is worth", tricks),
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
                    f"; a lone image took the raw module {found['forward_us']:.0f} us.\n"
                    if "forward_us" in found
                    else ".\n"
                )
                text += write(found)
    noted = json.loads((RESULTS / "tricks.json").read_text())
    text += "\n## Tricks measured by themselves\n\n" + noted["how"] + "\n\n"
    text += table(
        ["trick", "without", "with", "of what"],
        [[t["trick"], t["without"], t["with"], t["of"]] for t in noted["kept"]],
    )
    text += "\nTried and left out\n\n"
    text += table(["trick", "why not"], [[t["trick"], t["why"]] for t in noted["left_out"]])
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
