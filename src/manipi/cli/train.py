"""`manipi train`: a recipe, flags over its numbers, and a run folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from manipi.cli.result import write_result
from manipi.recipes.registry import load_recipe
from manipi.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class _Place:
    run_dir: Path | None = None
    """The run's folder; the same command goes on where it stopped. Default: runs/RECIPE."""
    json: Path | None = None
    """Write the last metrics to this file."""


def main(arguments: Sequence[str]) -> None:
    """Train; prints the checkpoint's folder."""
    if not arguments or arguments[0].startswith("-"):
        target, rest = "tabletop", list(arguments)
        prog = "manipi train RECIPE|FILE.py:FUNCTION"
    else:
        target, *rest = arguments
        prog = f"manipi train {target}"
    recipe = load_recipe(target)
    place, config = parse(recipe, rest, prog)
    if not arguments or arguments[0].startswith("-"):
        load_recipe("")
    run_dir = place.run_dir or Path("runs") / target.rpartition(":")[2]

    from manipi.train.loop import train
    from manipi.train.run import Run

    checkpoint = train(config, run_dir)
    metrics = Run(run_dir, config).read_metrics()
    write_result({"checkpoint": str(checkpoint), **metrics[-1]}, place.json)
    print(f"checkpoint  {checkpoint}\nloss curve  {run_dir / 'loss.png'}\nnext        manipi eval {checkpoint}")


def parse(recipe: TrainConfig, arguments: Sequence[str], prog: str) -> tuple[_Place, TrainConfig]:
    """The command's own flags, and the recipe with the other flags applied to its numbers."""
    place, rest = tyro.cli(_Place, args=arguments, return_unknown_args=True, prog=prog, add_help=False)
    return place, tyro.cli(TrainConfig, args=rest, default=recipe, prog=prog, description=__doc__)
