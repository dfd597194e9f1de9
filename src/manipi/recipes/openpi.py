"""What the recipes around openpi's released weights have in common. It has no recipe itself."""

from dataclasses import replace
from typing import Any

from manipi.model.config import REFERENCE, Adapters, LoRA, ModelConfig, Pi0Config, Pi0FastConfig
from manipi.robots.robot import Robot
from manipi.train.config import DataConfig, OptimizerConfig, TrainConfig
from manipi.weights.released import ASSETS, CHECKPOINTS

TOKENIZER, FAST = ASSETS["paligemma_tokenizer"], ASSETS["fast_tokenizer"]
FAST_CAMERAS = ("base", "base_1", "wrist")
"""Slots of π0-FAST on DROID."""

VLM_ADAPTERS = Adapters(attention=LoRA(rank=16, alpha=16), feed_forward=LoRA(rank=16, alpha=16))
ACTION_ADAPTERS = Adapters(attention=LoRA(rank=32, alpha=32), feed_forward=LoRA(rank=32, alpha=32))
STEADY = OptimizerConfig(lr=5e-5, final_lr=5e-5, decay_steps=1_000_000)
"""After the warm-up the rate stays as it is."""


def config(robot: Robot, model: ModelConfig, init: str, **settings: Any) -> TrainConfig:
    """A run that goes on from released weights as openpi would, quirks included; `settings` are TrainConfig's own.

    A plain π0 was trained on z-scores, everything else on quantiles.
    """
    ours: dict[str, Any] = {"tokenizer": TOKENIZER, "log_every": 100, "keep_every": 5_000}
    ours["norm_mode"] = "zscore" if isinstance(model, Pi0Config) else "quantile"
    if isinstance(model, Pi0FastConfig):
        ours["action_tokenizer"] = FAST
    return TrainConfig(robot=robot, model=replace(model, compat=REFERENCE), init=init, **ours | settings)


def data(path: str = "", *, stats: str = "", **settings: Any) -> DataConfig:
    """openpi trains on every episode. `stats` is a checkpoint and an asset id: `pi05_base/assets/trossen`."""
    return DataConfig(path=path, norm_stats=stats and f"{CHECKPOINTS}/{stats}", holdout=0.0, num_workers=2, **settings)
