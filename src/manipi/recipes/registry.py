"""Recipes by name: a function that returns a complete TrainConfig, here or in a user's own file.

tabletop                        a name from the table below
path/to/my_robot.py:my_recipe   a function in a file of the user's
my_package.recipes:my_recipe    a function in an importable module
"""

import importlib
import importlib.util
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from manipi.errors import ConfigError, unknown_name
from manipi.robots.robot import Robot
from manipi.train.config import TrainConfig

Recipe: typing.TypeAlias = Callable[[], TrainConfig]

_OPENPI = {
    "aloha": (
        "pi0_aloha pi05_aloha pi0_aloha_towel pi0_aloha_tupperware"
        " pi0_aloha_pen_uncap pi05_aloha_pen_uncap pi0_aloha_sim"
    ),
    "droid": (
        "pi0_droid pi0_fast_droid pi05_droid pi0_fast_full_droid_finetune pi05_full_droid_finetune pi05_droid_finetune"
    ),
    "libero": "pi0_libero pi0_libero_low_mem_finetune pi0_fast_libero pi0_fast_libero_low_mem_finetune pi05_libero",
    "roboarena": (
        "paligemma_binning_droid paligemma_fast_droid paligemma_fast_specialist_droid"
        " paligemma_vq_droid paligemma_diffusion_droid"
    ),
    "polaris": (
        "pi05_droid_jointpos_polaris pi0_fast_droid_jointpos_polaris pi0_droid_jointpos_polaris"
        " pi0_droid_jointpos_100k_polaris paligemma_binning_droid_jointpos"
    ),
    "debug": "debug debug_restore debug_pi05",
}
"""The reference's recipes by module; each function has the name that its config has there."""

RECIPES = {
    "tabletop": "manipi.recipes.tabletop:pi05_tabletop",
    "tabletop_pi0": "manipi.recipes.tabletop:pi0_tabletop",
    "tabletop_pi0_fast": "manipi.recipes.tabletop:pi0_fast_tabletop",
    **{name: f"manipi.recipes.{module}:{name}" for module, names in _OPENPI.items() for name in names.split()},
}


def load_recipe(target: str) -> TrainConfig:
    """The config that `target` names.

    Raises:
        UnknownNameError: no such recipe; with the closest names.
        ConfigError: no such file or module. What the file itself raises passes through, with its own traceback.
    """
    if ":" not in target:
        if target not in RECIPES:
            raise unknown_name("recipe", target, RECIPES, next="manipi recipes, or name path/to/file.py:function")
        target = RECIPES[target]
    where, _, name = target.rpartition(":")
    module = _load_module(where)
    recipes = {n: f for n, f in vars(module).items() if _is_recipe(f)}
    if name not in recipes:
        raise unknown_name(f"recipe in {where}", name, recipes, next="annotate the function `-> TrainConfig`")
    return recipes[name]()


def load_robot(target: str) -> Robot:
    """The robot of a recipe, or the `Robot` that `path/to/file.py:NAME` names."""
    where, _, name = target.rpartition(":")
    if where:
        found = vars(_load_module(where)).get(name)
        if isinstance(found, Robot):
            return found
    return load_recipe(target).robot


def _is_recipe(value: object) -> bool:
    return callable(value) and getattr(value, "__annotations__", {}).get("return") in (TrainConfig, "TrainConfig")


def _load_module(where: str) -> ModuleType:
    if not where:
        raise _not_found("the text before the colon", "nothing")
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise _not_found(where, f"no module {error.name!r}") from error
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise _not_found(where, "no such file")
    name = f"manipi_recipe_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name, which must not be that of a module that is imported already.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _not_found(where: str, found: str) -> ConfigError:
    return ConfigError(
        expected="a Python file or module with recipes",
        found=found,
        where=where,
        next="give the path as path/to/file.py:function, seen from the current folder",
    )
