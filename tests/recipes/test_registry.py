import sys
import types

import pytest

from manipi.errors import ConfigError, UnknownNameError
from manipi.recipes.registry import load_recipe, load_robot, recipe_names
from manipi.robots.tabletop import TABLETOP
from manipi.train.config import TrainConfig
from manipi.transforms.pipeline import check_fit

USER_FILE = """
from dataclasses import replace
from manipi.tabletop.recipes import pi0_tabletop
from manipi.robots.tabletop import TABLETOP
from manipi.train.config import TrainConfig

MY_ROBOT = replace(TABLETOP, name="mine")

def my_recipe() -> TrainConfig:
    return replace(pi0_tabletop(), robot=MY_ROBOT)

def no_recipe():
    return 1
"""


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "types.py"  # a module of that name is always imported already
    path.write_text(USER_FILE)
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_fits(name):
    config = load_recipe(name)
    assert isinstance(config, TrainConfig)
    check_fit(config.robot, config.model)


def test_a_file_of_the_users(user_file, monkeypatch):
    assert load_recipe(f"{user_file}:my_recipe").robot.name == "mine"
    assert load_robot(f"{user_file}:MY_ROBOT").name == "mine"
    assert load_robot(f"{user_file}:my_recipe").name == "mine"
    assert sys.modules["types"] is types
    monkeypatch.chdir(user_file.parent)
    assert load_recipe("types.py:my_recipe").robot.name == "mine"


def test_a_module():
    assert load_recipe("manipi.tabletop.recipes:pi0_tabletop") == load_recipe("tabletop_pi0")
    assert load_robot("tabletop") == TABLETOP
    assert load_robot("manipi.robots.tabletop:TABLETOP") == TABLETOP


def test_names_that_nobody_has(user_file, tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean tabletop_pi0"):
        load_recipe("tabletop_pi1")
    with pytest.raises(UnknownNameError, match="did you mean my_recipe") as error:
        load_recipe(f"{user_file}:my_recipi")
    assert error.value.expected == f"a recipe in {user_file}, one of: my_recipe, pi0_tabletop"
    with pytest.raises(UnknownNameError, match="annotate the function `-> TrainConfig`"):
        load_recipe(f"{user_file}:no_config")
    with pytest.raises(UnknownNameError, match=r"one of: my_recipe, pi0_tabletop\n(.*\n)+ *next name it: .*\.py:"):
        load_recipe(f"{user_file}")
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(f"{tmp_path}/absent.py:recipe")
    with pytest.raises(ConfigError, match="no module 'absent_package'"):
        load_recipe("absent_package.recipes:recipe")
    with pytest.raises(ConfigError, match="a Python file or module with recipes"):
        load_recipe(":recipe")


HEAD = """from dataclasses import replace
from manipi.tabletop.recipes import pi0_tabletop
from manipi.robots import Joints, Robot, State
from manipi.train.config import TrainConfig

"""
RECIPE = "def recipe() -> TrainConfig:\n    "
FAULTS = {
    "syntax": ("def recipe() -> TrainConfig\n    return 1", 6, "SyntaxError: expected ':'"),
    "indentation": ("def recipe() -> TrainConfig:\nreturn 1", 7, "IndentationError"),
    "not a text": ("\0", 0, "null bytes"),
    "import": ("from manipi.robots import Arm", 6, "ImportError: cannot import name 'Arm'"),
    "module": ("import no_such_module", 6, "ModuleNotFoundError: No module named 'no_such_module'"),
    "name": ("ROBOT = Robto()", 6, "NameError: name 'Robto' is not defined"),
    "keyword of a robot": ("ROBOT = Robot(title='x')", 6, "TypeError: .*unexpected keyword argument 'title'"),
    "argument of a robot": ("ROBOT = Robot(name='x')", 6, "TypeError: .*missing 3 required .*arguments"),
    "a robot that cannot be": (
        "R = Robot(name='x', cameras={}, state=(), actions=(Joints(0),))", 6, "expected at least one dimension"
    ),
    "keyword": (f"{RECIPE}return TrainConfig(stepz=3)", 7, "TypeError: .*keyword argument 'stepz'"),
    "keyword of replace": (f"{RECIPE}return replace(pi0_tabletop(), a=1)", 7, "TypeError: .*'a'"),
    "a setting that cannot be": (f"{RECIPE}return replace(pi0_tabletop(), steps=0)", 7, "found 0\n.*TrainConfig.steps"),
    "missing argument": ("def recipe(size) -> TrainConfig:\n    return 1", 6, r"found def recipe\(size\)"),
    "keyword-only argument": ("def recipe(*, size) -> TrainConfig:\n    return 1", 6, r"found def recipe\(\*, size\)"),
    "return type": (f"{RECIPE}return pi0_tabletop().robot", 6, "found an object of type Robot"),
    "no return": (f"{RECIPE}pi0_tabletop()", 6, "found nothing: no `return`"),
    "no annotation": ("def recipe():\n    return pi0_tabletop()", 6, r"found def recipe\(\)"),
    "an exception of its own": (f"class Odd(Exception): pass\n{RECIPE}raise Odd('h\\na')", 8, r"Odd: h\\na"),
    "an exception below": (f"def inner():\n    return {{}}['k']\n{RECIPE}return inner()", 7, "KeyError: 'k'"),
    "an exit": ("raise SystemExit(3)", 6, "SystemExit: 3"),
    "a frozen field": (f"{RECIPE}c = pi0_tabletop()\n    c.steps = 1", 8, "FrozenInstanceError: cannot assign"),
}  # fmt: skip


@pytest.mark.parametrize("load", [load_recipe, load_robot])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_users_file_is_an_error_with_its_line(fault, load, tmp_path):
    source, line, found = FAULTS[fault]
    path = tmp_path / "mine.py"
    path.write_text(HEAD + source)
    with pytest.raises(ConfigError, match=found) as error:
        load(f"{path}:recipe")
    assert (f"{path}, line {line}" if line else str(path)) in error.value.where
    assert all(part.count("\n") == 0 for part in vars(error.value).values() if isinstance(part, str))


def test_a_fault_in_what_a_users_file_imports_names_that_file(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("\ndef size():\n    return 1 / 0\n")
    (tmp_path / "mine.py").write_text(f"{HEAD}import beside\nbeside.size()")
    monkeypatch.syspath_prepend(tmp_path)
    for target in (f"{tmp_path}/mine.py:recipe", "mine:recipe"):
        with pytest.raises(ConfigError, match="ZeroDivisionError") as error:
            load_recipe(target)
        assert f"{tmp_path}/beside.py, line 3: return 1 / 0" in error.value.where
    for target in (f"{tmp_path}/mine:recipe", "./mine:recipe", "mine/:recipe"):
        with pytest.raises(ConfigError, match=r"ends in \.py"):
            load_recipe(target)
