"""Sketches: mean, deviation, extremes and quantiles of more numbers than fit in memory, in pieces that merge.

A histogram whose bins are aligned to powers of two, so that any two can be brought to the same bins without loss:

    width 2⁻¹   ├──────┼──────┼──────┼──────┤      a bin is always the union of bins of every finer width,
    width 2⁻²   ├──┼───┼──┼───┼──┼───┼──┼───┤      and begins at a multiple of its own width

The width follows from the smallest and the largest value alone, never from the order or the pieces in which values
came. Counts are integers and sums are kept as exact fractions, so that merging is associative and commutative to the
last bit.

A quantile is wrong by less than one bin, which is at most 2⁻¹⁵ of the range. A second look at the values of the bin
it lies in (`bins_to_zoom`, `zoomed`) makes it exact: it then equals `numpy.quantile` of the float32 values wherever
these are not closer together than 2⁻³¹ of the range.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, reduce
from pathlib import Path
from types import MappingProxyType

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
_ONE = 1 << 1074
"""Every float is a multiple of 1 / _ONE: sums of such integers are exact, and cheaper than of fractions."""
_FLOAT32_BITS, _SMALLEST = 24, -100
"""No bin is narrower than the steps between the largest float32 values, nor than 2⁻¹⁰⁰."""
_NOTHING: Mapping[int, "Sketch"] = MappingProxyType({})


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
    """int64; the first and the last are not 0."""

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray | None = None) -> "Sketch":
        """Of finite numbers [n], each counted once or, with integer `weights` [n], that often."""
        if not values.size:
            return cls(0, Fraction(0), Fraction(0), math.inf, -math.inf, _SMALLEST, 0, np.zeros(0, np.int64))
        tally = Tally(float(values.min()), float(values.max()))
        tally.add(values, weights)
        return tally.sketch()

    def merge(self, other: "Sketch") -> "Sketch":
        """Of the values of both."""
        if not self.num or not other.num:
            return self if self.num else other
        low, high = min(self.low, other.low), max(self.high, other.high)
        exponent = _exponent(low, high)
        parts = [self._coarsened(exponent), other._coarsened(exponent)]
        first = min(start for start, _ in parts)
        counts = np.zeros(max(start + len(part) for start, part in parts) - first, np.int64)
        for start, part in parts:
            counts[start - first : start - first + len(part)] += part
        total, squares = self.total + other.total, self.squares + other.squares
        return Sketch(self.num + other.num, total, squares, low, high, exponent, first, counts)

    def _coarsened(self, exponent: int) -> tuple[int, np.ndarray]:
        """First bin and counts with bins of the width 2 to the `exponent`, which is not narrower than the own."""
        first, counts = self.first, self.counts
        # No bin's number has more than 24 bits, so that halving once more would change nothing.
        for _ in range(min(exponent - self.exponent, 32)):
            pairs = np.zeros((first % 2 + len(counts) + 1) // 2 * 2, np.int64)
            pairs[first % 2 : first % 2 + len(counts)] = counts
            first, counts = first // 2, pairs[::2] + pairs[1::2]
        return first, counts

    @property
    def mean(self) -> float:
        return float(self.total / self.num) if self.num else math.nan

    @property
    def std(self) -> float:
        """Of the population, as numpy's."""
        return math.sqrt(self.squares / self.num - (self.total / self.num) ** 2) if self.num else math.nan

    def quantile(self, q: float, zoomed: Mapping[int, "Sketch"] = _NOTHING) -> float:
        """Linear between neighbours, as `numpy.quantile`.

        Args:
            zoomed: sketches of the values of single bins, by bin; without that of a bin its middle is the answer.
        """
        if not self.num:
            return math.nan
        below, above, fraction = self._neighbours(q)
        a, b = (self._value(rank, zoomed) for rank in (below, above))
        # Both forms that numpy uses, so that the last bit agrees.
        return b - (b - a) * (1 - fraction) if fraction >= 0.5 else a + (b - a) * fraction

    def bins_to_zoom(self) -> list[int]:
        """The bins that `QUANTILES` lie in."""
        ranks = [rank for q in QUANTILES for rank in self._neighbours(q)[:2]] if self.num else []
        return sorted({self._bin(rank)[0] for rank in ranks})

    def bounds(self, bin: int) -> tuple[float, float]:
        """Where a bin begins, and where the next one does."""
        return bin * 2.0**self.exponent, (bin + 1) * 2.0**self.exponent

    def _neighbours(self, q: float) -> tuple[int, int, float]:
        position = q * (self.num - 1)
        below = math.floor(position)
        return below, min(below + 1, self.num - 1), position - below

    def _value(self, rank: int, zoomed: Mapping[int, "Sketch"]) -> float:
        bin, rank = self._bin(rank)
        if bin in zoomed:
            return zoomed[bin]._value(rank, _NOTHING)
        left, right = self.bounds(bin)
        only_one = right - left <= np.spacing(np.float32(abs(left)))
        return min(max(left if only_one else (left + right) / 2, self.low), self.high)

    def _bin(self, rank: int) -> tuple[int, int]:
        """The bin of the value with `rank` values before it, and how many of these are in the same bin."""
        place = int(np.searchsorted(self._ends, rank, side="right"))
        return self.first + place, int(rank - self._ends[place] + self.counts[place])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.counts)


class Tally:
    """The making of a sketch of numbers whose smallest and largest are known before."""

    def __init__(self, low: float, high: float):
        self._low, self._high = low, high
        self._num, self._total, self._squares = 0, 0, 0
        self._buffers: list[np.ndarray] = []
        if low > high:  # of no numbers at all
            return
        self._exponent = _exponent(low, high)
        self._first, last = (math.floor(value * 2.0**-self._exponent) for value in (low, high))
        self._counts = np.zeros(last - self._first + 1, np.int64)

    def add(self, values: np.ndarray, weights: np.ndarray | None = None) -> None:
        size = min(len(values), _PIECE)
        if not self._buffers or len(self._buffers[0]) < size:
            self._buffers = [np.empty(size, dtype) for dtype in (values.dtype, np.int32, np.intp, np.float64)]
        # Half as large, so that more of them stay in a processor's cache; no block has 2³¹ numbers.
        counts = np.zeros(len(self._counts), np.int32) if weights is None else self._counts
        for start in range(0, len(values), _PIECE):
            piece = slice(start, start + _PIECE)
            self._add(values[piece], None if weights is None else weights[piece], counts)
        if weights is None:
            self._counts += counts

    def _add(self, values: np.ndarray, weights: np.ndarray | None, counts: np.ndarray) -> None:
        scaled, narrow, bins, distances = (buffer[: len(values)] for buffer in self._buffers)
        np.multiply(values, 2.0**-self._exponent, out=scaled)
        np.floor(scaled, out=scaled)
        np.subtract(scaled, self._first, out=scaled)
        np.copyto(narrow, scaled, casting="unsafe")
        np.copyto(bins, narrow)
        np.add.at(counts, bins, np.int32(1) if weights is None else weights)
        total, squares = _sums(values, weights, distances)
        self._num += len(values) if weights is None else int(weights.sum())
        self._total, self._squares = self._total + total, self._squares + squares

    def sketch(self) -> Sketch:
        if not self._num:
            return Sketch.of(np.zeros(0))
        sums = (self._num, Fraction(self._total, _ONE), Fraction(self._squares, _ONE**2))
        return Sketch(*sums, self._low, self._high, self._exponent, self._first, self._counts)


def _exponent(low: float, high: float) -> int:
    resolution = math.frexp(max(-low, high))[1] - _FLOAT32_BITS if low or high else _SMALLEST
    return max(math.frexp(high - low)[1] - BITS if high > low else _SMALLEST, resolution, _SMALLEST)


def _sums(values: np.ndarray, weights: np.ndarray | None, distances: np.ndarray) -> tuple[int, int]:
    """Of the values (in 1 / _ONE) and their squares (in 1 / _ONE²), rounded as their distances from one of them are."""
    # The sums of distances are small, so that nothing is lost where values are far from 0 and close together.
    centre, num = _exact(float(values[0])), len(values) if weights is None else int(weights.sum())
    np.subtract(values, float(values[0]), out=distances, dtype=np.float64)
    weighted = distances if weights is None else distances * weights
    # Not `@`, whose last bit depends on the threads of the library behind it.
    total, squares = _exact(float(weighted.sum())), _exact(float(np.einsum("i,i->", weighted, distances))) * _ONE
    return total + num * centre, squares + 2 * centre * total + num * centre**2


def _exact(number: float) -> int:
    numerator, denominator = number.as_integer_ratio()
    return numerator * (_ONE // denominator)


def field_of(sketches: Sequence[Sketch], zoomed: Sequence[Mapping[int, Sketch]] | None = None) -> FieldStats:
    """The statistics of a vector from the sketches of its dimensions; NaN where there was no value."""
    pairs = list(zip(sketches, zoomed or [_NOTHING] * len(sketches), strict=True))
    q01, q99 = ([sketch.quantile(q, zoom) for sketch, zoom in pairs] for q in QUANTILES)
    seen = [(s.mean, s.std, s.low if s.num else math.nan, s.high if s.num else math.nan) for s in sketches]
    mean, std, low, high = np.array(seen, np.float64).reshape(-1, 4).T
    return FieldStats(mean, std, np.array(q01), np.array(q99), low, high)


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
        if self.contract != other.contract:
            raise NormStatsError(
                expected=f"sketches of one robot layout and action horizon ({self.contract[:12]})",
                found=f"one of another ({other.contract[:12]})",
                where="sketches of norm stats",
                next="make both with the same robot and action horizon",
            )
        return NormStatsSketch(
            state=tuple(a.merge(b) for a, b in zip(self.state, other.state, strict=True)),
            actions=tuple(a.merge(b) for a, b in zip(self.actions, other.actions, strict=True)),
            num_frames=self.num_frames + other.num_frames,
            contract=self.contract,
            sources=tuple(sorted(self.sources + other.sources)),
        )

    def stats(
        self,
        zoomed_state: Sequence[Mapping[int, Sketch]] | None = None,
        zoomed_actions: Sequence[Mapping[int, Sketch]] | None = None,
    ) -> NormStats:
        """All but q01 and q99 exact; these within one bin, and exact too with the bins that they lie in."""
        data, rows = provenance(self.sources)
        return NormStats(
            state=field_of(self.state, zoomed_state),
            actions=field_of(self.actions, zoomed_actions),
            num_frames=self.num_frames,
            contract=self.contract,
            data=data,
            rows=rows,
        )

    def save(self, path: Path) -> None:
        """One .npz file: a JSON header, and all counts in a row."""
        sketches = [*self.state, *self.actions]
        about = [
            (s.num, str(s.total), str(s.squares), s.low, s.high, s.exponent, s.first, len(s.counts)) for s in sketches
        ]
        header = [len(self.state), self.num_frames, self.contract, self.sources, about]
        buffer = io.BytesIO()
        counts = np.concatenate([s.counts for s in sketches])
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
            Sketch(num, Fraction(total), Fraction(squares), low, high, exponent, first, part)
            for (num, total, squares, low, high, exponent, first, _), part in zip(about, counts, strict=True)
        ]
        return NormStatsSketch(
            state=tuple(sketches[:split]),
            actions=tuple(sketches[split:]),
            num_frames=num_frames,
            contract=contract,
            sources=tuple((data, rows) for data, rows in sources),
        )


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
