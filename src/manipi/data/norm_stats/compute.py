"""Norm stats from the state and action columns alone: no picture is read.

State and actions pass through the same `ActionSpace` as in training, the actions over the whole chunk, so the
statistics are of what the model sees. Steps beyond the end of an episode do not count.

Rows are worked through in blocks, in threads or on a Ray cluster. A block is a span of row numbers, whoever works on
it, and sketches merge exactly: the statistics are the same to the last bit however many workers there are.

Shape letters: N rows of the dataset, n rows asked for, H action horizon, A and S dimensions
of command and state.
"""

import hashlib
import importlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from jaxtyping import Int64
from tqdm import tqdm

from manipi.data.dataset import Dataset
from manipi.data.dimensions import command_names
from manipi.data.norm_stats.chunk_values import Columns, Offsets, Part, parts_of, transposed
from manipi.data.norm_stats.sketch import NormStatsSketch, Sketch, Tally, field_of
from manipi.errors import ConfigError, unknown_name
from manipi.robots.robot import Robot
from manipi.transforms.pipeline import contract
from manipi.types import FieldStats, NormStats

BLOCK, BLOCKS = 1 << 21, 2
"""Numbers per dimension that a worker has in memory at a time, and blocks that it takes at a time."""
NEAR_CONSTANT = 1e-4
"""A dimension whose q01 and q99 are closer than this makes tiny differences huge once normalised."""
FAR = 10
"""An outlier lies this many times the distance between q01 and q99 beyond them."""
NORMAL_RANGE = 4.6527
"""Distance between q01 and q99 of a normal distribution, in standard deviations."""

Interval: TypeAlias = tuple[float, float]
"""From its beginning to before its end."""
WHOLE: Interval = (-math.inf, math.inf)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who works on the blocks: so many threads here, or the Ray cluster that this process belongs to."""

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
    sketch: NormStatsSketch | None = None,
    min_range: float | Mapping[str, float] = 0.0,
) -> NormStats:
    """Exact mean, std, min, max and quantiles over `rows` (global frame numbers, in any order).

    Args:
        sketch: of the same rows, where there is one already; saves the first of two passes.
        min_range: as `with_min_range` takes it.

    Raises:
        ConfigError: no rows; no such dimension; Ray is wanted and not installed.
    """
    sketch = sketch or sketch_norm_stats(dataset, robot, action_horizon, rows, workers=workers)
    parts = parts_of(dataset, robot, read_state(dataset, robot), range(action_horizon))
    zoomed = _zoom(parts, rows, [*sketch.state, *sketch.actions], workers)
    stats = sketch.stats(zoomed[: robot.state_size], zoomed[robot.state_size :])
    return with_min_range(stats, min_range)


def sketch_norm_stats(
    dataset: Dataset, robot: Robot, action_horizon: int, rows: Int64[np.ndarray, " n"], *, workers: Workers = Workers()
) -> NormStatsSketch:
    """What norm stats over `rows` are made of, to be merged with that of other rows, datasets and machines."""
    if not len(rows):
        raise ConfigError(
            expected="at least one frame", found="none", where="rows of norm stats", next="choose fewer filters"
        )
    sketches = _sketch(parts_of(dataset, robot, read_state(dataset, robot), range(action_horizon)), rows, workers)
    return NormStatsSketch(
        state=tuple(sketches[: robot.state_size]),
        actions=tuple(sketches[robot.state_size :]),
        num_frames=len(rows),
        contract=contract(robot, action_horizon),
        sources=((dataset.fingerprint, rows_fingerprint(rows)),),
    )


def per_step_stats(
    dataset: Dataset, robot: Robot, action_horizon: int, rows: Int64[np.ndarray, " n"], *, workers: Workers = Workers()
) -> FieldStats:
    """Exact statistics of the actions at each step of the chunk, [H, A]; NaN where no episode is that long."""
    fields = []
    for step in tqdm(range(action_horizon), desc="per step", unit="step", disable=None):
        parts = parts_of(dataset, robot, read_state(dataset, robot), range(step, step + 1))[1:]
        sketches = _sketch(parts, rows, workers)
        fields.append(field_of(sketches, _zoom(parts, rows, sketches, workers)))
    names = ("mean", "std", "q01", "q99", "min", "max")
    return FieldStats(*(np.stack([getattr(field, name) for field in fields]) for name in names))


def field_stats(values: np.ndarray) -> FieldStats:
    """[N, dim] -> exact statistics per dimension, float64."""
    parts, rows = [Columns(transposed(values))], np.arange(len(values))
    sketches = _sketch(parts, rows, Workers(threads=1))
    return field_of(sketches, _zoom(parts, rows, sketches, Workers(threads=1)))


def rows_fingerprint(rows: Int64[np.ndarray, " n"]) -> str:
    """Hex digest of which rows there are, in whatever order: of the split, the mask and the chosen episodes."""
    return hashlib.sha256(np.sort(np.asarray(rows, dtype="<i8")).tobytes()).hexdigest()


def read_state(dataset: Dataset, robot: Robot) -> np.ndarray:
    """The robot's state of every frame, float32 [N, S]."""
    parts = [dataset.column(robot.dataset_key(s.key)) for s in robot.state]
    return np.concatenate(parts, axis=-1) if parts else np.zeros((dataset.num_frames, 0), np.float32)


# Blocks and workers -------------------------------------------------------------------------------------------------


def _sketch(parts: Sequence[Part], rows: np.ndarray, workers: Workers) -> list[Sketch]:
    """One per dimension of all parts."""
    everything = [[WHOLE]] * sum(part.size for part in parts)
    return [only for (only,) in _sketch_inside(parts, rows, everything, workers)]


def _zoom(
    parts: Sequence[Part], rows: np.ndarray, sketches: Sequence[Sketch], workers: Workers
) -> list[dict[int, Sketch]]:
    """For each dimension the sketches of the values in the bins that quantiles lie in."""
    bins = [sketch.bins_to_zoom() for sketch in sketches]
    intervals = [[sketch.bounds(bin) for bin in some] for sketch, some in zip(sketches, bins, strict=True)]
    inside = _sketch_inside(parts, rows, intervals, workers)
    return [dict(zip(some, found, strict=True)) for some, found in zip(bins, inside, strict=True)]


def _sketch_inside(
    parts: Sequence[Part], rows: np.ndarray, intervals: Sequence[Sequence[Interval]], workers: Workers
) -> list[list[Sketch]]:
    """Sketches of the values inside intervals [low, high), for each dimension of all parts as many as are given."""
    rows, tasks, places, end = np.sort(rows), list[_Task](), list[slice](), 0
    for part in parts:
        dims, end = slice(end, end + part.size), end + part.size
        blocks = _blocks(rows, part)
        tasks += [(part, blocks[i : i + BLOCKS], intervals[dims]) for i in range(0, len(blocks), BLOCKS)]
        places += [dims] * (len(tasks) - len(places))
    merged = [[Sketch.of(np.zeros(0))] * len(some) for some in intervals]
    for dims, found in zip(places, _run(tasks, workers), strict=True):
        pairs = zip(merged[dims], found, strict=True)
        merged[dims] = [[a.merge(b) for a, b in zip(old, new, strict=True)] for old, new in pairs]
    return merged


def _blocks(rows: np.ndarray, part: Part) -> list[np.ndarray]:
    """Rows that ascend, cut at multiples of a power of two."""
    bits = (BLOCK // part.numbers_per_row).bit_length() - 1
    return np.split(rows, np.flatnonzero(np.diff(rows >> bits)) + 1)


def _sketch_blocks(
    part: Part, blocks: Sequence[np.ndarray], intervals: Sequence[Sequence[Interval]]
) -> list[list[Sketch]]:
    """As `_sketch_inside`, for one part."""
    if isinstance(part, Offsets):
        return [_sketch_offsets(part, blocks, *intervals)]
    gathered = [[_Gathered(interval) for interval in some] for some in intervals]
    for rows in blocks:
        values, weights = part.values(rows)
        for dimension, some in zip(values, gathered, strict=True):
            for inside in some:
                inside.add(dimension, weights)
    return [[inside.finish() for inside in some] for some in gathered]


def _sketch_offsets(part: Offsets, blocks: Sequence[np.ndarray], intervals: Sequence[Interval]) -> list[Sketch]:
    """With bounds of every row at hand, the numbers of most rows need not be looked at for a narrow interval."""
    if intervals == [WHOLE]:
        found = [values for rows in blocks if (values := part.values(rows)[0][0]).size]
        counted = Tally(*_range(found))
        for values in found:
            counted.add(values)
        return [counted.sketch()]
    gathered = [_Gathered(interval) for interval in intervals]
    for rows in blocks:
        low, high = part.bounds(rows)
        reach = np.logical_or.reduce([(high >= begin) & (low < end) for begin, end in intervals])
        ((values,), _) = part.values(rows[reach])
        for inside in gathered:
            inside.add(values, None)
    return [inside.finish() for inside in gathered]


def _range(pieces: Sequence[np.ndarray]) -> tuple[float, float]:
    """The smallest and the largest number of all."""
    lows, highs = [float(piece.min()) for piece in pieces], [float(piece.max()) for piece in pieces]
    return min(lows, default=math.inf), max(highs, default=-math.inf)


class _Gathered:
    """Sketches values of one interval many at a time: for fewer, a sketch costs as much."""

    def __init__(self, interval: Interval):
        self._interval, self._sketch = interval, Sketch.of(np.zeros(0))
        self._values, self._weights = list[np.ndarray](), list[np.ndarray]()

    def add(self, values: np.ndarray, weights: np.ndarray | None) -> None:
        if self._interval != WHOLE:
            inside = (values >= self._interval[0]) & (values < self._interval[1])
            values, weights = values[inside], None if weights is None else weights[inside]
        self._values.append(values)
        if weights is not None:
            self._weights.append(weights)
        if sum(map(len, self._values)) >= 2 * BLOCK:
            self.finish()

    def finish(self) -> Sketch:
        """Of all that was added."""
        if self._values:
            more = Sketch.of(_joined(self._values), _joined(self._weights) if self._weights else None)
            self._sketch = self._sketch.merge(more)
            self._values, self._weights = [], []
        return self._sketch


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


_Task: TypeAlias = tuple[Part, list[np.ndarray], Sequence[Sequence[Interval]]]
_Found: TypeAlias = list[list[Sketch]]


def _run(tasks: Sequence[_Task], workers: Workers) -> Iterator[_Found]:
    """What `_sketch_blocks` returns for the tasks, in their order, with a progress bar where it takes long."""
    progress = tqdm(total=len(tasks), desc="norm stats", unit="block", leave=False, delay=1, disable=None)
    with progress, ThreadPoolExecutor(workers.threads or os.cpu_count()) as threads:
        # Threads are enough: numpy lets go of the interpreter in every operation that takes long here.
        found: Iterable[_Found] = _run_on_ray(tasks) if workers.ray else threads.map(_sketch_blocks, *zip(*tasks))
        for one in found:
            progress.update()
            yield one


def _run_on_ray(tasks: Sequence[_Task]) -> Iterator[_Found]:
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            expected="the package ray", found="it is not installed", where="--ray", next="pip install 'manipi[ray]'"
        ) from error
    if not ray.is_initialized():
        ray.init()
    # The columns travel once to each machine.
    parts = {id(part): ray.put(part) for part, *_ in tasks}
    remote = ray.remote(_sketch_blocks)
    yield from map(ray.get, [remote.remote(parts[id(part)], *rest) for part, *rest in tasks])


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
