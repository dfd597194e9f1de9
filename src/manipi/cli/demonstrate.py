"""`manipi demonstrate`: a dataset of a suite's scripted expert."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from manipi.cli.arguments import NewFolder, parse
from manipi.errors import quoted
from manipi.recipes.registry import load_robot


@dataclass(frozen=True, kw_only=True)
class _Demonstrate:
    """Record the scripted expert of a suite as a LeRobot dataset, on scenes that no evaluation uses.

    manipi demonstrate tabletop/crowd runs/crowd/dataset --episodes 8000
    manipi demonstrate metaworld/four runs/metaworld/dataset --robot simulators/metaworld/recipe.py:METAWORLD
    """

    suite: tyro.conf.Positional[str]
    """FAMILY/NAME; a name that is unknown lists all."""
    target: tyro.conf.Positional[NewFolder]
    """Folder of the dataset; it must not exist."""
    robot: str | None = None
    """The robot: FILE.py:NAME, or a recipe. Default: the suite's, where it is one that manipi knows."""
    episodes: int = 400
    """How many to make; those that fail are left out."""
    noise: tuple[float, ...] = (0.0, 0.3, 0.6)
    """Disturbances of the executed commands, in turns, so that episodes show how to recover."""
    workers: int = 2
    """Simulators side by side."""


def main(arguments: Sequence[str]) -> None:
    """Record; prints how many succeeded."""
    args = parse(_Demonstrate, arguments, "demonstrate")

    from manipi.evaluate.demonstrations import record_demonstrations
    from manipi.evaluate.evaluation import require
    from manipi.evaluate.suites import FIRST_SCENE, find_suite

    suite = find_suite(args.suite)
    require("--episodes", args.episodes, 1 <= args.episodes < FIRST_SCENE, "an episode or more", "400")
    require("--workers", args.workers, args.workers >= 1, "a worker process or more", "2")
    levels = args.noise and all(0 <= level < math.inf for level in args.noise)
    require("--noise", args.noise, bool(levels), "disturbances, from 0", "0 0.3 0.6")
    settings = {"episodes": args.episodes, "noise": args.noise, "workers": args.workers}
    kept, made = record_demonstrations(suite, load_robot(args.robot or suite.robot), args.target, **settings)
    print(
        f"{args.target}: {kept} of {made} episodes succeeded and are in it\nnext    manipi check {quoted(args.target)}"
    )
