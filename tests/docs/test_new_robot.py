"""docs/new_robot.md is true: its file trains a policy that acts, and its errors are those that come."""

from dataclasses import replace

import numpy as np
import pytest

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.errors import ManipiError
from manipi.policy import Policy
from manipi.recipes.registry import load_recipe, load_robot
from manipi.robots import State
from manipi.train.data import prepare
from manipi.train.loop import train

PAGE = "docs/new_robot.md"
VECTORS = {"observation.joints": 6, "observation.gripper": 1, "action": 7}
CAMERAS = ("observation.images.front", "observation.images.wrist")


@pytest.fixture(scope="module")
def folder(blocks, tmp_path_factory):
    """The page's file, beside a dataset that has what it names."""
    folder = tmp_path_factory.mktemp("new_robot")
    (folder / "my_robot.py").write_text(blocks(PAGE, "python")[0], encoding="utf-8")
    features = {name: Feature(kind="vector", shape=(size,), dtype="float32") for name, size in VECTORS.items()}
    features |= {name: Feature(kind="image", shape=(48, 64, 3), dtype="video") for name in CAMERAS}
    rng = np.random.default_rng(0)
    with LeRobotWriter(folder / "datasets/ur5_pick", fps=20, features=features, robot_type="ur5") as writer:
        for length in (12, 9, 15, 11, 8):
            episode = {name: rng.normal(size=(length, size)).astype(np.float32) for name, size in VECTORS.items()}
            episode |= {name: rng.integers(0, 255, (length, 48, 64, 3), np.uint8) for name in CAMERAS}
            writer.add_episode(episode, task="pick up the screw")
    return folder


@pytest.fixture
def recipe(folder, monkeypatch):
    """As the page has it, in the page's folder; without worker processes."""
    monkeypatch.chdir(folder)
    recipe = load_recipe("my_robot.py:pi05_ur5")
    return replace(recipe, data=replace(recipe.data, num_workers=0), num_threads=1)


def observation():
    pictures = {name: np.full((48, 64, 3), 90, np.uint8) for name in ("image", "wrist_image")}
    return {**pictures, "joints": np.zeros(6), "gripper": np.zeros(1), "prompt": "pick up the screw"}


def test_its_file_trains_a_policy_that_acts(recipe, tmp_path):
    checkpoint = train(replace(recipe, steps=2, batch_size=4), tmp_path / "run", show=False)
    actions = Policy.load(checkpoint).infer(observation())["actions"]
    assert actions.shape == (recipe.model.action_horizon, 7)
    assert np.isfinite(actions).all()


def test_its_robot_is_found_by_name(recipe):
    assert load_robot("my_robot.py:UR5") == recipe.robot


def test_a_whole_observation_fits_the_models_tokens(recipe, tmp_path):
    """The instruction and seven numbers of the state leave room in `max_token_len`."""
    data = prepare(recipe, tmp_path)
    sample = data.main.source.samples(data.main.rows[:1])[0]
    assert 15 < sample["token_valid"].sum() < len(sample["token_valid"])


def _missing_feature(recipe, folder):
    robot = replace(recipe.robot, dataset_keys={**recipe.robot.dataset_keys, "joints": "observation.state"})
    prepare(replace(recipe, robot=robot), folder)


def _wrong_observation(recipe, folder):
    seen = observation()
    seen["wrist"] = seen.pop("wrist_image")
    prepare(recipe, folder).main.source.pipeline.encode(seen)


def _contradiction(recipe, folder):
    replace(recipe.robot, state=(State("gripper", 1),))


def _unknown_recipe(recipe, folder):
    load_recipe("my_robot.py:pi05_ur")


@pytest.mark.parametrize("mistake", [_missing_feature, _wrong_observation, _contradiction, _unknown_recipe])
def test_its_errors_are_real(mistake, recipe, folder, blocks, tmp_path):
    with pytest.raises(ManipiError) as caught:
        mistake(recipe, tmp_path)
    text = f"{type(caught.value).__name__}\n{caught.value}\n".replace(f"{folder.resolve()}/", "")
    assert text in blocks(PAGE, "")
