"""What a recipe may say."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, get_origin, get_type_hints

import pytest

from manipi.cli.train import parse_train
from manipi.errors import ConfigError, UnknownNameError
from manipi.recipes.registry import load_recipe
from manipi.robots.robot import Robot
from manipi.train.config import ComputeConfig, DataConfig, DatasetConfig


def words(settings: Any, *path: str) -> list[tuple[str, ...]]:
    """The path of every field that is one of a few words."""
    hints, found = get_type_hints(type(settings)), []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if get_origin(hints[field.name]) is Literal:
            found.append((*path, field.name))
        elif is_dataclass(value) and not isinstance(value, Robot):
            found += words(value, *path, field.name)
    return found


def with_value(settings: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    return replace(settings, **{name: with_value(getattr(settings, name), tuple(rest), value) if rest else value})


@pytest.mark.parametrize("path", words(load_recipe("tabletop")), ids=".".join)
def test_a_word_that_is_none_of_the_choices_is_refused_by_name(path: tuple[str, ...]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        with_value(load_recipe("tabletop"), path, "something else")
    assert caught.value.where == ("compute dtype" if path == ("model", "dtype") else ".".join(path))


def test_float32_is_not_taken_for_bfloat16() -> None:
    with pytest.raises(UnknownNameError) as caught:
        replace(load_recipe("tabletop"), compute=ComputeConfig(precision="float32"))  # pyright: ignore[reportArgumentType]
    assert caught.value.where == "compute.precision"
    assert "did you mean fp32?" in caught.value.next


def test_the_datasets_of_a_mixture_are_read_too() -> None:
    bad = DatasetConfig(path="a", prompt="subtasks")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnknownNameError, match=r"data\.mixture\.prompt"):
        replace(load_recipe("tabletop"), data=DataConfig(mixture=(bad,)))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("optimizer.lr", value) for value in ("nan", "-1")),
        *((f"optimizer.{name}", "1") for name in ("beta1", "beta2")),
        *((f"optimizer.{name}", "-1") for name in ("eps", "weight-decay", "momentum")),
        *((name, "-1") for name in ("data.num-workers", "num-threads")),
    ],
)
def test_what_torch_or_the_loader_would_stumble_over(flag, value):
    with pytest.raises(ConfigError) as error:
        parse_train("tabletop", load_recipe("tabletop"), [f"--{flag}", value])
    assert error.value.next == f"set --{flag}"
