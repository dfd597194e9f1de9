"""`manipi init`: a servable checkpoint with random weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from manipi.cli.arguments import NewFolder, parse, recipe_name
from manipi.errors import quoted
from manipi.recipes.registry import load_recipe
from manipi.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class _Init:
    """Write a checkpoint of this recipe before any training: to try robot, client and simulator without data.

    manipi init tabletop runs/untrained                    then: manipi serve runs/untrained
    manipi init pi05_libero runs/small --tokenizer byte --model.vlm.width 64 …
    """

    target: tyro.conf.Positional[NewFolder]
    """Folder to write; it must not exist."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


HELP = """usage: manipi init RECIPE|FILE.py:FUNCTION TARGET [--flags]

Write a servable checkpoint with random weights. It needs no data: state and actions are taken as from -1 to 1.

  manipi init tabletop runs/untrained
  manipi init tabletop --help                             the recipe's numbers, each of them a flag
"""


def main(arguments: Sequence[str]) -> None:
    """Write it; prints how to serve it."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(HELP)
        return
    recipe = recipe_name(arguments, "init")
    config = load_recipe(recipe)
    args = parse(_Init, arguments[1:], f"init {recipe}", default=_Init(target=tyro.MISSING, config=config))

    from manipi.train.untrained import write_untrained

    write_untrained(args.target, args.config, seed=args.config.seed)
    print(f"checkpoint  {args.target}\nnext        manipi serve {quoted(args.target)}")
