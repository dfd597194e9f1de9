"""`doctor`, `recipes`, and what every command's help has in common."""

import json
import tomllib
from pathlib import Path

import pytest

from manipi.cli import installation
from manipi.cli.train import parse_train
from manipi.errors import ConfigError
from manipi.recipes.registry import load_recipe, recipe_names

REPOSITORY = Path(__file__).parents[2]


def test_doctor(manipi, tmp_path):
    done = manipi("doctor", "--json", tmp_path / "doctor.json")
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "doctor.json").read_text())
    topics = {answer["topic"] for answer in answers}
    assert topics >= {
        "manipi",
        "python",
        "platform",
        "processor",
        "memory",
        "disk",
        "torch",
        "video",
        "numpy",
        "mujoco",
        "ray",
    }
    assert all(answer["ok"] or answer["next"] for answer in answers)
    assert len(done.stdout.splitlines()) == len(answers)


def test_doctor_knows_every_extra_of_the_package():
    """Of the metadata that the package is built with, so that no list here goes stale."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert installation.PURPOSES.keys() == project["optional-dependencies"].keys() - {"dev"}


def test_doctor_names_what_is_absent_or_too_old(monkeypatch, capsys):
    metadata = ["numpy<3,>=2.0", "numpy<2", "numpy>=99.1; extra == 'demo'", 'no-such-package>=1; extra == "view"']
    monkeypatch.setattr(installation.importlib.metadata, "requires", lambda _: metadata)
    installation.run_doctor([])
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    found = [(state, rest) for state, topic, rest in rows if topic in ("numpy", "no-such-package")]
    assert [state for state, _ in found] == ["ok", "absent", "absent", "absent"]
    assert "needed is <2" in found[1][1]
    assert found[2][1].endswith(
        "needed is >=99.1: the simulated arm of manipi demo (demo)   → pip install 'manipi[demo]'"
    )
    assert found[3][1] == "manipi view --rerun (view)   → pip install 'manipi[view]'"


def test_recipes(manipi, tmp_path):
    done = manipi("recipes", "--json", tmp_path / "recipes.json")
    assert done.returncode == 0, done.stderr
    assert [row["recipe"] for row in json.loads((tmp_path / "recipes.json").read_text())] == recipe_names()
    assert len(done.stdout.splitlines()) == 1 + len(recipe_names())


@pytest.mark.parametrize("command", ["check", "doctor", "inspect", "recipes", "stats"])
def test_help_teaches_by_example(manipi, command):
    assert manipi(command, "--help").stdout.count(f"manipi {command}") >= 2


def test_help_of_a_recipe_shows_its_numbers_and_not_its_robot(manipi):
    text = manipi("train", "tabletop", "--help").stdout
    for flag in ("--steps", "--run-dir", "--optimizer.lr", "--model.action-horizon", "--data.path"):
        assert flag in text
    assert "--robot" not in text
    assert "end-effector" not in text.lower()


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--steps", "0"], "0"),
        (["--data.holdout", "2"], "2.0"),
        (["--model.vision.image-size", "57"], "57 and 8"),
        (["--model.action-expert.depth", "3"], "vlm 2, action_expert 3"),
    ],
)
def test_numbers_that_cannot_be(flags, found):
    with pytest.raises(ConfigError) as error:
        parse_train("tabletop", load_recipe("tabletop"), flags)
    assert error.value.found == found


def test_an_error_is_printed_in_full(manipi):
    contradiction = manipi("train", "tabletop", "--model.vision.image-size", "57")
    assert contradiction.returncode == 1
    assert contradiction.stderr.splitlines()[1:] == [
        "manipi train: ConfigError",
        "expected image_size divisible by patch_size",
        "   found 57 and 8",
        "   where VisionSize",
        "    next round 57 to a multiple of 8",
    ]
