import shutil
from functools import partial
from pathlib import Path

import pytest
from tests.commands import run_manipi

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy_of(shared_datasets, tmp_path):
    """`copy_of(name)` is a writable copy of a sample dataset."""

    def copy(name):
        return Path(shutil.copytree(shared_datasets / name, tmp_path / name, copy_function=shutil.copyfile))

    return copy


@pytest.fixture
def manipi(tmp_path):
    """`manipi("check", path)` runs the command in a process of its own, in an empty folder."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    return partial(run_manipi, folder=folder, COLUMNS="100")


@pytest.fixture
def recipe_file(shared_datasets, tmp_path):
    """A user's file with a robot and a recipe for a sample dataset."""
    path = tmp_path / "my_robot.py"
    path.write_text(f"""
from manipi.model.config import GEMMA_TINY, GEMMA_TINY_EXPERT, VISION_TINY_8, Pi05Config
from manipi.robots import Joints, Robot, State
from manipi.train.config import DataConfig, TrainConfig

ROBOT = Robot(
    name="aloha",
    cameras={{"base": "observation.images.cam_high", "left_wrist": "observation.images.cam_left_wrist"}},
    state=(State("observation.state", 14),),
    actions=(Joints(14, relative=True),),
    action_key="action",
    control_hz=50,
)


def my_recipe() -> TrainConfig:
    model = Pi05Config(vision=VISION_TINY_8, vlm=GEMMA_TINY, action_expert=GEMMA_TINY_EXPERT, vocab_size=1024,
                       action_dim=16, action_horizon=10, max_token_len=60)
    data = DataConfig(path={str(shared_datasets / "synthetic_lerobot_v30")!r}, cache="raw")
    return TrainConfig(robot=ROBOT, model=model, data=data)
""")
    return path
