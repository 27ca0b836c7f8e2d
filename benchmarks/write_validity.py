"""Simulate streams for the validity monitor, and write the tables and the chart of docs/validity.md.

python -m benchmarks.write_validity --data-dir FOLDER_OF_MNIST [--only quiet|changed|chart|cost|lots]
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.stats import binomtest
from sklearn.datasets import load_digits

from app.images.fit import fit
from app.inference.detector import Detector
from app.models.calibration import conformal_rank
from app.models.repository import Artifact, Repository
from app.problems import InvalidImage
from app.scoring.discoveries import discoveries
from app.scoring.validity.martingale import JUMPING_RATES, Jumper, mixture
from app.scoring.validity.monitor import ValidityMonitor
from app.scoring.validity.stream import BLOCK, Reference, Stream, StreamState
from app.stores import open_store
from app.stores.reconstructions import Reconstructions
from app.telemetry.metrics import Metrics
from training.data.loaders import load
from training.evaluation.calibrate import score_with_reasons

ROOT = Path(__file__).parent.parent
PAGE, CHART = ROOT / "docs" / "validity.md", ROOT / "docs" / "images" / "validity.png"
SEED, LIMIT, ALPHA = 26, 100.0, 0.01
QUIET, LENGTH = 5_000, 10_000
Scores = NDArray[np.float32]
Digits = NDArray[np.uint8]


@dataclass(frozen=True)
class Law:
    """A law of scores: linear interpolation between sorted real scores, so that it can be drawn from without limit."""

    scores: Scores

    def draw(self, rng: np.random.Generator, count: int, power: float = 1.0) -> Scores:
        """Draw scores. The rank of a score follows Beta(power, 1)."""
        places = np.linspace(0, 1, len(self.scores))
        return np.interp(rng.beta(power, 1, count), places, self.scores).astype(np.float32)


def calibrated(rng: np.random.Generator, law: Law, size: int) -> Reference:
    """Return the reference of a fresh calibration, for a false-positive rate of `ALPHA`."""
    drawn = np.sort(law.draw(rng, size))
    return Reference.from_scores(drawn, float(drawn[conformal_rank(size, ALPHA) - 1]))


def changed_after(rng: np.random.Generator, reference: Reference, stream: Scores) -> int | None:
    """Return after how many images the monitor reports a change; None if it never does."""
    follower = Stream(reference, StreamState.new(0.0), LIMIT, rng)
    for start in range(0, len(stream), 8 * BLOCK):
        follower.add(stream[start : start + 8 * BLOCK], 0.0)
        after = follower.state(0.0).changed_after
        if after is not None:
            return after
    return None


def naive_changes(rng: np.random.Generator, law: Law, size: int, count: int) -> bool:
    """Return whether the same martingale alarms when its p-values compare with the fixed calibration alone."""
    calibration = np.sort(law.draw(rng, size))
    stream = law.draw(rng, count)
    higher = size - np.searchsorted(calibration, stream, side="left")
    p = (higher + rng.random(count)) / (size + 1)
    jumpers = [Jumper(rate) for rate in JUMPING_RATES]
    for start in range(0, count, BLOCK):
        halves = (0.5 - p[start : start + BLOCK]).tolist()
        if mixture([jumper.bet(halves) for jumper in jumpers]).max() >= np.log(LIMIT):
            return True
    return False


def quiet_rows(law: Law, n: int, real: Scores) -> Iterator[str]:
    """Yield the rows of streams without a change."""

    def row(name: str, images: int, alarms: list[bool]) -> str:
        count, of = sum(alarms), len(alarms)
        high = binomtest(count, of).proportion_ci(0.95, "exact").high
        return f"| {name} | {images:,} | {of:,} | {count} | {100 * count / of:.1f} % | {100 * high:.1f} % |"

    yield "| stream | images | streams | alarms | share | upper bound (exact, 95 %) |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    rng = np.random.default_rng([SEED, 1])
    yield row(
        "zeros", LENGTH,
        [changed_after(rng, calibrated(rng, law, n), law.draw(rng, LENGTH)) is not None for _ in range(1000)],
    )  # fmt: skip
    for share in (0.01, 0.05, 0.2):
        alarms = []
        for _ in range(1000):
            stream = law.draw(rng, LENGTH)
            stream[rng.random(LENGTH) < share] = 1.0
            alarms.append(changed_after(rng, calibrated(rng, law, n), stream) is not None)
        yield row(f"zeros and {100 * share:.0f} % strong anomalies", LENGTH, alarms)
    alarms = []
    for _ in range(1000):
        stream = law.draw(rng, LENGTH)
        stream[QUIET:][rng.random(LENGTH - QUIET) < 0.2] = 1.0
        alarms.append(changed_after(rng, calibrated(rng, law, n), stream) is not None)
    yield row(f"zeros, then 20 % strong anomalies after {QUIET:,} images", LENGTH, alarms)
    alarms = []
    for _ in range(1000):
        drawn = rng.permutation(real)
        known = np.sort(drawn[:n])
        reference = Reference.from_scores(known, float(known[conformal_rank(n, ALPHA) - 1]))
        alarms.append(changed_after(rng, reference, drawn[n:]) is not None)
    yield row("real unseen zeros, each used once, in random order", len(real) - n, alarms)
    small = 100
    yield row(
        f"zeros, with a calibration of {small} images", LENGTH,
        [changed_after(rng, calibrated(rng, law, small), law.draw(rng, LENGTH)) is not None for _ in range(300)],
    )  # fmt: skip
    yield row("p-values of a fixed calibration", LENGTH, [naive_changes(rng, law, n, LENGTH) for _ in range(1000)])
    yield row(
        f"p-values of a fixed calibration of {small} images", LENGTH,
        [naive_changes(rng, law, small, LENGTH) for _ in range(300)],
    )  # fmt: skip


def changed_rows(law: Law, n: int, changes: dict[str, Callable[[np.random.Generator, int], Scores]]) -> Iterator[str]:
    """Yield the rows of streams that change, from the start or after `QUIET` images."""
    column = f"found after {QUIET:,} images"
    yield f"| change | above the threshold | found at once | median | 95 % | {column} | median | 95 % |"
    yield "| --- | ---: |" + " ---: |" * 6
    streams = 60
    for name, draw in changes.items():
        cells, above = [], []
        for before in (0, QUIET):
            rng = np.random.default_rng([SEED, 2, before])
            found = []
            for _ in range(streams):
                reference = calibrated(rng, law, n)
                changed = draw(rng, LENGTH - QUIET)
                above.append(float((changed > reference.threshold).mean()))
                after = changed_after(rng, reference, np.concatenate([law.draw(rng, before), changed]))
                found.append(np.inf if after is None else after - before)
            middle, late = np.quantile(found, [0.5, 0.95], method="inverted_cdf")
            cells += [f"{np.isfinite(found).sum()} of {streams}", _images(middle), _images(late)]
        yield f"| {name} | {100 * np.mean(above):.0f} % | {' | '.join(cells)} |"


def _images(count: float) -> str:
    return f"{count:,.0f}" if np.isfinite(count) else "-"


def lot_rows(normal: Law, anomalies: Law, n: int) -> Iterator[str]:
    """Yield the rows of batches at a false-discovery rate, each with a fresh calibration."""
    yield "| calibration | images | sixes | rate | normal among the marked | upper bound (99 %) | sixes found |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    repetitions = 5_000
    for place, (size, images, share, rate) in enumerate(
        [(n, 1000, 0.05, 0.05), (n, 1000, 0.05, 0.1), (n, 1000, 0.2, 0.05), (n, 100, 0.1, 0.05), (100, 100, 0.1, 0.1)]
    ):
        rng, count = np.random.default_rng([SEED, 4, place]), round(share * images)
        wrong, found = np.empty(repetitions), np.empty(repetitions)
        for repetition in range(repetitions):
            calibration = np.sort(normal.draw(rng, size))
            scores = np.concatenate([normal.draw(rng, images - count), anomalies.draw(rng, count)])
            p_values = (1 + size - np.searchsorted(calibration, scores, side="left")) / (size + 1)
            marked = np.array(discoveries(p_values.tolist(), rate, size).q_values) <= rate
            wrong[repetition] = marked[:-count].sum() / max(1, marked.sum())
            found[repetition] = marked[-count:].mean()
        high = wrong.mean() + 2.326 * wrong.std(ddof=1) / np.sqrt(repetitions)
        yield (
            f"| {size:,} | {images:,} | {100 * share:.0f} % | {100 * rate:.0f} % | {100 * wrong.mean():.2f} % "
            f"| {100 * high:.2f} % | {100 * found.mean():.0f} % |"
        )


def other_pen() -> Digits:
    """Return the zeros of the UCI digits (8x8, 16 grey levels), enlarged and prepared with `fit=mnist`."""
    found = load_digits()
    planes = []
    for digit in found.images[found.target == 0]:
        grey = Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
        framed = Image.new("L", (160, 160))
        framed.paste(grey, (32, 32))
        file = io.BytesIO()
        framed.save(file, format="PNG")
        try:
            planes.append(np.frombuffer(fit(file.getvalue(), 1 << 22).pixels, np.uint8).reshape(28, 28))
        except InvalidImage:
            continue
    return np.stack(planes)


def filtered(digits: Digits, kernel: ImageFilter.Filter) -> Digits:
    """Return digits, uint8 [N, 28, 28], after a filter of Pillow."""
    return np.stack([np.asarray(Image.fromarray(digit).filter(kernel)) for digit in digits])


def draw_chart(reference: Reference, quiet: Scores, changed: Scores) -> int | None:
    """Draw the evidence of a real run: zeros, then the same zeros after a change. Return when the change was found."""
    follower = Stream(reference, StreamState.new(0.0), LIMIT, np.random.default_rng(SEED))
    evidence, scores = [], np.concatenate([quiet, changed])
    for place in range(len(scores)):
        follower.add(scores[place : place + 1], 0.0)
        evidence.append(follower.state(0.0).log_evidence / np.log(10))
    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    axes.plot(evidence, linewidth=1.5)
    axes.axhline(2, color="firebrick", linewidth=1, linestyle="--")
    axes.axvline(len(quiet), color="grey", linewidth=1)
    axes.text(len(quiet) * 0.98, 6, "zeros", ha="right")
    axes.text(len(quiet) * 1.3, 6, "the same zeros, thicker")
    axes.text(0, 2.3, "changed", color="firebrick")
    axes.set(xlabel="images", ylabel="evidence (log10)", ylim=(-2, 10))
    figure.savefig(CHART, dpi=120, facecolor="white", metadata={"Software": None})
    return follower.state(0.0).changed_after


def cost(law: Law, n: int) -> float:
    """Return the processor time of the monitor per image in microseconds: the best of five runs."""
    rng = np.random.default_rng([SEED, 3])
    reference, stream, times = calibrated(rng, law, n), law.draw(rng, 20_000), []
    for _ in range(5):
        began = time.thread_time()
        follower = Stream(reference, StreamState.new(0.0), LIMIT, rng)
        follower.add(stream, 0.0)
        follower.state(0.0).model_dump_json()
        times.append((time.thread_time() - began) / len(stream) * 1e6)
    return min(times)


def adding_cost(artifact: Artifact) -> float:
    """Return the processor time in microseconds that the inference thread spends on one score: the best of five runs.

    Each image is added alone, as in micro-batches of one image.
    """
    version: Any = artifact  # the monitor needs its manifest and its calibration
    times = []
    for _ in range(5):
        with TemporaryDirectory() as folder:
            metrics = Metrics()
            url = f"sqlite:///{folder}/reconstructions.db"
            store = open_store(url, ttl_seconds=60, max_bytes=10**6, entry_bytes=3000, timeout=1)
            reconstructions = Reconstructions(store, metrics, timeout=1, max_waiting=1)
            monitor = ValidityMonitor(reconstructions, metrics, LIMIT)
            monitor.add(version, [0.01])  # makes the reference of the version
            began = time.thread_time()
            for _ in range(20_000):
                monitor.add(version, [0.01])
            times.append((time.thread_time() - began) / 20_000 * 1e6)
            store.close()
    return min(times)


def replaced(page: str, name: str, text: str) -> str:
    """Return a page with the text between two marks replaced."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    head, rest = page.split(begin)
    return head + begin + "\n" + text + "\n" + end + rest.split(end)[1]


def main() -> None:
    """Run all simulations and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="Folder of MNIST.")
    parser.add_argument("--only", choices=("quiet", "changed", "chart", "cost", "lots"), help="Default: all parts.")
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    dataset = load("mnist", arguments.data_dir)
    assert dataset.test_start is not None
    images, labels = dataset.images[dataset.test_start :], dataset.labels[dataset.test_start :]
    zeros, sixes = images[labels == 0], images[labels == 6]
    artifact = Repository(ROOT / "model_store").open("zero", 1)
    detector = Detector.load(artifact, torch.device("cpu"), (1,))

    def scored(digits: Digits) -> Scores:
        found, reason = score_with_reasons(detector, np.ascontiguousarray(digits.reshape(-1, 28, 28)))
        return found[reason == 0]

    calibration, n = np.array(artifact.calibration.scores, np.float32), len(artifact.calibration.scores)
    real = np.concatenate([calibration, scored(zeros)])
    law = Law(np.sort(real))

    anomalies = Law(np.sort(scored(sixes)))

    def mix(rng: np.random.Generator, count: int) -> Scores:
        is_six = rng.random(count) < np.linspace(0, 0.5, count)
        return np.where(is_six, anomalies.draw(rng, count), law.draw(rng, count))

    changed = {
        "thicker strokes (maximum of 2x2 pixels)": np.maximum.reduce(
            [np.roll(zeros, move, (1, 2)) for move in ((0, 0), (0, 1), (1, 0), (1, 1))]
        ),
        "half the contrast": zeros // 2,
        "blur (Gaussian, 0.7 pixels)": filtered(zeros, ImageFilter.GaussianBlur(0.7)),
        "shift to the right by 1 pixel": np.roll(zeros, 1, 2),
        "another pen (UCI digits through `fit`)": other_pen(),
    }
    laws = {name: Law(np.sort(scored(digits))) for name, digits in changed.items()}
    changes = {
        **{f"ranks follow Beta({power}, 1)": _beta(law, power) for power in (1.2, 1.5, 2.0)},
        **{name: other.draw for name, other in laws.items()},
        "sixes, their share rises from 0 to 50 %": mix,
    }

    def chart() -> str:
        order = np.random.default_rng(SEED).permutation(len(zeros))
        thicker = changed["thicker strokes (maximum of 2x2 pixels)"]
        reference = Reference.of(artifact.manifest, artifact.calibration)
        found = draw_chart(reference, scored(zeros[order]), scored(thicker[order]))
        return f"The change was found after {found - len(zeros)} thicker images." if found else "It was not found."

    parts: dict[str, Callable[[], str]] = {
        "quiet": lambda: "\n".join(quiet_rows(law, n, real)),
        "changed": lambda: "\n".join(changed_rows(law, n, changes)),
        "chart": chart,
        "cost": lambda: (
            f"An image alone in its micro-batch takes {adding_cost(artifact):.1f} µs in the inference thread.\n"
            f"The test takes {cost(law, n):.1f} µs per image in another thread, in blocks of {BLOCK}."
        ),
        "lots": lambda: "\n".join(lot_rows(law, anomalies, n)),
    }
    for name, write in parts.items():
        if arguments.only in (None, name):
            PAGE.write_text(replaced(PAGE.read_text(), name, write()))


def _beta(law: Law, power: float) -> Callable[[np.random.Generator, int], Scores]:
    return lambda rng, count: law.draw(rng, count, power)


if __name__ == "__main__":
    main()
