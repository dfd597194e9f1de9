"""Norm stats: computed from state and actions, merged, saved and drawn.

State and actions pass through the same `ActionSpace` as in training, the actions over the whole chunk, so the
statistics are of what the model sees. Steps beyond the end of an episode do not count, and no picture is read.

    column    one dimension at the rows. An absolute command is in the chunks of the rows before it: it counts once for
              each of them
    chunks    a relative action group: every chunk, seen from the state of its row, many rows at a time

A dimension (of relative poses, a group) is worked through by one thread, or one worker of a Ray cluster, in blocks of
rows: the statistics are the same to the last bit however many workers there are. In memory, beside the columns, each of
them holds a few blocks, and the tails that q01 and q99 are in: about 4 % of its dimension's numbers.

What is merged with the statistics of other rows is a histogram whose bins are aligned to powers of two, so that any two
can be brought to the same bins without loss:

    width 2⁻¹   ├──────┼──────┼──────┼──────┤      a bin is always the union of bins of every finer width,
    width 2⁻²   ├──┼───┼──┼───┼──┼───┼──┼───┤      and begins at a multiple of its own width

The width follows from the smallest and the largest value alone. Counts are integers and sums are kept as exact
fractions, so that merging is associative and commutative to the last bit. A quantile that is read from the bins is
wrong by less than one of them, which is at most 2⁻¹⁵ of the range.

Shape letters: N rows of the dataset, n rows asked for, H steps, D dimensions, A and S dimensions of command and state,
m numbers.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from fractions import Fraction
from functools import partial, reduce
from itertools import accumulate, chain
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Int64
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from manipi.data.dataset import Dataset, command_names
from manipi.errors import ConfigError, NormStatsError, unknown_name
from manipi.processes import on_cluster
from manipi.records import fingerprint
from manipi.robots.robot import ActionGroup, EndEffector, Joints, Robot
from manipi.storage import atomic_write
from manipi.transforms.actions import ActionSpace, encode_group
from manipi.transforms.pipeline import contract
from manipi.types import FieldStats, NormStats

QUANTILES = (0.01, 0.99)
BLOCK, PIECE = 1 << 19, 1 << 17
"""Numbers per dimension that are worked on at a time, and those that stay in a processor's own cache meanwhile."""
SAMPLE = 1 << 17
"""Numbers per dimension that say beforehand where q01 and q99 are about."""
BITS, FLOAT32_BITS, SMALLEST = 16, 24, -100
"""There are at most 2¹⁶ + 1 bins, and none is narrower than the steps between the largest float32 values, nor than
2⁻¹⁰⁰."""
NEAR_CONSTANT = 1e-4
"""A dimension whose q01 and q99 are closer than this makes tiny differences huge once normalised."""
FAR = 10
"""An outlier lies this many times the distance between q01 and q99 beyond them."""
NORMAL_RANGE = 4.6527
"""Distance between q01 and q99 of a normal distribution, in standard deviations."""

Rows: TypeAlias = tuple[Dataset, Robot, Int64[np.ndarray, " n"]]
"""Rows of a dataset (global frame numbers, in any order), and the robot that it is of."""
Blocks: TypeAlias = Iterator[tuple[np.ndarray, np.ndarray | None]]
"""Numbers [D, m], and how often each counts [m]; None: once."""
Part: TypeAlias = Callable[[int], Blocks]
"""One or some dimensions of a dataset, at every so many-th of the rows asked for."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What works on the dimensions: so many threads here, or the Ray cluster that this process belongs to."""

    threads: int = 0
    """0: one per processor."""
    ray: bool = False


def compute_norm_stats(
    dataset: Dataset,
    robot: Robot,
    action_horizon: int,
    rows: Int64[np.ndarray, " n"],
    *,
    workers: Workers = Workers(),
    min_range: float | Mapping[str, float] = 0.0,
) -> NormStats:
    """Exact mean, std, min, max and quantiles over `rows` (global frame numbers, in any order).

    Args:
        min_range: as `with_min_range` takes it.

    Raises:
        ConfigError: no rows; no such dimension; Ray is wanted and not installed.
    """
    sketch = sketch_norm_stats([(dataset, robot, rows)], action_horizon, workers=workers, bins=False)
    return with_min_range(sketch.stats(), min_range)


def sketch_norm_stats(
    sets: Sequence[Rows], action_horizon: int, *, workers: Workers = Workers(), bins: bool = True
) -> "NormStatsSketch":
    """What norm stats over all rows of the sets are made of, exact as they are, and to be merged with others.

    Args:
        bins: False: without the histograms that merging and drawing need; takes half the time.

    Raises:
        ConfigError: no rows; Ray is wanted and not installed.
        NormStatsError: the sets are of different robot layouts.
    """
    if not all(len(rows) for _, _, rows in sets):
        raise ConfigError(
            expected="at least one frame", found="none", where="rows of norm stats", next="choose fewer filters"
        )
    num_frames, horizon = sum(len(rows) for _, _, rows in sets), range(action_horizon)
    sketches = _sketch([_parts(*one, horizon) for one in sets], num_frames * action_horizon, workers, bins=bins)
    return NormStatsSketch(
        sketches=tuple(sketches),
        state_size=sets[0][1].state_size,
        num_frames=num_frames,
        contract=one_contract([contract(robot, action_horizon) for _, robot, _ in sets]),
        sources=tuple(sorted((dataset.fingerprint, rows_fingerprint(rows)) for dataset, _, rows in sets)),
    )


def merge_sketches(sketches: Sequence["NormStatsSketch"]) -> NormStats:
    """The norm stats of all rows together, each counted once: q01 and q99 within 2⁻¹⁵ of the range, the rest exact.

    Raises:
        NormStatsError: they are of different robots or action horizons.
    """
    return reduce(NormStatsSketch.merge, sketches).stats()


def per_step_stats(
    dataset: Dataset, robot: Robot, action_horizon: int, rows: Int64[np.ndarray, " n"], *, workers: Workers = Workers()
) -> FieldStats:
    """Exact statistics of the actions at each step of the chunk, [H, A]; NaN where no episode is that long."""
    fields = []
    for step in tqdm(range(action_horizon), desc="per step", unit="step", disable=None):
        parts = _parts(dataset, robot, rows, range(step, step + 1))
        fields.append(astuple(field_of(_sketch([parts[robot.state_size :]], len(rows), workers))))
    return FieldStats(*map(np.stack, zip(*fields, strict=True)))


def field_stats(values: np.ndarray) -> FieldStats:
    """[N, dim] -> exact statistics per dimension, float64."""
    parts = [partial(_column, column, np.arange(len(values)), None) for column in _transposed(values)]
    return field_of(_sketch([parts], len(values), Workers(threads=1)))


def rows_fingerprint(rows: Int64[np.ndarray, " n"]) -> str:
    """Hex digest of which rows there are, in whatever order: of the split, the mask and the chosen episodes."""
    return hashlib.sha256(np.sort(np.asarray(rows, dtype="<i8")).tobytes()).hexdigest()


def provenance(sources: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """`NormStats.data` and `NormStats.rows` of statistics over these rows of these datasets, as fingerprints."""
    data = sorted({dataset for dataset, _ in sources})
    return (
        data[0] if len(data) == 1 else fingerprint(data),
        sources[0][1] if len(sources) == 1 else fingerprint(sorted(sources)),
    )


def read_state(dataset: Dataset, robot: Robot) -> np.ndarray:
    """The robot's state of every frame, float32 [N, S]."""
    parts = [dataset.column(robot.dataset_key(s.key)) for s in robot.state]
    return np.concatenate(parts, axis=-1) if parts else np.zeros((dataset.num_frames, 0), np.float32)


# The numbers that count -----------------------------------------------------------------------------------------------


def _parts(dataset: Dataset, robot: Robot, rows: np.ndarray, steps: range) -> list[Part]:
    """The state and the actions, in the model's order; plain differences each apart, so that blocks stay small."""
    rows, commands = np.sort(rows), dataset.column(robot.dataset_key(robot.action_key))
    state = read_state(dataset, robot)
    seen = ActionSpace(robot).state_to_model(state).astype(np.float32, copy=False)
    parts: list[Part] = [partial(_column, column, rows, None) for column in _transposed(seen)]
    ends = dataset.ends[dataset.episode_of(rows)]
    first, last = (
        np.bincount(np.minimum(rows + edge, ends), minlength=dataset.num_frames + 1)
        for edge in (steps.start, steps.stop)
    )
    chunks = np.cumsum(first - last)  # that a row's command is in
    used = np.flatnonzero(chunks)
    for group, start in zip(robot.actions, accumulate((g.size for g in robot.actions), initial=0), strict=False):
        base = robot.state_start(group, start)
        command, own_state = commands[:, start : start + group.size], state[:, base : base + group.size]
        if not group.relative:
            seen = encode_group(group, command, None).astype(np.float32, copy=False)
            parts += [partial(_column, column, used, chunks[used]) for column in _transposed(seen)]
            continue
        pieces = [(slice(None), group)]
        if isinstance(group, Joints) or (isinstance(group, EndEffector) and group.rotation == "none"):
            signs = group.signs if isinstance(group, Joints) else ()
            pieces = [(slice(d, d + 1), Joints(1, relative=True, signs=signs[d : d + 1])) for d in range(group.size)]
        for dims, piece in pieces:
            columns = np.ascontiguousarray(command[:, dims]), np.ascontiguousarray(own_state[:, dims])
            parts.append(partial(_chunks, piece, steps, *columns, rows, ends - rows - steps.start))
    return parts


def _column(values_N: np.ndarray, rows: np.ndarray, weights: np.ndarray | None, every: int) -> Blocks:
    """One dimension at rows that ascend, each counted once or `weights` times."""
    rows, weights = rows[::every], None if weights is None else weights[::every]
    for block, span in _blocks(rows, 1):
        yield values_N[span][None], None if weights is None else weights[block]


def _chunks(
    group: ActionGroup,
    steps: range,
    commands_NA: np.ndarray,
    state_NS: np.ndarray,
    rows: np.ndarray,
    left: np.ndarray,
    every: int,
) -> Blocks:
    """A relative action group at some steps of the chunks that begin at the rows, which ascend.

    Args:
        group: of the dimensions that the commands and the state have here.
        left: how many of the steps, and of those beyond them, each row's episode still has.
    """
    rows, left, num = rows[::every], left[::every], len(steps)
    padded = np.concatenate([commands_NA, np.repeat(commands_NA[-1:], steps.stop, axis=0)])
    windows = np.moveaxis(sliding_window_view(padded[steps.start :], num, axis=0), -1, 1)
    for block, span in _blocks(rows, num):
        count, seen = left[block], encode_group(group, windows[span], state_NS[span][:, None])
        seen = seen.astype(np.float32, copy=False)
        whole, cut = seen[count >= num], (count > 0) & (count < num)
        numbers = [whole.reshape(-1, seen.shape[-1]), seen[cut][np.arange(num) < count[cut, None]]]
        yield np.ascontiguousarray(np.concatenate(numbers).T), None


def _blocks(rows: np.ndarray, numbers_per_row: int) -> Iterator[tuple[slice, np.ndarray | slice]]:
    """Where rows that ascend are cut, at multiples of a power of two; the rows between, as a slice if none is left out,
    which is read without a copy."""
    bits = (BLOCK // numbers_per_row).bit_length() - 1
    cuts = (np.flatnonzero(np.diff(rows >> bits)) + 1).tolist()
    for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        some = rows[start:stop]
        together = len(some) and some[-1] - some[0] + 1 == len(some)
        yield slice(start, stop), slice(some[0], some[-1] + 1) if together else some


def _transposed(vectors_ND: np.ndarray) -> np.ndarray:
    """[D, N] in memory; rows that fit into a processor's cache at a time take a quarter of the time of all at once."""
    columns = np.empty(vectors_ND.shape[::-1], vectors_ND.dtype)
    for start in range(0, len(vectors_ND), 4096):
        columns[:, start : start + 4096] = vectors_ND[start : start + 4096].T
    return columns


# What they add up to --------------------------------------------------------------------------------------------------


def _sketch(sets: Sequence[Sequence[Part]], num: int, workers: Workers, *, bins: bool = False) -> list["Sketch"]:
    """One per dimension, of the numbers (about `num`) of all sets; a set is one part after the other."""
    tasks = [(parts, max(1, num // SAMPLE), bins) for parts in zip(*sets, strict=True)]
    with ThreadPoolExecutor(workers.threads or os.cpu_count()) as threads:
        # Threads are enough: numpy lets go of the interpreter in every operation that takes long here.
        found = on_cluster(_sketch_part, tasks) if workers.ray else threads.map(_sketch_part, *zip(*tasks, strict=True))
        found = tqdm(found, total=len(tasks), desc="norm stats", unit="part", leave=False, delay=1, disable=None)
        return [sketch for some in found for sketch in some]


def _sketch_part(parts: Sequence[Part], every: int, bins: bool) -> list["Sketch"]:
    """One per dimension of the same part of every set, with exact quantiles."""
    while True:
        blocks = chain.from_iterable(part(every) for part in parts)
        # Some rows may count alike: only those near an episode's start are in fewer chunks than the others.
        sample = [np.repeat(v, 1 if w is None or every > 1 else w, axis=1) for v, w in blocks]
        tails = [[Tail(q, seen) for q in QUANTILES] for seen in np.concatenate(sample, axis=1)]
        sketches = [Sketch.of(np.zeros(0))] * len(tails)
        for values_Dm, weights in chain.from_iterable(part(1) for part in parts):
            for d, values in enumerate(values_Dm):
                sketches[d] = sketches[d].merge(Sketch.of(values, weights, bins=bins))
                for tail in tails[d]:
                    tail.add(values, weights)
        exact = [[tail.quantile(sketch.num) for tail in both] for both, sketch in zip(tails, sketches, strict=True)]
        if not any(value is None for both in exact for value in both):
            return [replace(sketch, exact=both) for sketch, both in zip(sketches, exact, strict=True)]
        every = max(1, every // 16)  # the sampled rows are so unlike the others that too few numbers were kept


class Tail:
    """The tail of many numbers that a quantile lies in: those beyond a limit, and how many are equal to the limit.

    Args:
        sample: of the numbers. The limit lies twice as deep in it as the quantile; without one, all numbers are kept.
    """

    def __init__(self, q: float, sample: np.ndarray):
        self.q, self.low = q, q < 0.5
        self.limit, self.at_limit, self.kept = math.inf if self.low else -math.inf, 0, list[np.ndarray]()
        if len(sample):
            deep, method = (2 * q, "higher") if self.low else (2 * q - 1, "lower")
            self.limit = np.quantile(sample, deep, method=method)

    def add(self, values: np.ndarray, weights: np.ndarray | None) -> None:
        """Numbers [m], and how often each counts [m] (None: once)."""
        beyond, equal = values < self.limit if self.low else values > self.limit, values == self.limit
        self.kept.append(values[beyond] if weights is None else np.repeat(values[beyond], weights[beyond]))
        self.at_limit += int(np.count_nonzero(equal) if weights is None else weights[equal].sum())

    def quantile(self, num: int) -> float | None:
        """`numpy.quantile` of all `num` numbers, NaN of none; None where too few were kept to tell."""
        if not num:
            return math.nan
        ranks, fraction = _neighbours(self.q, num)
        tail = np.concatenate([*self.kept, np.atleast_1d(self.limit)])
        depth = ranks if self.low else num - 1 - ranks  # from the outer end of the tail; its inner end is the limit
        if depth.max() >= len(tail) - 1 + self.at_limit:
            return None
        at = np.minimum(depth, len(tail) - 1)
        at = at if self.low else len(tail) - 1 - at
        return float(np.quantile(np.partition(tail, at)[at].astype(np.float64), fraction))


def _neighbours(q: float, num: int) -> tuple[np.ndarray, float]:
    """The two ranks that a quantile lies between, and how far it is on the way."""
    position = q * (num - 1)
    return np.minimum([math.floor(position), math.floor(position) + 1], num - 1), position - math.floor(position)


@dataclass(frozen=True, eq=False)
class Sketch:
    """Of the values of one dimension."""

    num: int
    total: Fraction
    squares: Fraction
    low: float
    high: float
    counts: np.ndarray
    """int64, per bin from that of the lowest to that of the highest value. Empty where they are not needed."""
    exact: Sequence[float] | None = None
    """The `QUANTILES`, where they are known better than from the bins."""

    @staticmethod
    def of(values: np.ndarray, weights: np.ndarray | None = None, *, bins: bool = True) -> "Sketch":
        """Of finite numbers [n], each counted once or, with integer `weights` [n], that often; `bins`: with counts."""
        num, total, squares = 0, Fraction(0), Fraction(0)
        if not values.size:
            return Sketch(num, total, squares, math.inf, -math.inf, np.zeros(0, np.int64))
        low, high = float(values.min()), float(values.max())
        exponent, first, size = _bins(low, high)
        counts = np.zeros(size if bins else 0, np.int64)
        for start in range(0, len(values), PIECE):
            piece = values[start : start + PIECE]
            times = np.int64(1) if weights is None else weights[start : start + PIECE]
            if bins:
                np.add.at(counts, (np.floor(piece * 2.0**-exponent) - first).astype(np.intp), times)
            # Sums of distances from one of the values are small, so that nothing is lost where all are far from 0.
            centre, distances = Fraction(float(piece[0])), np.subtract(piece, float(piece[0]), dtype=np.float64)
            weighted, count = (distances, len(piece)) if weights is None else (distances * times, int(times.sum()))
            # Not `@`, whose last bit depends on the threads of the library behind it.
            offset, square = Fraction(float(weighted.sum())), Fraction(float(np.einsum("i,i->", weighted, distances)))
            num, total = num + count, total + offset + count * centre
            squares += square + 2 * centre * offset + count * centre**2
        return Sketch(num, total, squares, low, high, counts)

    def merge(self, other: "Sketch") -> "Sketch":
        """Of the values of both; what was known better than from the bins is lost."""
        if not self.num or not other.num:
            return self if self.num else other
        low, high = min(self.low, other.low), max(self.high, other.high)
        exponent, first, size = _bins(low, high)
        counts = np.zeros(size if len(self.counts) and len(other.counts) else 0, np.int64)
        for one in (self, other) if len(counts) else ():
            its_exponent, its_first, its_size = _bins(one.low, one.high)
            # No bin's number has more than 24 bits, so that halving once more than that would change nothing.
            bins = np.arange(its_first, its_first + its_size) >> min(exponent - its_exponent, 32)
            np.add.at(counts, bins - first, one.counts)
        total, squares = self.total + other.total, self.squares + other.squares
        return Sketch(self.num + other.num, total, squares, low, high, counts)

    @property
    def edges(self) -> np.ndarray:
        """Where the bins begin, and where the last ends, [bins + 1]."""
        exponent, first, size = _bins(self.low, self.high)
        return np.arange(first, first + size + 1) * 2.0**exponent

    def quantile(self, q: float) -> float:
        """Linear between neighbours, as `numpy.quantile`, of which each is the middle of its bin."""
        ranks, fraction = _neighbours(q, self.num)
        bins = np.searchsorted(np.cumsum(self.counts), ranks, side="right")
        left, right = self.edges[bins], self.edges[bins + 1]
        only_one = right - left <= np.spacing(np.abs(left).astype(np.float32))  # float32 value in the bin: its edge
        return float(np.quantile(np.where(only_one, left, (left + right) / 2).clip(self.low, self.high), fraction))


def _bins(low: float, high: float) -> tuple[int, int, int]:
    """Exponent of their width, number of the first and how many; bin i covers [i · 2ᵉ, (i + 1) · 2ᵉ)."""
    resolution = math.frexp(max(-low, high))[1] - FLOAT32_BITS if low or high else SMALLEST
    exponent = max(math.frexp(high - low)[1] - BITS if high > low else SMALLEST, resolution, SMALLEST)
    first, last = (math.floor(value * 2.0**-exponent) for value in (low, high))
    return exponent, first, last - first + 1


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

    sketches: tuple[Sketch, ...]
    """Of the state's dimensions, then of the actions'."""
    state_size: int
    num_frames: int
    contract: str
    sources: tuple[tuple[str, str], ...]
    """Fingerprints of dataset and rows, sorted."""

    def merge(self, other: "NormStatsSketch") -> "NormStatsSketch":
        """Of the rows of both. Raises NormStatsError where they are of different robots or action horizons."""
        return NormStatsSketch(
            contract=one_contract([self.contract, other.contract]),
            sketches=tuple(map(Sketch.merge, self.sketches, other.sketches)),
            state_size=self.state_size,
            num_frames=self.num_frames + other.num_frames,
            sources=tuple(sorted(self.sources + other.sources)),
        )

    def stats(self) -> NormStats:
        """All exact, but q01 and q99 of what was merged or read from a file: these within 2⁻¹⁵ of the range."""
        state, actions = field_of(self.sketches[: self.state_size]), field_of(self.sketches[self.state_size :])
        data, rows = provenance(self.sources)
        frames, contract = self.num_frames, self.contract
        return NormStats(state=state, actions=actions, num_frames=frames, contract=contract, data=data, rows=rows)

    def save(self, path: Path) -> None:
        """One .npz file: a JSON header, and all counts in a row."""
        about = [
            (s.num, str(s.total), str(s.squares), s.low, s.high, *_bins(s.low, s.high)[:2], len(s.counts))
            for s in self.sketches
        ]
        header = [self.state_size, self.num_frames, self.contract, self.sources, about]
        buffer, counts = io.BytesIO(), np.concatenate([s.counts for s in self.sketches])
        np.savez_compressed(buffer, header=np.array(json.dumps(header)), counts=counts)
        atomic_write(path, buffer.getvalue())

    @staticmethod
    def load(path: Path) -> "NormStatsSketch":
        """What `save` wrote. Raises NormStatsError for any other file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                state_size, num_frames, contract, sources, about = json.loads(str(file["header"]))
                counts = np.split(file["counts"], np.cumsum([s[-1] for s in about])[:-1])
        except (OSError, ValueError, KeyError) as error:
            raise NormStatsError(
                expected="a sketch of norm stats",
                found=str(error),
                where=str(path),
                next="write it again: manipi stats TARGET --sketch FILE",
            ) from error
        return NormStatsSketch(
            sketches=tuple(
                Sketch(num, Fraction(total), Fraction(squares), low, high, part)
                for (num, total, squares, low, high, *_), part in zip(about, counts, strict=True)
            ),
            state_size=state_size,
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


# What to look at ----------------------------------------------------------------------------------------------------


def with_min_range(stats: NormStats, min_range: float | Mapping[str, float]) -> NormStats:
    """Dimensions with q01 and q99 closer than a floor are widened around their middle, and their std with them.

    Args:
        min_range: in the units of the dimension as the model sees it; one for all, or by name: {"actions[6]": 0.05}.

    Raises:
        ConfigError: no such dimension, or a floor below 0.
    """
    floors = {"": min_range} if isinstance(min_range, int | float) else dict(min_range)
    fields = {"state": stats.state, "actions": stats.actions}
    known = {f"{name}[{d}]" for name, field in fields.items() for d in range(field.mean.size)}
    for name, floor in floors.items():
        if name and name not in known:
            raise unknown_name("dimension", name, known, next="manipi stats TARGET  # lists them")
        if not 0 <= floor < math.inf:
            raise ConfigError(expected="a range of 0 or more", found=f"{floor}", where="min_range", next="correct it")
    widened = {}
    for name, field in fields.items():
        floor = np.array([floors.get(f"{name}[{d}]", floors.get("", 0.0)) for d in range(field.mean.size)])
        narrow, middle = field.q99 - field.q01 < floor, (field.q01 + field.q99) / 2
        q01, q99 = (np.where(narrow, middle + side * floor / 2, q) for side, q in ((-1, field.q01), (1, field.q99)))
        std = np.where(narrow, np.maximum(field.std, floor / NORMAL_RANGE), field.std)
        widened[name] = replace(field, q01=q01, q99=q99, std=std)
    return replace(stats, **widened)


def widened_dimensions(before: NormStats, after: NormStats) -> list[str]:
    """Plain sentences about what `with_min_range` changed."""
    return [
        f"{name}[{d}] widened to a range of {new.q99[d] - new.q01[d]:.6g}, from {old.q99[d] - old.q01[d]:.6g}"
        for name, old, new in (("state", before.state, after.state), ("actions", before.actions, after.actions))
        for d in np.flatnonzero((old.q01 != new.q01) | (old.q99 != new.q99))
    ]


def suspicious_dimensions(stats: NormStats) -> list[str]:
    """Plain sentences about dimensions that normalisation would blow up, that never move, or with wild outliers."""
    notes = []
    for name, field in (("state", stats.state), ("actions", stats.actions)):
        width = field.q99 - field.q01
        for d in np.flatnonzero(width < NEAR_CONSTANT):
            kind = "never moves" if field.min[d] == field.max[d] else "hardly moves"
            notes.append(f"{name}[{d}] {kind}: q01 {field.q01[d]:.6g}, q99 {field.q99[d]:.6g}")
        beyond = np.maximum(field.q01 - field.min, field.max - field.q99)
        for d in np.flatnonzero((width >= NEAR_CONSTANT) & (beyond > FAR * width)):
            between = f"q01 {field.q01[d]:.6g}, q99 {field.q99[d]:.6g}"
            ranges = f"up to {beyond[d] / width[d]:.0f} times their distance beyond them"
            notes.append(f"{name}[{d}] has outliers, {field.min[d]:.6g} to {field.max[d]:.6g}: {between}, {ranges}")
    return notes


def beyond_limits(dataset: Dataset, robot: Robot, rows: Int64[np.ndarray, " n"]) -> list[str]:
    """Plain sentences about commands outside the limits that the robot states, in its own units."""
    commands, names, notes = dataset.column(robot.dataset_key(robot.action_key)), command_names(robot, dataset), []
    for d, (low, high) in enumerate(zip(*robot.limits, strict=True)):
        values = commands[rows, d]
        if outside := int(np.count_nonzero((values < low) | (values > high))):
            found, limits = f"{values.min():.6g} to {values.max():.6g}", f"limits {low:.6g} to {high:.6g}"
            where = f"is outside the robot's limits in {outside:,} frames"
            notes.append(f"command[{d}] {names[d]} {where}: {found}, {limits}")
    return notes
