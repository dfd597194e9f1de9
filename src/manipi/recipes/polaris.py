"""The PolaRiS baselines: joint positions on DROID, and one part in ten simulated demonstrations."""

from dataclasses import replace

from manipi.model.config import ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.recipes import openpi
from manipi.recipes.droid import DROID
from manipi.robots.droid import droid
from manipi.train.config import DatasetConfig, TrainConfig

SIMULATED = DatasetConfig(
    path="polaris_droid_cotrain_dataset/1.0.0",
    weight=0.1,
    keep="gs://openpi-assets/droid/polaris_droid_cotrain_dataset_sample_ranges_v1_0_0.json",
    fields="droid_joint_position",
)


def pi05_droid_jointpos_polaris() -> TrainConfig:
    return _cotrain("pi05_droid_jointpos_polaris", Pi05Config(action_horizon=15))


def pi0_fast_droid_jointpos_polaris() -> TrainConfig:
    model = Pi0FastConfig(action_dim=8, action_horizon=10, max_token_len=180, cameras=openpi.FAST_CAMERAS)
    return _cotrain("pi0_fast_droid_jointpos_polaris", model)


def pi0_droid_jointpos_polaris() -> TrainConfig:
    return _cotrain("pi0_droid_jointpos_polaris", Pi0Config(action_horizon=10, max_token_len=100))


def pi0_droid_jointpos_100k_polaris() -> TrainConfig:
    """From weights of 100,000 steps."""
    return _cotrain("pi0_droid_jointpos_100k_polaris", Pi0Config(action_horizon=10, max_token_len=100))


def paligemma_binning_droid_jointpos() -> TrainConfig:
    """Made for serving; where its weights are, openpi does not say: name them with `--init`."""
    model = Pi0FastConfig(action_dim=8, action_horizon=15, max_token_len=600, cameras=openpi.FAST_CAMERAS)
    robot = droid(action_space="joint_position", wrist_slot="wrist")
    return openpi.config(robot, model, "", data=openpi.data(), action_tokenizer="binning")


def _cotrain(name: str, model: ModelConfig) -> TrainConfig:
    wrist_slot = "wrist" if isinstance(model, Pi0FastConfig) else "left_wrist"
    return openpi.config(
        droid(action_space="joint_position", wrist_slot=wrist_slot),
        model,
        f"{openpi.CHECKPOINTS}/polaris/{name}",
        data=openpi.data(stats=f"polaris/{name}/assets/droid", mixture=(replace(DROID, weight=0.9), SIMULATED)),
        optimizer=openpi.STEADY,
        steps=1_000,
        batch_size=128,
        keep_every=1_000,
    )
