"""What recipes around openpi's released weights share, and openpi's debug recipes."""

from dataclasses import replace
from typing import Any

from manipi.model.config import REFERENCE, Adapters, GemmaSize, LoRA, ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.robots.robot import Robot
from manipi.robots.tabletop import TABLETOP
from manipi.train.config import DataConfig, OptimizerConfig, TrainConfig
from manipi.weights.released import ASSETS, CHECKPOINTS

TOKENIZER, FAST = ASSETS["paligemma_tokenizer"], ASSETS["fast_tokenizer"]
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


# Is everything in place? ---------------------------------------------------------------------------------------------

DUMMY = GemmaSize(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16)


def debug() -> TrainConfig:
    """Ten steps of small Gemmas behind the full image encoder, on what `manipi demo` records: is all in place?"""
    return replace(_debug(Pi0Config(vlm=DUMMY, action_expert=DUMMY)), norm_mode="zscore", save_every=100)


def debug_restore() -> TrainConfig:
    """From where `debug` ended."""
    return replace(debug(), init="runs/debug/checkpoints/10", save_every=1_000)


def debug_pi05() -> TrainConfig:
    return _debug(Pi05Config(vlm=DUMMY, action_expert=DUMMY))


def _debug(model: ModelConfig) -> TrainConfig:
    data = DataConfig(path="runs/demo/dataset", holdout=0.0, num_workers=2)
    return TrainConfig(robot=TABLETOP, data=data, model=model, steps=10, batch_size=2, log_every=100, keep_every=5_000)
