"""Writes docs/scaling.md from the results of `benchmarks.bulk`, `benchmarks.actors` and `benchmarks.scaling`."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT

RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "scaling.md"
_CORE_HOUR = 0.04
"""Assumed price of a core, in USD per hour."""
_ROW_BYTES = 784 + 60
"""Bytes of an image in Ray's object store: pixels, id and offsets."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    names = list(head)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def needed(load: float, capacity: float) -> str:
    """Return how many units of a capacity a load needs."""
    share = load / capacity
    if share < 0.01:
        return "< 1 % of one"
    return f"{100 * share:.0f} % of one" if share <= 1 else f"{share:,.0f}" if share >= 10 else f"{share:.1f}"


def write(bulk: dict[str, Any], actors: dict[str, Any], scaling: dict[str, Any]) -> str:
    """Return the page."""
    on_ray = {count: _actor_cost(actors, count) for count in ("1", "2")}
    online = {name: cell["median"] for name, cell in scaling["online"].items()}
    one, two = bulk["compare"]
    million, agreement, bound = bulk["million"], bulk["agreement"], scaling["bound"]
    bulk_us = 1e6 * million["cpu_seconds"] / million["images"]
    raw_core = sorted(pair["raw"]["cpu"] for pair in one["pairs"])[len(one["pairs"]) // 2]
    network = online["in"] + scaling["request_bytes"] + 700
    error = online["two"] / online["one"] - 1
    per_core = {"single": 1e6 / online["one"], "batch": 1e6 / scaling["batch"]["median"], "bulk": 1e6 / bulk_us}
    rates = (10**3, 10**5, 10**7)
    saturation = [
        ("cores, single scores", *(needed(rate, per_core["single"]) for rate in rates)),
        ("cores, batch route", *(needed(rate, per_core["batch"]) for rate in rates)),
        ("cores, bulk scoring", *(needed(rate, per_core["bulk"]) for rate in rates)),
        ("gateway cores, without TLS", *(needed(rate, 1e6 / online["gateway"]) for rate in rates)),
        ("Redis cores (nodes of a cluster)", *(needed(rate, 1e6 / online["redis"]) for rate in rates)),
        ("network of 10 Gbit/s, single scores", *(needed(rate * network * 8, 1e10) for rate in rates)),
        ("object stores of Ray, 1 GB/s each", *(needed(rate * _ROW_BYTES * 2, 1e9) for rate in rates)),
    ]
    costs = [
        ("service, single scores, PNG", online["one"]),
        ("service, batch route, npy", scaling["batch"]["median"]),
        ("`anomaly bulk`, npy", bulk_us),
        ("`anomaly bulk` on Ray with two actors, npy, all processes", on_ray["2"]["all"]),
        ("Redis", online["redis"]),
        ("gateway (HAProxy, one hop, without TLS)", online["gateway"]),
    ]
    return f"""# Scaling

The modules `benchmarks.bulk`, `benchmarks.actors` and `benchmarks.scaling` measure, and `benchmarks.write_scaling`
writes this page.
Model `{bulk["model"]}` on the CPU, one thread per replica or worker. Images: {
        bulk["digits"]
    }, repeated, where each copy
has another pixel inverted. No setting was chosen by these figures. The machine has {bulk["cores"]} cores, which other
programs used at the same time. Costs are therefore processor time, and rates are compared in turns.

## Cost per image

Medians of {len(scaling["online"]["one"]["rounds"])} rounds. Single scores come from wrk with {scaling["connections"]}
connections, and the reconstructions are stored in Redis.

{
        table(
            (
                "part",
                "µs of one core",
                "images per core-second",
                f"USD per million images at {_CORE_HOUR} USD per core-hour",
            ),
            ((name, f"{cost:.1f}", f"{1e6 / cost:,.0f}", f"{cost * _CORE_HOUR / 3600:.6f}") for name, cost in costs),
        )
    }

## Growth

The model: replicas and workers share no state but Redis and the gateway, so N of them on N cores score N times as many
images per second as one, until a shared part is saturated. Two are measured, with both replicas under load at the same
time. Rates are computed from processor time per image, because load generator and Redis used the same cores:

{
        table(
            ("", "one", "two, predicted", "two, measured", "difference"),
            (
                (
                    "replicas: images per second and two cores",
                    f"{1e6 / online['one']:,.0f} on one core",
                    f"{2e6 / online['one']:,.0f}",
                    f"{2e6 / online['two']:,.0f}",
                    f"{-100 * error / (1 + error):+.1f} %",
                ),
                ("threads of `anomaly bulk`: images per core-second", *_bulk_growth(one, two)),
                (
                    "Ray actors: images per core-second of actors",
                    *_per_core(*(each["actor"] for each in on_ray.values())),
                ),
            ),
        )
    }

The actors of Ray run the same code as the threads. All processes of a run on Ray, from the driver to the tasks that
read and write, took {on_ray["1"]["all"]:.0f} µs per image with one actor and {on_ray["2"]["all"]:.0f} µs with two,
without the start of Ray. Beyond two, the figures of this page are predictions.

## What saturates first

Number of units that each part needs. The service is the first bottleneck at every rate, and it grows with replicas.
Single scores need a Redis Cluster or `rediscluster` as soon as Redis needs more than one core. At 10^7 images per
second, use bulk scoring: it has neither gateway nor Redis.

{table(("part", *(f"{rate:,} images per second" for rate in rates)), saturation)}

The network row counts a request, its reply of about 700 bytes and the record for Redis. The row of Ray assumes that an
object store moves 1 GB per second, and counts each image once written and once read.

## Bulk scoring

{million["images"]:,} images in npy files, scored by the command with {
        bulk["cores"]
    } threads on a machine with a load average of
{million["load_average"]:.1f}: {million["said"].partition("; ")[2]}, and {
        million["wall_seconds"]:.1f} s with the start of
the process. Private memory had a maximum of {million["private_mb_second_quarter_max"]:.0f} MB in the second quarter of
the run and of {million["private_mb_last_quarter_max"]:.0f} MB in the last one.

Images per second against the raw module, which gets pixels in memory and writes nothing (median of the rounds; the raw
module scores {raw_core:,.0f} images per core-second):

{_ratios(one, two)}

The ratio by wall time depends on the other programs of the machine.

## Agreement

{_agreement(agreement)}

## Reconstruction store

A reconstruction takes {online["entry"]:,.0f} bytes of Redis memory, and {online["in"]:,.0f} bytes are sent to store it.
At a rate of 1,000 single scores per second and a time to live of one hour, that is
{online["entry"] * 3.6e6 / 1e9:,.0f} GB.

A Redis server with `maxmemory` of {bound["limit"] / 2**20:.0f} MiB used {bound["used"] / 2**20:.1f} MiB and contained
{bound["keys"]:,} reconstructions after it had evicted {bound["evicted"]:,}, those nearest to their expiry first. In the
meantime {bound["failed_scores"]} scores failed.
"""


def _ratios(*compared: dict[str, Any]) -> str:
    def cell(each: dict[str, Any], clock: str) -> str:
        ratios = [pair["bulk"][clock] / pair["raw"][clock] for pair in each["pairs"]]
        return f"{each['median_ratio'][clock]:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    head = ("threads", "wall time: median (range)", "processor time: median (range)")
    return table(head, ((str(each["threads"]), cell(each, "wall"), cell(each, "cpu")) for each in compared))


def _agreement(found: dict[str, Any]) -> str:
    images = next(iter(found.values()))["images"]
    anomalous = " and ".join(f"{each['anomalous']:,} of them anomalous for `{model}`" for model, each in found.items())
    rows = (
        (f"`{model}`, {name}", f"{cell['mse_relative']:.1e}", f"{cell['p_value']:.1e}", str(cell["other_verdicts"]))
        for model, each in found.items()
        for name, cell in each["interfaces"].items()
    )
    return f"""{images:,} images, {anomalous}, scored by every interface. Differences are the largest ones from the
offline command, which scores images one at a time. In batches, the sums of `zero-article` are rounded differently.

{table(("interface", "mse, relative", "p-value", "other verdicts"), rows)}"""


def _wrapped(page: str) -> str:
    """Wrap the paragraphs at 120 characters."""
    blocks = page.split("\n\n")
    return (
        "\n\n".join(each if each[0] in "#|" else textwrap.fill(each, 120, break_on_hyphens=False) for each in blocks)
        + "\n"
    )


def _bulk_growth(one: dict[str, Any], two: dict[str, Any]) -> tuple[str, str, str, str]:
    def median(side: dict[str, Any]) -> float:
        rates = sorted(pair["bulk"]["cpu"] for pair in side["pairs"])
        return float(rates[len(rates) // 2])

    return _per_core(1e6 / median(one), 1e6 / median(two))


def _per_core(one: float, two: float) -> tuple[str, str, str, str]:
    """Return the rates of costs per image: one unit, two as predicted and as measured, and the difference."""
    first, second = 1e6 / one, 1e6 / two
    return f"{first:,.0f}", f"{first:,.0f}", f"{second:,.0f}", f"{100 * (second / first - 1):+.1f} %"


def _actor_cost(found: dict[str, Any], count: str) -> dict[str, float]:
    """Return the medians of the microseconds per image, of all processes and of actors."""
    costs = [each[count]["us_per_image"] for each in found["rounds"]]
    return {name: statistics.median(cost[name] for cost in costs) for name in ("all", "actor")}


def main() -> None:
    """Write the page."""
    results = [json.loads((RESULTS / f"{name}.json").read_text()) for name in ("bulk", "actors", "scaling")]
    PAGE.write_text(_wrapped(write(*results).strip()))


if __name__ == "__main__":
    main()
