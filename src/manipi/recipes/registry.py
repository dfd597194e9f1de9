"""Recipes and robots by name: ours, those of installed packages, of users' files.

A recipe is a function that returns a complete TrainConfig.

tabletop                        a name from the table below, or one that an installed package adds (manipi.extensions)
path/to/my_robot.py:my_recipe   a function in a file of the user's
my_package.recipes:my_recipe    a function in an importable module
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import manipi
from manipi.errors import ConfigError, ManipiError, shown, unknown_name
from manipi.extensions import entries, find, package_of
from manipi.recipes import joint, openpi
from manipi.robots.robot import Robot
from manipi.train.config import TrainConfig

_INSTALLED = map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))
_NOT_OF_USERS = ("<", *(f"{folder}{os.sep}" for folder in (*manipi.__path__, *_INSTALLED)))
"""Frozen modules; folders of Python, of installed packages and of this one."""

_SHIPPED = {"aloha": "aloha aloha_sim", "franka": "droid libero", "ur5": "ur5"}
_ROBOTS = {name: f"manipi.robots.{module}:{name}" for module, names in _SHIPPED.items() for name in names.split()}


def _is_recipe(value: object) -> bool:
    return callable(value) and getattr(value, "__annotations__", {}).get("return") in (TrainConfig, "TrainConfig")


_RECIPES = {
    name: f"{module.__name__}:{name}"
    for module in (openpi, joint)
    for name, value in vars(module).items()
    if _is_recipe(value) and name[0] != "_"
}


def recipe_names() -> list[str]:
    """Every name that `load_recipe` knows: of installed packages, then the reference's, then their joint variants."""
    return list(entries("manipi.recipes", _RECIPES))


def load_recipe(target: str) -> TrainConfig:
    """The config that `target` names.

    Raises:
        UnknownNameError: no such recipe; with the closest names.
        ConfigError: two packages add a recipe of this name; no such file or module, or a fault in it: what it raises,
            with file and line. A `ManipiError` keeps its type and says where in the file it came from.
    """
    if ":" not in target and target.endswith(".py"):
        target += ":"  # a file without its function: the error lists those that it has
    where, _, name = target.rpartition(":")
    if ":" in target:
        return _config_in(_load_module(where), name, where)
    advice = "manipi recipes, or name path/to/file.py:function"
    return _config_of(find("manipi.recipes", target, _RECIPES, next=advice), target)


def load_robot(target: str) -> Robot:
    """The robot of that name, of a recipe, or the `Robot` that `path/to/file.py:NAME` names. Raises as `load_recipe`.

    A robot's name stands for a `Robot`, or for a function that returns one and takes no arguments.
    """
    where, _, name = target.rpartition(":")
    if not where:
        robots, recipes = entries("manipi.robots", _ROBOTS), recipe_names()
        if target not in robots and target not in recipes:
            raise unknown_name("robot or recipe", target, {*robots, *recipes}, next="name path/to/file.py:NAME")
        if target not in robots:
            return load_recipe(target).robot
        robot = find("manipi.robots", target, _ROBOTS)
        if callable(robot):
            with _faults_of_users(_place_of(robot)):
                robot = robot()
        if not isinstance(robot, Robot):
            raise ConfigError(
                expected=f"a Robot, or a function that returns one, which {target!r} stands for",
                found=shown(robot),
                where=f"the package {package_of(robots[target][0])}, entry point {target} of manipi.robots",
                next="correct the entry point of that package",
            )
        return robot
    module = _load_module(where)
    found = vars(module).get(name)
    if isinstance(found, Robot):
        return found
    if found is None or not callable(found):
        known = [n for n, value in vars(module).items() if isinstance(value, Robot) or _is_recipe(value)]
        raise unknown_name(f"robot or recipe in {where}", name, known, next="name a Robot(...) or a recipe of the file")
    return _config_in(module, name, where).robot


def load_selector(target: str) -> tuple[Callable[..., typing.Any], str]:
    """A selector among candidates (`manipi.candidates.Selector`) of a user's file or module: the function, or an object
    of the class that `path/to/file.py:NAME` names; and the hash of its source. Raises as `load_recipe`."""
    where, _, name = target.rpartition(":")
    module = _load_module(where)
    found = vars(module).get(name)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and v.__module__ == module.__name__]
        raise unknown_name(f"selector in {where}", name, known, next="name a function or a class of the file")
    selector: typing.Any = found
    if inspect.isclass(found):
        with _faults_of_users(_place_of(found)):
            selector = found()
    return selector, hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:8]


def _config_in(module: ModuleType, name: str, where: str) -> TrainConfig:
    """What the recipe of that name in a module returns."""
    found = vars(module).get(name)
    if found is None or not (_is_recipe(found) or inspect.isfunction(found)):
        recipes = [n for n, value in vars(module).items() if _is_recipe(value)]
        next = "annotate the function `-> TrainConfig`" if name or not recipes else f"name it: {where}:{recipes[0]}"
        raise unknown_name(f"recipe in {where}", name, recipes, next=next)
    return _config_of(found, name)


def _config_of(recipe: typing.Any, name: str) -> TrainConfig:
    """What a recipe returns: a function that says that it returns a config, and takes no arguments."""
    signature = inspect.signature(recipe) if callable(recipe) else None
    parameters = signature.parameters.values() if signature else ()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed or not _is_recipe(recipe):
        raise ConfigError(
            expected=f"a recipe: def {name}() -> TrainConfig",
            found=f"def {name}{signature}" if signature else shown(recipe),
            where=_place_of(recipe),
            next=f"give {', '.join(needed)} a default" if needed else "annotate the function `-> TrainConfig`",
        )
    with _faults_of_users(_place_of(recipe)):
        config = recipe()
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            expected="a TrainConfig, which the function is annotated to return",
            found=shown(config) if config is not None else "nothing: no `return`",
            where=_place_of(recipe),
            next="return a TrainConfig(...), or dataclasses.replace(...) of one",
        )
    return config


def _load_module(where: str) -> ModuleType:
    if not where:
        raise _not_found("the text before the colon", "nothing")
    if not where.endswith(".py"):
        if Path(where).expanduser().with_suffix(".py").is_file() or "/" in where:
            raise _not_found(where, "no name of a module, nor of a file that ends in .py")
        try:
            with _faults_of_users(where):
                return importlib.import_module(where)
        except ConfigError as error:
            cause = error.__cause__
            if isinstance(cause, ModuleNotFoundError) and f"{where}.".startswith(f"{cause.name}."):
                raise _not_found(where, f"no module {cause.name!r}") from cause
            raise
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
    with _faults_of_users(str(path)):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _faults_of_users(file: str) -> Iterator[None]:
    """What a user's `file` raises, as an error that names the line; our own errors keep their type."""
    try:
        yield
    except ManipiError as error:
        raise error.moved(f"{error.where}, from {_place_in(error, file)}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(
            expected="a file of recipes, robots or selectors that runs to its end",
            found=f"{type(error).__name__}: {shown(str(error), 400)[1:-1]}",
            where=_place_in(error, file),
            next="install the module, or start with its folder in PYTHONPATH"
            if isinstance(error, ModuleNotFoundError)
            else "correct this line, or what it calls",
        ) from error


def _place_in(error: BaseException, file: str) -> str:
    """The innermost line that is neither ours nor of an installed package, and what it says; or else the file."""
    if isinstance(error, SyntaxError) and Path(error.filename or "").is_file():
        return f"{error.filename}, line {error.lineno or 1}: {(error.text or '').strip()}".removesuffix(": ")
    frames = reversed(traceback.extract_tb(error.__traceback__))
    users = next((frame for frame in frames if not frame.filename.startswith(_NOT_OF_USERS)), None)
    return f"{users.filename}, line {users.lineno}: {users.line}" if users else file


def _place_of(found: typing.Any) -> str:
    code = getattr(inspect.unwrap(found), "__code__", None)
    return f"{code.co_filename}, line {code.co_firstlineno}" if code else f"module {type(found).__module__}"


def _not_found(where: str, found: str) -> ConfigError:
    return ConfigError(
        expected="a Python file or module with recipes",
        found=found,
        where=where,
        next="give the path as path/to/file.py:function, seen from the current folder",
    )
