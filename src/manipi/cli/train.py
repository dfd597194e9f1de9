"""`manipi train`: a recipe, flags over its numbers, and a run folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from manipi.cli.arguments import parse
from manipi.cli.result import write_result
from manipi.errors import ConfigError
from manipi.recipes.registry import RECIPES, load_recipe
from manipi.train.config import TrainConfig

HELP = f"""usage: manipi train RECIPE|FILE.py:FUNCTION [--flags]

Train a policy. Structure is Python (a recipe), numbers are flags; the run folder keeps everything, and the same
command goes on where it stopped.

  manipi train tabletop --run-dir runs/first --steps 2000 --optimizer.lr 1e-3
  manipi train ./my_robot.py:my_recipe                    a recipe in a file of your own
  manipi train tabletop --help                            the recipe's numbers, each of them a flag

recipes: {", ".join(RECIPES)}
"""


@dataclass(frozen=True, kw_only=True)
class _Train:
    """Train this recipe, with other numbers where a flag says so. The same command goes on where it stopped.

    manipi train tabletop --run-dir runs/first --steps 2000 --optimizer.lr 1e-3
    """

    run_dir: Path | None = None
    """The run's folder; runs/RECIPE unless named."""
    json: Path | None = None
    """Write the last metrics to this file."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def main(arguments: Sequence[str]) -> None:
    """Train; prints the checkpoint's folder."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(HELP)
        return
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(
            expected=f"a recipe first: {', '.join(RECIPES)}, or path/to/file.py:function",
            found=repr(arguments[0]) if arguments else "nothing",
            where="manipi train",
            next="manipi train --help",
        )
    target = arguments[0]
    args = parse_train(target, load_recipe(target), arguments[1:])
    run_dir = args.run_dir or Path("runs") / target.rpartition(":")[2]

    from manipi.train.loop import train
    from manipi.train.run import Run

    checkpoint = train(args.config, run_dir)
    run = Run(run_dir, args.config)
    metrics, best = run.read_metrics(), run.best()
    write_result({"checkpoint": str(checkpoint), "best": best, **metrics[-1]}, args.json)
    print(f"checkpoint  {checkpoint}\nloss curve  {run_dir / 'loss.png'}")
    if best:
        print(f"best        {run_dir / 'best'}, of step {best['step']}: validation/curves.png")
    print(f"next        manipi eval {run_dir / 'best' if best else checkpoint}")


def parse_train(target: str, recipe: TrainConfig, arguments: Sequence[str]) -> _Train:
    """The command's own flags, and the recipe with the other flags applied to its numbers."""
    return parse(_Train, arguments, f"train {target}", default=_Train(config=recipe))
