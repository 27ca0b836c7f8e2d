"""Test martingales against exchangeability, from semi-online smoothed conformal p-values.

Sources: Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2nd edition, 2022, sections 2.7 (smoothed
p-values) and 8.2 (simple jumper). Averaging jumpers with several jumping rates gives power against early and late
changes: Vovk et al., "Retrain or not retrain: conformal test martingales for change-point detection", COPA 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

JUMPING_RATES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Rates of the jumpers in the mixture. A fifth account with the rate 1 never bets: its capital is 1 at any time, so the
mixture never falls below a fifth."""


def p_values(counts: NDArray[np.int64], bins: NDArray[np.int64], random: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return semi-online smoothed p-values of a stream, float64 [N], and add the stream to `counts`.

    The p-value of image i is (a + u (e + 1)) / (n + 1): of the n scores before it, calibration included, a are in a
    higher bin and e in the same bin. If all scores are exchangeable, the p-values are independent and uniform.

    Args:
        counts: earlier scores per bin, int64 [bins]; changed in place.
        bins: bin of each score of the stream, int64 [N].
        random: u, uniform in 0 to 1, float64 [N]; independent of everything else.
    """
    size = len(bins)
    narrow = bins.astype(np.int16)  # compared four times as fast
    above = counts.sum() - np.cumsum(counts)
    earlier = np.tri(size, k=-1, dtype=bool)
    higher = above[bins] + np.count_nonzero((narrow > narrow[:, None]) & earlier, axis=1)
    equal = counts[bins] + np.count_nonzero((narrow == narrow[:, None]) & earlier, axis=1)
    before = counts.sum() + np.arange(size)
    np.add.at(counts, bins, 1)
    found: NDArray[np.float64] = (higher + random * (equal + 1)) / (before + 1)
    return found


class Jumper:
    """The capital of the simple jumper, which bets 1 + e (p - 1/2) with e = -1, 0 and 1 on three accounts.

    After each bet, a share of every account, the jumping rate, is spread evenly over the three accounts. The capital is
    stored as a logarithm: on a stream that has changed it grows without limit.

    Args:
        rate: the jumping rate, between 0 and 1.
        log_capital: natural logarithm of the total capital.
        difference, sides: account of e = -1 minus that of e = 1, and their sum, as shares of the total capital.
    """

    def __init__(self, rate: float, log_capital: float = 0.0, difference: float = 0.0, sides: float = 2 / 3) -> None:
        self.rate = rate
        self.log_capital = log_capital
        self.difference = difference
        self.sides = sides

    def bet(self, halves: Sequence[float]) -> NDArray[np.float64]:
        """Bet on up to 512 p-values in order. Return the logarithm of the capital after each, float64 [N].

        Args:
            halves: 1/2 - p for each p-value.
        """
        stay, spread = 1.0 - self.rate, 2.0 * self.rate / 3.0
        total, difference, sides = 1.0, self.difference, self.sides
        capitals = []
        for half in halves:
            kept = stay * sides + spread * total
            difference *= stay
            gain = half * difference
            difference += half * kept
            sides = kept + gain
            total += gain
            capitals.append(total)
        logs = np.log(capitals) + self.log_capital
        # The next call begins with a total of 1 again, so that no number overflows.
        self.difference, self.sides = difference / total, sides / total
        self.log_capital += math.log(total)
        return logs


def mixture(logs: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the logarithm of the mean capital of some jumpers and of one account that never bets.

    Args:
        logs: logarithms of the capital of each jumper, float64 [N] each.
    """
    never_bets = np.zeros_like(logs[0])
    found: NDArray[np.float64] = np.logaddexp.reduce([*logs, never_bets]) - math.log(len(logs) + 1)
    return found
