"""Sketches: mean, deviation, extremes and quantiles of many numbers, in pieces that merge.

A histogram whose bins are aligned to powers of two, so that any two can be brought to the same bins without loss:

    width 2⁻¹   ├──────┼──────┼──────┼──────┤      a bin is always the union of bins of every finer width,
    width 2⁻²   ├──┼───┼──┼───┼──┼───┼──┼───┤      and begins at a multiple of its own width

The width follows from the smallest and the largest value alone, never from the order or the pieces in which values
came. Counts are integers and sums are kept as exact fractions, so that merging is associative and commutative to the
last bit.

A quantile that is read from the bins is wrong by less than one of them, which is at most 2⁻¹⁵ of the range. Where all
numbers pass by in one place, the tails that it lies in are kept instead (`Quantile`), which gives `numpy.quantile`.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from pathlib import Path

import numpy as np

from manipi.errors import NormStatsError
from manipi.records import fingerprint
from manipi.storage import atomic_write
from manipi.types import FieldStats, NormStats

BITS = 16
"""There are at most 2¹⁶ + 1 bins."""
QUANTILES = (0.01, 0.99)
_PIECE = 1 << 17
"""Numbers that stay in a processor's own cache while they are worked on."""
_FLOAT32_BITS, _SMALLEST = 24, -100
"""No bin is narrower than the steps between the largest float32 values, nor than 2⁻¹⁰⁰."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """Of the values of one dimension. Bin `first + i` covers [(first + i) · width, (first + i + 1) · width)."""

    num: int
    total: Fraction
    squares: Fraction
    low: float
    high: float
    exponent: int
    """The width of a bin is 2 to this power."""
    first: int
    counts: np.ndarray
    """int64; the first and the last are not 0. Empty where they are not needed."""
    exact: tuple[float, ...] | None = None
    """The `QUANTILES`, where they are known better than from the bins."""

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray | None = None, *, bins: bool = True) -> "Sketch":
        """Of finite numbers [n], each counted once or, with integer `weights` [n], that often; `bins`: with counts."""
        if not values.size:
            return cls(0, Fraction(0), Fraction(0), math.inf, -math.inf, _SMALLEST, 0, np.zeros(0, np.int64))
        low, high = float(values.min()), float(values.max())
        exponent = _exponent(low, high)
        first, last = (math.floor(value * 2.0**-exponent) for value in (low, high))
        counts = np.zeros(last - first + 1 if bins else 0, np.int64)
        num, total, squares = 0, Fraction(0), Fraction(0)
        for start in range(0, len(values), _PIECE):
            piece = values[start : start + _PIECE]
            times = np.int64(1) if weights is None else weights[start : start + _PIECE]
            if len(counts):
                np.add.at(counts, (np.floor(piece * 2.0**-exponent) - first).astype(np.intp), times)
            # Sums of distances from one of the values are small, so that nothing is lost where all are far from 0.
            centre, distances = Fraction(float(piece[0])), np.subtract(piece, float(piece[0]), dtype=np.float64)
            weighted, count = (distances, len(piece)) if weights is None else (distances * times, int(times.sum()))
            # Not `@`, whose last bit depends on the threads of the library behind it.
            offset, square = Fraction(float(weighted.sum())), Fraction(float(np.einsum("i,i->", weighted, distances)))
            num, total = num + count, total + offset + count * centre
            squares += square + 2 * centre * offset + count * centre**2
        return cls(num, total, squares, low, high, exponent, first, counts)

    def merge(self, other: "Sketch") -> "Sketch":
        """Of the values of both; what was known better than from the bins is lost."""
        if not self.num or not other.num:
            return self if self.num else other
        low, high = min(self.low, other.low), max(self.high, other.high)
        exponent, parts = _exponent(low, high), list[tuple[int, np.ndarray]]()
        for first, counts, finer in ((one.first, one.counts, exponent - one.exponent) for one in (self, other)):
            # No bin's number has more than 24 bits, so that halving once more than that would change nothing.
            for _ in range(min(finer, 32)):
                counts = np.pad(counts, (first % 2, (first + len(counts)) % 2))
                first, counts = first // 2, counts[::2] + counts[1::2]
            parts.append((first, counts))
        first = min(start for start, _ in parts)
        size = max(start + len(part) for start, part in parts) - first
        counts = np.zeros(size if len(self.counts) and len(other.counts) else 0, np.int64)
        for start, part in parts if len(counts) else ():
            counts[start - first : start - first + len(part)] += part
        total, squares = self.total + other.total, self.squares + other.squares
        return Sketch(self.num + other.num, total, squares, low, high, exponent, first, counts)

    def quantile(self, q: float) -> float:
        """Linear between neighbours, as `numpy.quantile`, of which each is the middle of its bin."""
        below, above, fraction = _neighbours(q, self.num)
        bins = self.first + np.searchsorted(np.cumsum(self.counts), [below, above], side="right")
        left, width = bins * 2.0**self.exponent, 2.0**self.exponent
        only_one = width <= np.spacing(np.abs(left).astype(np.float32))  # float32 value in the bin: where it begins
        a, b = np.clip(np.where(only_one, left, left + width / 2), self.low, self.high).tolist()
        return _between(a, b, fraction)


class Quantile:
    """`numpy.quantile` of numbers that come in pieces, exactly; only those that may yet be beyond it are kept.

    Args:
        num: of the numbers that will come, each as often as it counts.
        sample: some of them. Numbers that lie twice as deep in it as the quantile are not kept. Of none, all are.
    """

    def __init__(self, q: float, num: int, sample: np.ndarray):
        below, above, self._fraction = _neighbours(q, num)
        self._sign = 1 if q < 0.5 else -1  # the highest numbers are the lowest, once their sign is changed
        self._ranks = np.array([below, above] if q < 0.5 else [num - 1 - below, num - 1 - above])
        self._limit, self._values, self._weights = math.inf, list[np.ndarray](), list[np.ndarray]()
        if len(sample):
            self._limit = float(np.quantile(sample * self._sign, 2 * min(q, 1 - q), method="higher"))

    def add(self, values: np.ndarray, weights: np.ndarray | None) -> None:
        """Numbers [m], and how often each counts [m] (None: once)."""
        near = values <= self._limit if self._sign > 0 else values >= -self._limit
        self._values.append(values[near] * self._sign)
        self._weights += [] if weights is None else [weights[near]]
        if self.kept > 2 * max(self._ranks) + _PIECE:
            self._prune()

    @property
    def kept(self) -> int:
        """How many numbers are in memory."""
        return sum(map(len, self._values))

    @property
    def misled(self) -> bool:
        """Whether the sample was so unlike all the numbers that too few were kept; they have to come once more."""
        return (sum(int(some.sum()) for some in self._weights) if self._weights else self.kept) <= max(self._ranks)

    def _prune(self) -> list[float]:
        """Keep no number beyond the ranks, of which the numbers are returned."""
        values, at = np.concatenate(self._values), np.array(self._ranks)
        if self._weights:
            order = np.argsort(values)
            values, weights = values[order], np.concatenate(self._weights)[order]
            at = np.searchsorted(np.cumsum(weights), self._ranks, side="right")
            self._weights = [weights[: at.max() + 1]]
        else:
            values = np.partition(values, self._ranks)
        self._values, self._limit = [values[: at.max() + 1]], float(values[at.max()])
        return (values[at].astype(np.float64) * self._sign).tolist()

    def value(self) -> float:
        """Of all that was added; NaN of nothing."""
        if not self.kept:
            return math.nan
        below, above = self._prune()
        return _between(below, above, self._fraction)


def _neighbours(q: float, num: int) -> tuple[int, int, float]:
    """The ranks that a quantile lies between, and how far it is on the way."""
    position = q * (num - 1)
    return math.floor(position), min(math.floor(position) + 1, num - 1), position - math.floor(position)


def _between(a: float, b: float, fraction: float) -> float:
    # Both forms that numpy uses, so that the last bit agrees.
    return b - (b - a) * (1 - fraction) if fraction >= 0.5 else a + (b - a) * fraction


def _exponent(low: float, high: float) -> int:
    resolution = math.frexp(max(-low, high))[1] - _FLOAT32_BITS if low or high else _SMALLEST
    return max(math.frexp(high - low)[1] - BITS if high > low else _SMALLEST, resolution, _SMALLEST)


def field_of(sketches: Sequence[Sketch]) -> FieldStats:
    """The statistics of a vector from the sketches of its dimensions; NaN where there was no value."""
    rows = []
    for s in sketches:
        mean, squares = (s.total / s.num, s.squares / s.num) if s.num else (math.nan, math.nan)
        std = math.sqrt(squares - mean**2)  # of the population, as numpy's
        quantiles = s.exact or [s.quantile(q) for q in QUANTILES]
        rows.append((float(mean), std, *quantiles, *((s.low, s.high) if s.num else (math.nan, math.nan))))
    return FieldStats(*np.array(rows, np.float64).reshape(-1, 6).T)


@dataclass(frozen=True, kw_only=True, eq=False)
class NormStatsSketch:
    """What norm stats are made of, for some rows of one or several datasets; made by `sketch_norm_stats`."""

    state: tuple[Sketch, ...]
    actions: tuple[Sketch, ...]
    num_frames: int
    contract: str
    sources: tuple[tuple[str, str], ...]
    """Fingerprints of dataset and rows, sorted."""

    def merge(self, other: "NormStatsSketch") -> "NormStatsSketch":
        """Of the rows of both. Raises NormStatsError where they are of different robots or action horizons."""
        return NormStatsSketch(
            contract=one_contract([self.contract, other.contract]),
            state=tuple(map(Sketch.merge, self.state, other.state)),
            actions=tuple(map(Sketch.merge, self.actions, other.actions)),
            num_frames=self.num_frames + other.num_frames,
            sources=tuple(sorted(self.sources + other.sources)),
        )

    def stats(self) -> NormStats:
        """All exact, but q01 and q99 of what was merged or read from a file: these within 2⁻¹⁵ of the range."""
        state, actions = field_of(self.state), field_of(self.actions)
        data, rows = provenance(self.sources)
        frames, contract = self.num_frames, self.contract
        return NormStats(state=state, actions=actions, num_frames=frames, contract=contract, data=data, rows=rows)

    def save(self, path: Path) -> None:
        """One .npz file: a JSON header, and all counts in a row."""
        sketches = [*self.state, *self.actions]
        about = [
            (s.num, str(s.total), str(s.squares), s.low, s.high, s.exponent, s.first, len(s.counts)) for s in sketches
        ]
        header = [len(self.state), self.num_frames, self.contract, self.sources, about]
        buffer, counts = io.BytesIO(), np.concatenate([s.counts for s in sketches])
        np.savez_compressed(buffer, header=np.array(json.dumps(header)), counts=counts)
        atomic_write(path, buffer.getvalue())

    @staticmethod
    def load(path: Path) -> "NormStatsSketch":
        """What `save` wrote. Raises NormStatsError for any other file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                split, num_frames, contract, sources, about = json.loads(str(file["header"]))
                counts = np.split(file["counts"], np.cumsum([s[-1] for s in about])[:-1])
        except (OSError, ValueError, KeyError) as error:
            raise NormStatsError(
                expected="a sketch of norm stats",
                found=str(error),
                where=str(path),
                next="write it again: manipi stats TARGET --sketch FILE",
            ) from error
        sketches = [
            Sketch(num, Fraction(total), Fraction(squares), *rest, counts=part)
            for (num, total, squares, *rest, _), part in zip(about, counts, strict=True)
        ]
        return NormStatsSketch(
            state=tuple(sketches[:split]),
            actions=tuple(sketches[split:]),
            num_frames=num_frames,
            contract=contract,
            sources=tuple((data, rows) for data, rows in sources),
        )


def one_contract(contracts: Sequence[str]) -> str:
    """The contract that all share. Raises NormStatsError where they are of different robots or action horizons."""
    for other in contracts:
        if other != contracts[0]:
            raise NormStatsError(
                expected=f"sketches of one robot layout and action horizon ({contracts[0][:12]})",
                found=f"one of another ({other[:12]})",
                where="sketches of norm stats",
                next="make both with the same robot and action horizon",
            )
    return contracts[0]


def provenance(sources: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """`NormStats.data` and `NormStats.rows` of statistics over these rows of these datasets, as fingerprints."""
    data = sorted({dataset for dataset, _ in sources})
    return (
        data[0] if len(data) == 1 else fingerprint(data),
        sources[0][1] if len(sources) == 1 else fingerprint(sorted(sources)),
    )


def merge_sketches(sketches: Sequence[NormStatsSketch]) -> NormStats:
    """The norm stats of all rows together, each counted once: q01 and q99 within 2⁻¹⁵ of the range, the rest exact.

    Raises:
        NormStatsError: they are of different robots or action horizons.
    """
    return reduce(NormStatsSketch.merge, sketches).stats()
