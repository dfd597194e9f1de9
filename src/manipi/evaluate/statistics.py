"""How sure a success rate is."""

import math
from dataclasses import dataclass

Z_95 = 1.959963984540054


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
