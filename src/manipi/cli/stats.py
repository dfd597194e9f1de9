"""`manipi stats`: norm stats of a recipe's training data, and the dimensions to look at."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from manipi.cli.arguments import parse
from manipi.cli.result import table, write_result
from manipi.recipes.registry import load_recipe
from manipi.robots.robot import Robot
from manipi.types import NormStats


@dataclass(frozen=True, kw_only=True)
class _Stats:
    """Compute the norm stats of a recipe's training episodes, and name suspicious dimensions.

    manipi stats tabletop --out norm_stats.json

    manipi stats my_robot.py:my_recipe
    """

    target: tyro.conf.Positional[str]
    """A recipe, or path/to/file.py:function."""
    out: Path | None = None
    """Save them here, in openpi's layout."""
    json: Path | None = None
    """Write statistics and suspicious dimensions to this file."""


def main(arguments: Sequence[str]) -> None:
    """Print the statistics."""
    args = parse(_Stats, arguments, "stats")

    from manipi.data.split import split_episodes
    from manipi.data.stats import compute_norm_stats, suspicious_dimensions
    from manipi.train.data import open_demonstrations
    from manipi.transforms.normalize import save_norm_stats

    config = load_recipe(args.target)
    dataset = open_demonstrations(config)
    rows, _ = split_episodes(dataset, holdout=config.data.holdout, seed=config.seed)
    stats = compute_norm_stats(dataset, config.robot, config.model.action_horizon, rows)
    notes = suspicious_dimensions(stats)
    print(f"{len(rows):,} frames of training episodes in {dataset.root}\n\n{stats_table(stats, config.robot)}\n")
    print("suspicious\n" + "\n".join(f"  {note}" for note in notes) if notes else "nothing suspicious")
    if args.out is not None:
        save_norm_stats(stats, args.out)
        print(f"\nsaved  {args.out}")
    write_result({"stats": stats, "suspicious": notes}, args.json)


def stats_table(stats: NormStats, robot: Robot) -> str:
    """One row per dimension, as the model sees it."""
    rows = []
    for kind, field in (("state", stats.state), ("actions", stats.actions)):
        names = list(_state_names(robot) if kind == "state" else _action_names(robot))
        # Adding zero makes a plain 0 of -0.
        columns_6d = np.stack([field.mean, field.std, field.q01, field.q99, field.min, field.max]) + 0.0
        rows += [(f"{kind}[{d}]", name, *columns_6d[:, d].tolist()) for d, name in enumerate(names)]
    return table(rows, ("dimension", "name", "mean", "std", "q01", "q99", "min", "max"))


def _state_names(robot: Robot) -> Iterator[str]:
    for state in robot.state:
        yield from state.names or (f"{state.key}[{d}]" for d in range(state.size))


def _action_names(robot: Robot) -> Iterator[str]:
    for group in robot.actions:
        kind = f"{'relative ' if group.relative else ''}{type(group).__name__}"
        yield from (kind if group.model_size == 1 else f"{kind}[{d}]" for d in range(group.model_size))
