"""The RoboArena baselines on DROID, trained from PaliGemma: four ways to spell actions, and flow matching."""

from typing import Any

from manipi.model.config import Pi0Config, Pi0FastConfig
from manipi.recipes import openpi
from manipi.robots.droid import droid
from manipi.train.config import TrainConfig


def paligemma_binning_droid() -> TrainConfig:
    return _tokens("paligemma_binning_droid", "binning", max_token_len=400)


def paligemma_fast_droid() -> TrainConfig:
    return _tokens("paligemma_fast_droid", openpi.FAST)


def paligemma_fast_specialist_droid() -> TrainConfig:
    """FAST, fitted to DROID alone."""
    return _tokens("paligemma_fast_specialist_droid", "hf://KarlP/fast_droid_specialist")


def paligemma_vq_droid() -> TrainConfig:
    """Codes of a learned quantiser (FSQ)."""
    return _tokens("paligemma_vq_droid", "gs://openpi-assets/tokenizers/droid_fsq_tokenizer")


def paligemma_diffusion_droid() -> TrainConfig:
    name = "roboarena/paligemma_diffusion_droid"
    model = Pi0Config(action_dim=8, action_horizon=10)
    return openpi.config(droid(), model, f"{openpi.CHECKPOINTS}/{name}", data=openpi.data(stats=f"{name}/assets/droid"))


def _tokens(name: str, action_tokenizer: str, **sizes: Any) -> TrainConfig:
    model = Pi0FastConfig(action_dim=8, action_horizon=15, cameras=openpi.FAST_CAMERAS, **sizes)
    data = openpi.data(stats=f"roboarena/{name}/assets/droid")
    init = f"{openpi.CHECKPOINTS}/roboarena/{name}"
    return openpi.config(droid(wrist_slot="wrist"), model, init, data=data, action_tokenizer=action_tokenizer)
