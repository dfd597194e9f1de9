"""`manipi recipes`: what can be trained by name."""

from collections.abc import Sequence
from dataclasses import dataclass

from manipi.cli.arguments import NewFile, parse
from manipi.cli.result import table, write_result
from manipi.recipes.registry import load_recipe, recipe_names
from manipi.train.config import DatasetConfig

RELEASED = "gs://openpi-assets/checkpoints/"
HEADER = ("recipe", "model", "robot", "dataset", "init", "steps", "batch")


@dataclass(frozen=True, kw_only=True)
class _Recipes:
    """List the recipes. A recipe of your own needs no place here: name it as path/to/file.py:function.

    manipi recipes

    manipi inspect tabletop    what one of them does to its first frame

    manipi train tabletop --help    its numbers
    """

    json: NewFile | None = None
    """Write the list to this file."""


def _dataset(one: DatasetConfig) -> str:
    return one.path if one.weight == 1 else f"{one.weight:g} {one.path}"


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    args = parse(_Recipes, arguments, "recipes")
    rows = []
    for name in recipe_names():
        config = load_recipe(name)
        model = type(config.model).__name__.removesuffix("Config")
        dataset = " + ".join(_dataset(one) for one in config.data.datasets) or "–"
        init = config.init.removeprefix(RELEASED) or "–"
        rows.append((name, model, config.robot.name, dataset, init, config.steps, config.batch_size))
    print(table(rows, HEADER))
    write_result([dict(zip(HEADER, row, strict=True)) for row in rows], args.json)
