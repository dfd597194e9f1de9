import sys
import types

import pytest

from manipi.errors import ConfigError, UnknownNameError
from manipi.recipes.registry import RECIPES, load_recipe, load_robot
from manipi.robots.tabletop import TABLETOP
from manipi.train.config import TrainConfig
from manipi.transforms.pipeline import check_fit

USER_FILE = """
from dataclasses import replace
from manipi.recipes.tabletop import pi0_tabletop
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


@pytest.mark.parametrize("name", RECIPES)
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
    assert load_recipe("manipi.recipes.tabletop:pi0_tabletop") == load_recipe("tabletop_pi0")
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
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(f"{tmp_path}/absent.py:recipe")
    with pytest.raises(ConfigError, match="no module 'absent_package'"):
        load_recipe("absent_package.recipes:recipe")
    with pytest.raises(ConfigError, match="a Python file or module with recipes"):
        load_recipe(":recipe")


def test_what_the_file_raises_passes_through(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_recipe(f"{tmp_path}/broken.py:recipe")
