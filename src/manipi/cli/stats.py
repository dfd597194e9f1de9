"""`manipi stats`: norm stats of a recipe's training data, the dimensions to look at, and a FAST tokenizer for it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from manipi.cli.arguments import parse
from manipi.cli.result import table, write_result
from manipi.recipes.registry import load_recipe
from manipi.robots.robot import Robot
from manipi.train.config import TrainConfig

if TYPE_CHECKING:
    from manipi.tokenizers.fast import ReconstructionReport
    from manipi.types import NormStats


@dataclass(frozen=True, kw_only=True)
class _Stats:
    """Compute the norm stats of a recipe's training episodes, and name suspicious dimensions.

    manipi stats tabletop --out norm_stats.json

    manipi stats my_robot.py:my_recipe

    manipi stats my_robot.py:my_recipe --fit-fast fast_tokenizer
    """

    target: tyro.conf.Positional[str]
    """A recipe, or path/to/file.py:function."""
    out: Path | None = None
    """Save them here, in openpi's layout."""
    fit_fast: Path | None = None
    """Fit a FAST tokenizer to the normalised action chunks, save it in this new folder, and say what it loses."""
    fast_scale: float = 10
    """Finer is more exact and costs more codes."""
    fast_codes: int = 1024
    """Most codes to learn."""
    json: Path | None = None
    """Write statistics, suspicious dimensions and the report on FAST to this file."""


def main(arguments: Sequence[str]) -> None:
    """Print the statistics."""
    args = parse(_Stats, arguments, "stats")

    from manipi.data.stats import compute_norm_stats, suspicious_dimensions
    from manipi.storage import atomic_directory
    from manipi.tokenizers import FastTokenizer
    from manipi.train.data import chunks_to_fit, open_demonstrations
    from manipi.transforms.normalize import save_norm_stats

    config = load_recipe(args.target)
    one = next(one for one in open_demonstrations(config) if one.robot == config.robot)
    dataset, rows = one.dataset, one.rows
    stats = compute_norm_stats(dataset, config.robot, config.model.action_horizon, rows)
    notes = suspicious_dimensions(stats)
    print(f"{len(rows):,} frames of training episodes in {dataset.root}\n\n{stats_table(stats, config.robot)}\n")
    print("suspicious\n" + "\n".join(f"  {note}" for note in notes) if notes else "nothing suspicious")
    if args.out is not None:
        save_norm_stats(stats, args.out)
        print(f"\nsaved  {args.out}")
    report = None
    if args.fit_fast is not None:
        chunks = chunks_to_fit(config, dataset, rows, stats)
        tokenizer = FastTokenizer.fit(chunks, scale=args.fast_scale, vocab_size=args.fast_codes)
        report = tokenizer.reconstruction_report(chunks)
        with atomic_directory(args.fit_fast) as folder:
            tokenizer.save(folder)
        print(f"\nFAST with {tokenizer.vocab_size:,} codes, on {len(chunks):,} chunks\n")
        print(f"{_report_table(report, stats, config)}\n\nsaved  {args.fit_fast}")
    write_result({"stats": stats, "suspicious": notes, "fast": report}, args.json)


def stats_table(stats: "NormStats", robot: Robot) -> str:
    """One row per dimension, as the model sees it."""
    import numpy as np

    rows = []
    for kind, field in (("state", stats.state), ("actions", stats.actions)):
        names = list(_state_names(robot) if kind == "state" else _action_names(robot))
        # Adding zero makes a plain 0 of -0.
        columns_6d = np.stack([field.mean, field.std, field.q01, field.q99, field.min, field.max]) + 0.0
        rows += [(f"{kind}[{d}]", name, *columns_6d[:, d].tolist()) for d, name in enumerate(names)]
    return table(rows, ("dimension", "name", "mean", "std", "q01", "q99", "min", "max"))


def _report_table(report: "ReconstructionReport", stats: "NormStats", config: TrainConfig) -> str:
    """What the round trip through codes costs each dimension, normalised and in the units of its action group."""
    import numpy as np

    from manipi.transforms.normalize import unnormalize

    # Normalisation is linear: a normalised 1 is worth the same everywhere.
    zero_one_2A = np.stack([np.zeros_like(report.max_error), np.ones_like(report.max_error)])
    worth_A = np.diff(unnormalize(zero_one_2A, stats.actions, config.norm_mode), axis=0)[0]
    columns_4A = np.stack([e for error in (report.max_error, report.mean_error) for e in (error, error * worth_A)])
    names = enumerate(_action_names(config.robot))
    rows = [(f"actions[{d}]", name, *columns_4A[:, d].tolist()) for d, name in names]
    numbers, codes = config.model.action_horizon * config.robot.model_action_size, report.mean_codes
    errors = table(rows, ("dimension", "name", "max error", "in units", "mean error", "in units"))
    return (
        f"{errors}\n\n{codes:.1f} codes per chunk, at most {report.max_codes}; "
        f"{numbers / codes:.1f} times fewer than one for each of its {numbers} numbers"
    )


def _state_names(robot: Robot) -> Iterator[str]:
    for state in robot.state:
        yield from state.names or (f"{state.key}[{d}]" for d in range(state.size))


def _action_names(robot: Robot) -> Iterator[str]:
    for group in robot.actions:
        kind = f"{'relative ' if group.relative else ''}{type(group).__name__}"
        yield from (kind if group.model_size == 1 else f"{kind}[{d}]" for d in range(group.model_size))
