"""DROID: the released weights, fine-tuning on all of DROID, and on a dataset of one's own."""

from typing import Any

from manipi.model.config import Pi0Config, Pi0FastConfig, Pi05Config
from manipi.recipes import openpi
from manipi.robots.droid import droid
from manipi.train.config import DatasetConfig, TrainConfig

KEEP_RANGES = "gs://openpi-assets/droid/droid_sample_ranges_v1_0_1.json"
"""Steps of DROID's episodes in which the arm does not idle."""
DROID = DatasetConfig(path="droid/1.0.1", keep=KEEP_RANGES, fields="droid_joint_position")


def pi0_droid() -> TrainConfig:
    data = openpi.data(stats="pi0_droid/assets/droid")
    return openpi.config(droid(), Pi0Config(action_horizon=10), "pi0_droid", data=data)


def pi0_fast_droid() -> TrainConfig:
    model = Pi0FastConfig(action_dim=8, action_horizon=10, cameras=openpi.FAST_CAMERAS)
    data = openpi.data(stats="pi0_fast_droid/assets/droid")
    return openpi.config(droid(wrist_slot="wrist"), model, "pi0_fast_droid", data=data)


def pi05_droid() -> TrainConfig:
    data = openpi.data(stats="pi05_droid/assets/droid")
    return openpi.config(droid(), Pi05Config(action_horizon=15), "pi05_droid", data=data)


def pi0_fast_full_droid_finetune() -> TrainConfig:
    """Joint positions, with statistics of its own."""
    model = Pi0FastConfig(action_dim=8, action_horizon=16, max_token_len=180, cameras=openpi.FAST_CAMERAS)
    robot = droid(action_space="joint_position", wrist_slot="wrist")
    data = openpi.data(mixture=(DROID,))
    return openpi.config(robot, model, "pi0_fast_base", data=data, keep_every=20_000, **_full())


def pi05_full_droid_finetune() -> TrainConfig:
    """Joint positions, in the scale of the base model's DROID."""
    robot = droid(action_space="joint_position")
    data = openpi.data(stats="pi05_base/assets/droid", mixture=(DROID,))
    return openpi.config(robot, Pi05Config(action_horizon=16), "pi05_base", data=data, keep_every=10_000, **_full())


def pi05_droid_finetune() -> TrainConfig:
    """Joint velocities of a smaller dataset of one's own (`--data.path`), in the scale of π0.5-DROID."""
    data = openpi.data(stats="pi05_droid/assets/droid")
    return openpi.config(droid(), Pi05Config(action_horizon=16), "pi05_droid", data=data, steps=20_000)


def _full() -> dict[str, Any]:
    return {"optimizer": openpi.STEADY, "steps": 100_000, "batch_size": 256, "save_every": 5_000}
