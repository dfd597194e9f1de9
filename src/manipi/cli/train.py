"""`manipi train`: a recipe, flags over its numbers, and a run folder."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from manipi.cli.arguments import Folder, NewFile, parse, recipe_name, write_result
from manipi.errors import quoted
from manipi.recipes.registry import load_recipe, recipe_names
from manipi.train.config import STRUCTURE, TrainConfig
from manipi.train.launch import ENVIRONMENT, Launch

HELP = f"""usage: manipi train RECIPE|FILE.py:FUNCTION [--flags]

Train a policy. Structure is Python (a recipe), numbers are flags; the run folder keeps everything, and the same
command goes on where it stopped. SIGTERM and SIGUSR1 (Slurm, spot machines) save and end it, with exit code 0.

  manipi train tabletop --run-dir runs/first --steps 2000 --optimizer.lr 1e-3
  manipi train ./my_robot.py:my_recipe                    a recipe in a file of your own
  manipi train tabletop --gpus 8                          on eight GPUs; several hosts: docs/multi_node.md
  manipi train tabletop --help                            the recipe's numbers, each of them a flag

recipes: {", ".join(recipe_names())}
"""


@dataclass(frozen=True, kw_only=True)
class _Train:
    """Train this recipe, with other numbers where a flag says so. The same command goes on where it stopped.

    manipi train tabletop --run-dir runs/first --steps 2000 --optimizer.lr 1e-3
    """

    run_dir: Folder | None = None
    """The run's folder; runs/RECIPE unless named."""
    resume_from: int | None = None
    """Go on from the checkpoint of this step, where those after it are damaged: they are deleted."""
    json: NewFile | None = None
    """Write the last metrics to this file."""
    launch: Annotated[Launch, tyro.conf.arg(name="")] = field(default_factory=Launch)
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def main(arguments: Sequence[str]) -> None:
    """Train; prints the checkpoint's folder."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(HELP)
        return
    target = recipe_name(arguments, "train")
    args = parse_train(target, load_recipe(target), arguments[1:])
    run_dir = args.run_dir or Path("runs") / target.rpartition(":")[2]
    if args.launch.wanted:
        torchrun = args.launch.command(args.config, arguments)

        from manipi.train.parallel import require_gpus

        require_gpus(args.launch.gpus)  # by name, and not from every process that torchrun starts and ends
        _become(torchrun)

    from manipi.train.loop import train
    from manipi.train.run.folder import Run

    checkpoint = train(args.config, run_dir, resume_from=args.resume_from)
    if os.environ.get("RANK", "0") != "0":
        return  # one of many processes, of which the first speaks
    run = Run(run_dir, args.config)
    metrics, best = run.read_metrics(), run.best()
    write_result({"checkpoint": str(checkpoint), "best": best, **(metrics[-1] if metrics else {})}, args.json)
    print(f"checkpoint  {checkpoint}\nloss curve  {run_dir / 'loss.png'}")
    if best:
        print(f"best        {run_dir / 'best'}, of step {best['step']}: validation/curves.png")
    print(f"next        manipi eval {quoted(run_dir / 'best' if best else checkpoint)}")


def _become(torchrun: list[str]) -> None:
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    print(*(f"{name}={value}" for name, value in added.items()), shlex.join(torchrun), flush=True)
    os.execve(torchrun[0], torchrun, os.environ | added)


def parse_train(target: str, recipe: TrainConfig, arguments: Sequence[str]) -> _Train:
    """The command's own flags, and the recipe with the other flags applied to its numbers."""
    return parse(_Train, arguments, f"train {target}", default=_Train(config=recipe), structure=STRUCTURE)
