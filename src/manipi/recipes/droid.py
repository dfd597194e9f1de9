"""DROID: released weights and fine-tuning; the baselines of RoboArena and PolaRiS."""

from dataclasses import replace
from typing import Any, Literal

from manipi.model.config import ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.recipes import openpi
from manipi.robots.franka import droid
from manipi.train.config import DatasetConfig, TrainConfig

KEEP_RANGES = "gs://openpi-assets/droid/droid_sample_ranges_v1_0_1.json"
"""Steps of DROID's episodes in which the arm does not idle."""
DROID = DatasetConfig(path="droid/1.0.1", keep=KEEP_RANGES, fields="droid_joint_position")
SIMULATED = DatasetConfig(
    path="polaris_droid_cotrain_dataset/1.0.0",
    weight=0.1,
    keep="gs://openpi-assets/droid/polaris_droid_cotrain_dataset_sample_ranges_v1_0_0.json",
    fields="droid_joint_position",
)
FULL: dict[str, Any] = {"optimizer": openpi.STEADY, "steps": 100_000, "batch_size": 256, "save_every": 5_000}


def _droid(
    model: ModelConfig,
    init: str,
    action_space: Literal["joint_position", "joint_velocity"] = "joint_velocity",
    *,
    stats: str = "",
    mixture: tuple[DatasetConfig, ...] = (),
    **settings: Any,
) -> TrainConfig:
    """π0-FAST calls the wrist camera's slot `wrist`."""
    slot = "wrist" if isinstance(model, Pi0FastConfig) else "left_wrist"
    data = openpi.data(stats=stats and f"{stats}/assets/droid", mixture=mixture)
    return openpi.config(droid(action_space=action_space, wrist_slot=slot), model, init, data=data, **settings)


def _fast(action_horizon: int, max_token_len: int = 250) -> Pi0FastConfig:
    cameras = ("base", "base_1", "wrist")
    return Pi0FastConfig(action_dim=8, action_horizon=action_horizon, max_token_len=max_token_len, cameras=cameras)


# The released weights, and fine-tuning --------------------------------------------------------------------------------


def pi0_droid() -> TrainConfig:
    return _droid(Pi0Config(action_horizon=10), "pi0_droid", stats="pi0_droid")


def pi0_fast_droid() -> TrainConfig:
    return _droid(_fast(10), "pi0_fast_droid", stats="pi0_fast_droid")


def pi05_droid() -> TrainConfig:
    return _droid(Pi05Config(action_horizon=15), "pi05_droid", stats="pi05_droid")


def pi0_fast_full_droid_finetune() -> TrainConfig:
    """Joint positions, with statistics of its own."""
    return _droid(_fast(16, 180), "pi0_fast_base", "joint_position", mixture=(DROID,), keep_every=20_000, **FULL)


def pi05_full_droid_finetune() -> TrainConfig:
    """Joint positions, in the scale of the base model's DROID."""
    settings = {"stats": "pi05_base", "mixture": (DROID,), "keep_every": 10_000}
    return _droid(Pi05Config(action_horizon=16), "pi05_base", "joint_position", **settings, **FULL)


def pi05_droid_finetune() -> TrainConfig:
    """Joint velocities of a smaller dataset of one's own (`--data.path`), in the scale of π0.5-DROID."""
    return _droid(Pi05Config(action_horizon=16), "pi05_droid", stats="pi05_droid", steps=20_000)


# The RoboArena baselines, trained from PaliGemma: four ways to spell actions, and flow matching -----------------------


def _roboarena(name: str, model: ModelConfig, **settings: Any) -> TrainConfig:
    return _droid(model, f"{openpi.CHECKPOINTS}/roboarena/{name}", stats=f"roboarena/{name}", **settings)


def paligemma_binning_droid() -> TrainConfig:
    return _roboarena("paligemma_binning_droid", _fast(15, 400), action_tokenizer="binning")


def paligemma_fast_droid() -> TrainConfig:
    return _roboarena("paligemma_fast_droid", _fast(15))


def paligemma_fast_specialist_droid() -> TrainConfig:
    """FAST, fitted to DROID alone."""
    tokenizer = "hf://KarlP/fast_droid_specialist"
    return _roboarena("paligemma_fast_specialist_droid", _fast(15), action_tokenizer=tokenizer)


def paligemma_vq_droid() -> TrainConfig:
    """Codes of a learned quantiser (FSQ)."""
    tokenizer = "gs://openpi-assets/tokenizers/droid_fsq_tokenizer"
    return _roboarena("paligemma_vq_droid", _fast(15), action_tokenizer=tokenizer)


def paligemma_diffusion_droid() -> TrainConfig:
    return _roboarena("paligemma_diffusion_droid", Pi0Config(action_dim=8, action_horizon=10))


# The PolaRiS baselines: joint positions on DROID, and one part in ten simulated demonstrations ------------------------


def _polaris(name: str, model: ModelConfig) -> TrainConfig:
    settings = {"mixture": (replace(DROID, weight=0.9), SIMULATED), "optimizer": openpi.STEADY, "steps": 1_000}
    settings |= {"stats": f"polaris/{name}", "batch_size": 128, "keep_every": 1_000}
    return _droid(model, f"{openpi.CHECKPOINTS}/polaris/{name}", "joint_position", **settings)


def pi05_droid_jointpos_polaris() -> TrainConfig:
    return _polaris("pi05_droid_jointpos_polaris", Pi05Config(action_horizon=15))


def pi0_fast_droid_jointpos_polaris() -> TrainConfig:
    return _polaris("pi0_fast_droid_jointpos_polaris", _fast(10, 180))


def pi0_droid_jointpos_polaris() -> TrainConfig:
    return _polaris("pi0_droid_jointpos_polaris", Pi0Config(action_horizon=10, max_token_len=100))


def pi0_droid_jointpos_100k_polaris() -> TrainConfig:
    """From weights of 100,000 steps."""
    return _polaris("pi0_droid_jointpos_100k_polaris", Pi0Config(action_horizon=10, max_token_len=100))


def paligemma_binning_droid_jointpos() -> TrainConfig:
    """Made for serving; where its weights are, openpi does not say: name them with `--init`."""
    return _droid(_fast(15, 600), "", "joint_position", action_tokenizer="binning")
