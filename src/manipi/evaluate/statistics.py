"""Success rates and differences of success with their intervals, and a test that may be looked at after every trial.

    trial        1   2   3   4   5   6   7   8   9         A and B on the same scenes, with the same noise
    A            ✓   ✓   ✗   ✓   ✓   ✓   ✗   ✓   ✓
    B            ✓   ✗   ✗   ✓   ✗   ✓   ✓   ✗   ✓
    discordant       a           a       b   a             m = 4 of which k = 3 for A: E = 2^m · B(k + 1, m - k + 1)

Only scenes that the two disagree on say which is better. Were the policies equal, each of those would go to A with
probability 1/2, and E, the likelihood ratio of "some other probability, all alike" to that, would be a martingale of
mean 1: it ever reaches 1/α with probability at most α (Ville 1939). So the test may stop after any trial.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

Z_95 = 1.959963984540054

ALPHA = 0.05
"""How often a winner may be named where there is none, at most."""

Verdict: TypeAlias = Literal["a", "b", "equivalent", "undecided"]


@dataclass(frozen=True)
class SuccessRate:
    """k successes of n trials with Wilson's 95 % interval (Wilson, 1927)."""

    n: int
    k: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.k}/{self.n} = {self.rate:.1%} (95 % interval {self.low:.1%} to {self.high:.1%})"


def success_rate(k: int, n: int) -> SuccessRate:
    """Wilson's score interval: right also at 0 and n, where the normal approximation has no width."""
    assert 0 <= k <= n > 0
    p, z2 = k / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends rounding could pass 0 or 1 by an ulp.
    return SuccessRate(n=n, k=k, rate=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)))


@dataclass(frozen=True)
class Difference:
    """The success rate of A minus that of B, with its 95 % interval."""

    difference: float
    low: float
    high: float


def unpaired_difference(a: SuccessRate, b: SuccessRate) -> Difference:
    """Of two policies that were tried on scenes of their own (Newcombe 1998, Stat. Med. 17:873, method 10)."""
    return _square_and_add(a, b, 0.0)


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> Difference:
    """Of two policies on the same scenes, in the same order (Newcombe 1998, Stat. Med. 17:2635, method 10).

    The more the scenes decide who succeeds, the narrower the interval: `phi` is their correlation.
    """
    assert len(a) == len(b) > 0
    n = len(a)
    both = sum(x and y for x, y in zip(a, b))
    of_a, of_b = success_rate(sum(a), n), success_rate(sum(b), n)
    neither = n - of_a.k - of_b.k + both
    only_a, only_b = of_a.k - both, of_b.k - both
    spread = of_a.k * (n - of_a.k) * of_b.k * (n - of_b.k)
    agreement = both * neither - only_a * only_b
    if agreement > 0:  # Newcombe's correction for continuity
        agreement = max(agreement - n / 2, 0.0)
    return _square_and_add(of_a, of_b, agreement / math.sqrt(spread) if spread else 0.0)


def _square_and_add(a: SuccessRate, b: SuccessRate, phi: float) -> Difference:
    """Newcombe's interval from the two of Wilson, for outcomes of correlation `phi`."""

    def length(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    difference = a.rate - b.rate
    low = difference - length(a.rate - a.low, b.high - b.rate)
    return Difference(difference, max(low, -1.0), min(difference + length(a.high - a.rate, b.rate - b.low), 1.0))


def groups_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Of two recipes that were trained several times each, from the success rate of every training run.

    The runs are the sample: what one seed of training gains over another is noise here, however many scenes each saw
    (Welch 1947, Biometrika 34:28).

    Args:
        a, b: at least two rates each.
    """
    from scipy.special import stdtrit  # the quantile of Student's t; its import takes longer than all else here

    means, squares = (float(np.mean(a)), float(np.mean(b))), [float(np.var(x, ddof=1)) / len(x) for x in (a, b)]
    difference = means[0] - means[1]
    if not sum(squares):
        return Difference(difference, difference, difference)
    freedom = sum(squares) ** 2 / sum(s * s / (len(x) - 1) for s, x in zip(squares, (a, b)))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(sum(squares))
    return Difference(difference, max(difference - half, -1.0), min(difference + half, 1.0))


# The sequential test --------------------------------------------------------------------------------------------------


def log_evidence(wins_a: int | np.ndarray, wins_b: int | np.ndarray) -> np.ndarray:
    """log E after so many scenes that A alone, and that B alone, succeeded in. Both may be arrays."""
    wins_a, wins_b = np.asarray(wins_a), np.asarray(wins_b)
    together = wins_a + wins_b
    # B(k + 1, m - k + 1) = k! (m - k)! / (m + 1)!
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, int(together.max()) + 2)))])
    return together * math.log(2) + log_factorial[wins_a] + log_factorial[wins_b] - log_factorial[together + 1]


class SequentialTest:
    """Names the better of two policies while their trials come in.

    Args:
        alpha: how often a winner may be named where there is none; for several comparisons, divided by their number.
        planned: pairs of trials after which it ends in any case; None: as many as come.
    """

    def __init__(self, *, alpha: float = ALPHA, planned: int | None = None):
        self._bound, self.planned = -math.log(alpha), planned
        self.trials = self.wins_a = self.wins_b = 0
        self.log_evidence = 0.0
        """The largest that it was."""
        self.winner: Literal["a", "b"] | None = None

    @property
    def p_value(self) -> float:
        """Valid whenever it is read."""
        return min(1.0, math.exp(-self.log_evidence))

    def add(self, a: bool, b: bool) -> None:
        """The outcomes of one scene. The first winner stays the winner."""
        self.trials += 1
        self.wins_a, self.wins_b = self.wins_a + (a > b), self.wins_b + (b > a)
        self.log_evidence = max(self.log_evidence, float(log_evidence(self.wins_a, self.wins_b)))
        if self.winner is None and self.log_evidence >= self._bound:
            self.winner = "a" if self.wins_a > self.wins_b else "b"

    @property
    def futile(self) -> bool:
        """No winner can come of the planned trials, even if all that are left went one way."""
        if self.planned is None or self.winner:
            return False
        left = np.arange(max(self.planned - self.trials, 0) + 1)
        best = max(
            log_evidence(self.wins_a + left, self.wins_b).max(), log_evidence(self.wins_a, self.wins_b + left).max()
        )
        return bool(best < self._bound)

    def more_trials(self, *, most: int = 5_000, studies: int = 400) -> tuple[int | None, int | None]:
        """How many more a winner would take: the median and the 90th percentile; None where it is more than `most`.

        Simulated from what was seen so far (Jeffreys' prior over only A, only B, and equal outcomes); the same trials
        give the same forecast.
        """
        if self.winner:
            return 0, 0
        rng = np.random.default_rng((self.trials, self.wins_a, self.wins_b))
        equal = self.trials - self.wins_a - self.wins_b
        chances = rng.dirichlet((self.wins_a + 0.5, self.wins_b + 0.5, equal + 0.5), studies)
        draws = rng.random((studies, most))
        a = self.wins_a + np.cumsum(draws < chances[:, :1], axis=1)
        b = self.wins_b + np.cumsum((draws >= chances[:, :1]) & (draws < chances[:, :2].sum(1, keepdims=True)), axis=1)
        decided = log_evidence(a, b) >= self._bound
        needed = np.sort(np.where(decided.any(1), decided.argmax(1) + 1, most + 1))
        median, late = int(needed[studies // 2]), int(needed[math.ceil(0.9 * studies) - 1])
        return (median if median <= most else None), (late if late <= most else None)


def verdict(winner: Literal["a", "b"] | None, interval: Difference, margin: float) -> Verdict:
    """What a comparison found. `equivalent` only where the interval lies within `margin` of no difference."""
    if winner:
        return winner
    return "equivalent" if -margin <= interval.low and interval.high <= margin else "undecided"
