"""Norm stats from the state and action columns alone: no picture is read.

State and actions pass through the same `ActionSpace` as in training, the actions over the whole chunk, so the
statistics are of what the model sees. Steps beyond the end of an episode do not count.

    Column    one dimension at the rows. An absolute command is in the chunks of the rows before it: it counts once for
              each of them
    Chunks    a relative action group: every chunk, seen from the state of its row, many rows at a time

A dimension (of relative poses, a group) is worked through by one thread, or one worker of a Ray cluster, in blocks of
rows: the statistics are the same to the last bit however many workers there are. In memory, beside the columns, each of
them holds a few blocks, and the tails that q01 and q99 are in: at most 4 % of its dimension's numbers.

Shape letters: N rows of the dataset, n rows asked for, H steps, D dimensions, A and S dimensions of command and state,
m numbers.
"""

import hashlib
import importlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from jaxtyping import Int64
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from manipi.data.dataset import Dataset, command_names
from manipi.data.norm_stats.sketch import QUANTILES, NormStatsSketch, Quantile, Sketch, field_of, one_contract
from manipi.errors import ConfigError, unknown_name
from manipi.robots.robot import EndEffector, Joints, Robot
from manipi.transforms.actions import ActionSpace
from manipi.transforms.pipeline import contract
from manipi.types import FieldStats, NormStats

BLOCK = 1 << 19
"""Numbers per dimension that are worked on at a time."""
SAMPLE = 1 << 17
"""Numbers per dimension that say beforehand where q01 and q99 are about."""
NEAR_CONSTANT = 1e-4
"""A dimension whose q01 and q99 are closer than this makes tiny differences huge once normalised."""
FAR = 10
"""An outlier lies this many times the distance between q01 and q99 beyond them."""
NORMAL_RANGE = 4.6527
"""Distance between q01 and q99 of a normal distribution, in standard deviations."""

Rows: TypeAlias = tuple[Dataset, Robot, Int64[np.ndarray, " n"]]
"""Rows of a dataset (global frame numbers, in any order), and the robot that it is of."""


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
) -> NormStatsSketch:
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
    sketches = _sketch([_parts(*one, range(action_horizon)) for one in sets], workers, bins=bins)
    state_size = sets[0][1].state_size
    return NormStatsSketch(
        state=tuple(sketches[:state_size]),
        actions=tuple(sketches[state_size:]),
        num_frames=sum(len(rows) for _, _, rows in sets),
        contract=one_contract([contract(robot, action_horizon) for _, robot, _ in sets]),
        sources=tuple(sorted((dataset.fingerprint, rows_fingerprint(rows)) for dataset, _, rows in sets)),
    )


def per_step_stats(
    dataset: Dataset, robot: Robot, action_horizon: int, rows: Int64[np.ndarray, " n"], *, workers: Workers = Workers()
) -> FieldStats:
    """Exact statistics of the actions at each step of the chunk, [H, A]; NaN where no episode is that long."""
    fields = []
    for step in tqdm(range(action_horizon), desc="per step", unit="step", disable=None):
        parts = _parts(dataset, robot, rows, range(step, step + 1))
        fields.append(field_of(_sketch([parts[robot.state_size :]], workers)))
    names = ("mean", "std", "q01", "q99", "min", "max")
    return FieldStats(*(np.stack([getattr(field, name) for field in fields]) for name in names))


def field_stats(values: np.ndarray) -> FieldStats:
    """[N, dim] -> exact statistics per dimension, float64."""
    columns = [Column(column, np.arange(len(values)), None) for column in _transposed(values)]
    return field_of(_sketch([columns], Workers(threads=1)))


def rows_fingerprint(rows: Int64[np.ndarray, " n"]) -> str:
    """Hex digest of which rows there are, in whatever order: of the split, the mask and the chosen episodes."""
    return hashlib.sha256(np.sort(np.asarray(rows, dtype="<i8")).tobytes()).hexdigest()


def read_state(dataset: Dataset, robot: Robot) -> np.ndarray:
    """The robot's state of every frame, float32 [N, S]."""
    parts = [dataset.column(robot.dataset_key(s.key)) for s in robot.state]
    return np.concatenate(parts, axis=-1) if parts else np.zeros((dataset.num_frames, 0), np.float32)


# The numbers that count -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Column:
    """One dimension at some rows, as the model sees it."""

    values_N: np.ndarray
    rows: Int64[np.ndarray, " n"]
    weights: Int64[np.ndarray, " n"] | None
    """How often each row counts; None: once."""
    size = 1

    def __len__(self) -> int:
        return len(self.rows) if self.weights is None else int(self.weights.sum())

    def every(self, step: int) -> "Column":
        """At every `step`-th row alone."""
        weights = None if self.weights is None else self.weights[::step]
        return replace(self, rows=self.rows[::step], weights=weights)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Numbers [1, m], and how often each counts [m]."""
        for block in _blocks(self.rows, 1):
            yield self.values_N[_span(self.rows[block])][None], None if self.weights is None else self.weights[block]


@dataclass(frozen=True, eq=False)
class Chunks:
    """A relative action group at some steps of the chunks that begin at the rows."""

    robot: Robot
    """With this group alone."""
    steps: range
    commands_NA: np.ndarray
    state_NS: np.ndarray
    """The dimensions that match the commands."""
    rows: Int64[np.ndarray, " n"]
    left: Int64[np.ndarray, " n"]
    """How many of the steps, and of those beyond them, each row's episode still has."""

    @property
    def size(self) -> int:
        return self.robot.model_action_size

    def __len__(self) -> int:
        return int(np.clip(self.left, 0, len(self.steps)).sum())

    def every(self, step: int) -> "Chunks":
        """At every `step`-th row alone."""
        return replace(self, rows=self.rows[::step], left=self.left[::step])

    def blocks(self) -> Iterator[tuple[np.ndarray, None]]:
        """Numbers [D, m], each of which counts once."""
        num, start, space = len(self.steps), self.steps.start, ActionSpace(self.robot)
        padded = np.concatenate([self.commands_NA, np.repeat(self.commands_NA[-1:], self.steps.stop, axis=0)])
        windows = np.moveaxis(sliding_window_view(padded[start:], num, axis=0), -1, 1)
        for block in _blocks(self.rows, num):
            span, left = _span(self.rows[block]), self.left[block]
            seen = space.to_model(windows[span], self.state_NS[span]).astype(np.float32, copy=False)
            whole, cut = seen[left >= num], (left > 0) & (left < num)
            numbers = [whole.reshape(-1, self.size), seen[cut][np.arange(num) < left[cut, None]]]
            yield np.ascontiguousarray(np.concatenate(numbers).T), None


def _blocks(rows: np.ndarray, numbers_per_row: int) -> list[slice]:
    """Rows that ascend, cut at multiples of a power of two."""
    bits = (BLOCK // numbers_per_row).bit_length() - 1
    cuts = (np.flatnonzero(np.diff(rows >> bits)) + 1).tolist()
    return [slice(*pair) for pair in zip([0, *cuts], [*cuts, len(rows)], strict=True)]


def _span(rows: np.ndarray) -> np.ndarray | slice:
    """Rows that ascend, as a slice where they follow on one another, which is read without a copy."""
    together = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
    return slice(rows[0], rows[-1] + 1) if together else rows


def _transposed(vectors_ND: np.ndarray) -> np.ndarray:
    """[D, N] in memory; rows that fit into a processor's cache at a time take a quarter of the time of all at once."""
    columns = np.empty(vectors_ND.shape[::-1], vectors_ND.dtype)
    for start in range(0, len(vectors_ND), 4096):
        columns[:, start : start + 4096] = vectors_ND[start : start + 4096].T
    return columns


def _parts(dataset: Dataset, robot: Robot, rows: np.ndarray, steps: range) -> list[Column | Chunks]:
    """The state and the actions, in the model's order; plain differences each apart, so that blocks stay small."""
    rows, commands = np.sort(rows), dataset.column(robot.dataset_key(robot.action_key))
    state = read_state(dataset, robot)
    seen = ActionSpace(robot).state_to_model(state).astype(np.float32, copy=False)
    parts: list[Column | Chunks] = [Column(column, rows, None) for column in _transposed(seen)]
    ends = dataset.ends[dataset.episode_of(rows)]
    edges = [
        np.bincount(np.minimum(rows + edge, ends), minlength=dataset.num_frames + 1)
        for edge in (steps.start, steps.stop)
    ]
    chunks = np.cumsum(edges[0] - edges[1])  # that a row's command is in
    used = np.flatnonzero(chunks)
    for group, start in zip(robot.actions, accumulate((g.size for g in robot.actions), initial=0), strict=False):
        base = robot.state_start(group, start)
        command, own_state = commands[:, start : start + group.size], state[:, base : base + group.size]
        pieces = [(slice(None), replace(group, state_start=0))]
        if group.relative and (
            isinstance(group, Joints) or (isinstance(group, EndEffector) and group.rotation == "none")
        ):
            signs = group.signs if isinstance(group, Joints) else ()
            pieces = [(slice(d, d + 1), Joints(1, relative=True, signs=signs[d : d + 1])) for d in range(group.size)]
        for dims, piece in pieces:
            alone = replace(robot, actions=(piece,), max_rates=())
            if group.relative:
                columns = np.ascontiguousarray(command[:, dims]), np.ascontiguousarray(own_state[:, dims])
                parts.append(Chunks(alone, steps, *columns, rows, ends - rows - steps.start))
            else:
                absolute = ActionSpace(alone).to_model(command[:, None], own_state)[:, 0].astype(np.float32, copy=False)
                parts += [Column(column, used, chunks[used]) for column in _transposed(absolute)]
    return parts


# Workers --------------------------------------------------------------------------------------------------------------


def _sketch(sets: Sequence[Sequence[Column | Chunks]], workers: Workers, *, bins: bool = False) -> list[Sketch]:
    """One per dimension, of the numbers of all sets; a set is one part after the other."""
    tasks = [(parts, bins) for parts in zip(*sets, strict=True)]
    with ThreadPoolExecutor(workers.threads or os.cpu_count()) as threads:
        # Threads are enough: numpy lets go of the interpreter in every operation that takes long here.
        found = _on_ray(tasks) if workers.ray else threads.map(_sketch_part, *zip(*tasks, strict=True))
        found = tqdm(found, total=len(tasks), desc="norm stats", unit="part", leave=False, delay=1, disable=None)
        return [sketch for some in found for sketch in some]


def _sketch_part(parts: Sequence[Column | Chunks], bins: bool) -> list[Sketch]:
    """One per dimension of the same part of every set."""
    num = sum(map(len, parts))
    step = max(1, num // SAMPLE)
    some = [values for part in parts for values, _ in part.every(step).blocks()]
    sample_Dm = np.concatenate(some, axis=1)
    for seen_Dm in (sample_Dm, sample_Dm[:, :0]):
        sketches = [Sketch.of(np.zeros(0))] * parts[0].size
        quantiles = [[Quantile(q, num, seen) for q in QUANTILES] for seen in seen_Dm]
        for values_Dm, weights in (block for part in parts for block in part.blocks()):
            for d, values in enumerate(values_Dm):
                sketches[d] = sketches[d].merge(Sketch.of(values, weights, bins=bins))
                for quantile in quantiles[d]:
                    quantile.add(values, weights)
        if not any(quantile.misled for both in quantiles for quantile in both):
            break
    return [
        replace(sketch, exact=tuple(q.value() for q in some)) for sketch, some in zip(sketches, quantiles, strict=True)
    ]


def _on_ray(tasks: Sequence[tuple[Sequence[Column | Chunks], bool]]) -> Iterable[list[Sketch]]:
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            expected="the package ray", found="it is not installed", where="--ray", next="pip install 'manipi[ray]'"
        ) from error
    if not ray.is_initialized():
        ray.init()
    remote = ray.remote(_sketch_part)
    yield from map(ray.get, [remote.remote(*task) for task in tasks])


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
