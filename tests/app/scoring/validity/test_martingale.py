"""The mathematics of the validity monitor, compared with crepes, with exact laws and with simulations."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from crepes.martingales import EpsilonBettingFunction, SimpleJumper, semi_online_p_values
from scipy.stats import binomtest, kstest

from app.scoring.validity.bins import BINS, bin_of, edges, quantile
from app.scoring.validity.martingale import JUMPING_RATES, Jumper, mixture, p_values
from app.scoring.validity.share import share_interval
from app.scoring.validity.stream import Reference, Stream, StreamState
from tests.app.scoring.validity.streams import CALIBRATION, LIMIT, RANK, changed_after, reference, scores

SMALL = 100
"""Number of calibration images where the error of p-values against a fixed calibration is plain."""


def test_bins_are_ordered_and_narrow() -> None:
    """A higher score is never in a lower bin, each bin contains its scores, and no bin is wider than 3.2 %."""
    drawn = np.sort(np.exp(np.random.default_rng(0).uniform(-9, 5, 20_000))).astype(np.float32)
    bins = bin_of(drawn)
    assert np.all(np.diff(bins) >= 0)
    assert np.all((edges()[bins] <= drawn) & (drawn < edges()[bins + 1]))
    assert (edges()[1:] / edges()[:-1]).max() < 1.032
    assert bin_of([0.0, 1e-9, 1e9]).tolist() == [0, 0, BINS - 1]


@pytest.mark.parametrize("sizes", [(700,), (1, 255, 3, 441)])
def test_p_values_equal_those_of_crepes(sizes: tuple[int, ...]) -> None:
    """Binned semi-online p-values equal those of crepes for the same scores and random numbers, whatever the blocks."""
    rng = np.random.default_rng(1)
    calibration, stream = bin_of(scores(rng.random(300))), bin_of(scores(rng.random(700)))
    expected = semi_online_p_values(np.concatenate([calibration, stream]), seed=5)[300:]
    state = np.random.RandomState(5)  # crepes draws from the legacy generator
    random = state.rand(1000)[300:]
    counts = np.bincount(calibration, minlength=BINS)
    found, start = [], 0
    for size in sizes:
        found.append(p_values(counts, stream[start : start + size], random[start : start + size]))
        start += size
    assert np.allclose(np.concatenate(found), expected, rtol=1e-12)
    assert counts.tolist() == np.bincount(np.concatenate([calibration, stream]), minlength=BINS).tolist()


@pytest.mark.parametrize("rate", JUMPING_RATES)
def test_capital_equals_that_of_crepes(rate: float) -> None:
    """The capital of a jumper equals that of crepes after each p-value, across blocks, for quiet and for changed p."""
    rng = np.random.default_rng(2)
    p = np.concatenate([rng.random(600), rng.beta(1, 1.5, 600)])
    expected = np.log(SimpleJumper(J=rate, bf=EpsilonBettingFunction(E=[-1, 0, 1])).apply(p))
    jumper = Jumper(rate)
    found = np.concatenate([jumper.bet((0.5 - part).tolist()) for part in np.split(p, [100, 101, 400, 700])])
    assert np.allclose(found, expected, rtol=1e-9, atol=1e-9)
    mean = mixture([found, np.zeros(len(found))])
    assert np.allclose(np.exp(mean), (np.exp(found) + 2) / 3)


def test_capital_does_not_overflow() -> None:
    """The logarithm of the capital stays finite for a stream that has changed for a long time."""
    jumper = Jumper(1e-4)
    for _ in range(100):
        logs = jumper.bet([0.499] * 256)
    assert np.isfinite(logs).all()
    assert logs[-1] > 5000


def test_p_values_below_the_threshold_are_uniform() -> None:
    """P-values below the threshold are uniform and independent, although the threshold is a calibration score."""
    rng = np.random.default_rng(3)
    drawn = []
    for _ in range(400):
        against = reference(rng)
        stream = scores(rng.random(100))
        bins = bin_of(stream[stream < against.threshold])
        drawn.append(p_values(against.counts.copy(), bins, rng.random(len(bins))))
    together = np.concatenate(drawn)
    assert len(together) > 39_000
    assert kstest(together, "uniform").pvalue > 0.001
    lags = np.concatenate([part[1:] - 0.5 for part in drawn]) * np.concatenate([part[:-1] - 0.5 for part in drawn])
    assert abs(lags.mean()) < 4 / 12 / np.sqrt(len(lags))


def naive_changed(rng: np.random.Generator, stream: np.ndarray) -> bool:
    """Return whether the mixture with p-values against one fixed calibration ever reaches the limit."""
    calibration = np.sort(scores(rng.random(SMALL)))
    at_least = SMALL - np.searchsorted(calibration, stream)
    p = (at_least + rng.random(len(stream))) / (SMALL + 1)
    jumpers, highest = [Jumper(rate) for rate in JUMPING_RATES], 0.0
    for part in np.split(p, range(256, len(p), 256)):
        halves = (0.5 - part).tolist()
        highest = max(highest, float(mixture([jumper.bet(halves) for jumper in jumpers]).max()))
    return highest >= np.log(LIMIT)


@pytest.mark.parametrize("size", [SMALL, CALIBRATION])
def test_quiet_streams_rarely_alarm(size: int) -> None:
    """At most about 1 % of quiet streams of 5,000 scores alarm, also with a small calibration."""
    rng = np.random.default_rng(4)
    alarms = sum(changed_after(rng, scores(rng.random(5000)), size=size) is not None for _ in range(60))
    assert binomtest(alarms, 60, 0.01, alternative="greater").pvalue > 0.01


def test_p_values_of_a_fixed_calibration_alarm_without_a_change() -> None:
    """With a small calibration, p-values against the fixed calibration exceed the level of 1 %: the trap is real."""
    rng = np.random.default_rng(5)
    alarms = sum(naive_changed(rng, scores(rng.random(5000))) for _ in range(60))
    assert binomtest(alarms, 60, 0.01, alternative="greater").pvalue < 0.001


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_anomalies_above_the_threshold_are_no_change(share: float) -> None:
    """Strong anomalies have no influence, at whatever share, from the start or later."""
    rng = np.random.default_rng(6)
    alarms = 0
    for _ in range(30):
        stream = scores(rng.random(5000))
        stream[1000:][rng.random(4000) < share] = 1.0
        alarms += changed_after(rng, stream) is not None
    assert alarms <= 2


def test_a_change_is_found() -> None:
    """A clear change is found within 150 images in the median, and within 400 after 5,000 quiet images."""
    rng = np.random.default_rng(7)
    early = [changed_after(rng, scores(rng.beta(1.5, 1, 2000))) for _ in range(25)]
    late = [changed_after(rng, scores(np.concatenate([rng.random(5000), rng.beta(1.5, 1, 3000)]))) for _ in range(15)]
    assert None not in early + late
    assert np.median(early) <= 150
    assert 5000 < np.median(late) <= 5400


def test_lower_scores_are_a_change_too() -> None:
    """Scores that become lower are found as well."""
    rng = np.random.default_rng(8)
    found = [changed_after(rng, scores(rng.beta(1, 1.5, 3000))) for _ in range(10)]
    assert None not in found


def test_a_stream_continues_from_its_state() -> None:
    """A stream that is stored and read after each part equals one that is not, with the same random numbers."""
    rng = np.random.default_rng(9)
    against = reference(rng)
    stream = scores(rng.beta(1.3, 1, 4096))
    whole = Stream(against, StreamState.new(0.0), LIMIT, np.random.default_rng(1))
    whole.add(stream, 5.0)
    content: bytes | None = None
    generator = np.random.default_rng(1)
    for part in np.split(stream, 4):
        follower = Stream(against, StreamState.read(content, 0.0), LIMIT, generator)
        follower.add(part, 5.0)
        content = follower.state(5.0).pack()
    found, expected = StreamState.read(content, 1.0), whole.state(5.0)
    close = {"token", "log_evidence", "log_peak", "jumpers"}
    assert found.model_dump(exclude=close) == expected.model_dump(exclude=close)
    assert found.log_peak == pytest.approx(expected.log_peak, rel=1e-6)
    assert found.images == 4096
    assert found.changed_after is not None


def test_a_damaged_state_begins_a_new_stream() -> None:
    """A state that cannot be read, that has another format, or of which a bit has changed, is not used."""
    for content in (b"", b"{", b'{"format":2,"started":1,"updated":1}', b"\xff"):
        assert StreamState.read(content, 7.0) == StreamState.new(7.0)
        with_checksum = content + f"\n{zlib.crc32(content):08x}".encode()
        assert StreamState.read(with_checksum, 7.0) == StreamState.new(7.0)
    rng = np.random.default_rng(11)
    follower = Stream(reference(rng), StreamState.new(0.0), LIMIT, rng)
    follower.add(scores(rng.random(300)), 5.0)
    packed = follower.state(5.0).pack()
    assert StreamState.read(packed, 7.0).images == 300
    for bit in range(8 * len(packed)):
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        assert StreamState.read(bytes(damaged), 7.0) == StreamState.new(7.0)


def test_scores_equal_to_the_threshold_are_not_compared() -> None:
    """Only scores strictly below the threshold are compared: the threshold itself is a calibration score."""
    rng = np.random.default_rng(10)
    drawn = np.sort(scores(rng.random(CALIBRATION)))
    against = Reference.from_scores(drawn.astype(float), float(drawn[RANK - 1]))
    assert against.counts.sum() == RANK - 1
    follower = Stream(against, StreamState.new(0.0), LIMIT, rng)
    follower.add(np.full(10, drawn[RANK - 1]), 0.0)
    state = follower.state(0.0)
    assert (state.images, state.anomalous, sum(state.accepted.values())) == (10, 0, 0)
    assert sum(state.recent.values()) == 10


def test_quantiles_are_exact_to_a_bin() -> None:
    """A quantile from counts lies within 3.2 % of the quantile of the scores."""
    drawn = scores(np.random.default_rng(11).random(5000))
    counts = np.bincount(bin_of(drawn), minlength=BINS)
    for level in (0.1, 0.5, 0.9, 0.99):
        expected = np.quantile(drawn, level, method="inverted_cdf")
        assert quantile(counts, level) == pytest.approx(expected, rel=0.032)
    assert quantile(np.zeros(BINS, np.int64), 0.5) is None


def test_the_interval_of_the_share_holds_at_all_times() -> None:
    """The interval misses the true share at any of 2,000 counts in at most 5 % of all streams, and is not too wide."""
    rng = np.random.default_rng(12)
    missed = 0
    for _ in range(100):
        counts = np.cumsum(rng.random(2000) < 0.03)
        checked = [(int(counts[n - 1]), n) for n in (*range(1, 60), *range(60, 2001, 40))]
        intervals = [share_interval(*each) for each in checked]
        missed += any(not low <= 0.03 <= high for low, high in intervals)
    assert missed <= 10
    low, high = share_interval(100, 10_000)
    assert 0.006 < low < 0.01 < high < 0.015
    assert share_interval(0, 0) == (0.0, 1.0)
    assert share_interval(0, 50)[0] == 0.0
    assert share_interval(50, 50)[1] == 1.0
