"""How many trials a verdict needs: the tables of docs/evaluation.md, from simulated studies.

    python benchmarks/power.py

A study is two policies on the same scenes. Whether one succeeds depends on the scene, whose difficulty both feel, and
on its own luck: two normal variables of correlation 1/2, each below the quantile of its policy's success rate.
"""

import math
from statistics import NormalDist

import numpy as np

from manipi.evaluate.statistics import ALPHA, log_evidence, success_rate

STUDIES, CORRELATION = 1_000, 0.5
RATES, COUNTS = (0.5, 0.8, 0.95, 0.99), (20, 50, 100, 200, 500, 1_000)
PAIRS = ((0.7, 0.5), (0.9, 0.8), (0.95, 0.9), (0.99, 0.97), (0.9, 0.9))
LOOKS, MOST = (50, 100, 200, 500, 1_000), 2_000


def outcomes(rng: np.random.Generator, a: float, b: float, studies: int, trials: int) -> tuple[np.ndarray, np.ndarray]:
    """Success of A and of B, bool [studies, trials] each."""
    scene, mine, other = rng.standard_normal((3, studies, trials), np.float32)
    share, rest = math.sqrt(CORRELATION), math.sqrt(1 - CORRELATION)
    below_a, below_b = (NormalDist().inv_cdf(rate) for rate in (a, b))
    return share * scene + rest * mine < below_a, share * scene + rest * other < below_b


def stops(a: float, b: float) -> np.ndarray:
    """After how many scenes each study names a winner; `MOST` + 1 where it names none."""
    found = []
    for seed in range(STUDIES // 250):  # in parts, of which each takes little memory
        one, other = outcomes(np.random.default_rng(seed), a, b, 250, MOST)
        evidence = log_evidence(np.cumsum(one & ~other, axis=1), np.cumsum(other & ~one, axis=1))
        decided = evidence >= -math.log(ALPHA)
        found.append(np.where(decided.any(axis=1), decided.argmax(axis=1) + 1, MOST + 1))
    return np.concatenate(found)


def widths() -> list[str]:
    """Half the width of an interval, in points, as rows of Markdown."""
    lines = ["| success | " + " | ".join(f"n = {n:,}" for n in COUNTS) + " |", "|---" * (len(COUNTS) + 1) + "|"]
    for rate in RATES:
        found = [success_rate(round(rate * n), n) for n in COUNTS]
        cells = [f"±{100 * (one.high - one.low) / 2:.1f}" for one in found]
        lines.append(f"| {rate:.0%} | " + " | ".join(cells) + " |")
    return lines


def power() -> list[str]:
    """The share of studies that have named a winner after so many scenes, as rows of Markdown."""
    lines = ["| A and B succeed in | " + " | ".join(f"{n:,} scenes" for n in LOOKS) + " | half are decided after |"]
    lines.append("|---" * (len(LOOKS) + 2) + "|")
    for a, b in PAIRS:
        needed = stops(a, b)
        median = int(np.median(needed))
        shares = [f"{np.mean(needed <= n):.0%}" for n in LOOKS]
        lines.append(f"| {a:.0%}, {b:.0%} | " + " | ".join(shares) + f" | {median if median <= MOST else 'never'} |")
    return lines


if __name__ == "__main__":
    print("\n".join([*widths(), "", *power()]))
