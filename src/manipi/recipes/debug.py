"""Ten steps of small Gemmas behind the full image encoder, on what `manipi demo` records: is everything in place?"""

from dataclasses import replace

from manipi.model.config import GemmaSize, ModelConfig, Pi0Config, Pi05Config
from manipi.robots.tabletop import TABLETOP
from manipi.train.config import DataConfig, TrainConfig

DUMMY = GemmaSize(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16)


def debug() -> TrainConfig:
    return replace(_debug(Pi0Config(vlm=DUMMY, action_expert=DUMMY)), norm_mode="zscore", save_every=100)


def debug_restore() -> TrainConfig:
    """From where `debug` ended."""
    return replace(debug(), init="runs/debug/checkpoints/10", save_every=1_000)


def debug_pi05() -> TrainConfig:
    return _debug(Pi05Config(vlm=DUMMY, action_expert=DUMMY))


def _debug(model: ModelConfig) -> TrainConfig:
    data = DataConfig(path="runs/demo/dataset", holdout=0.0, num_workers=2)
    return TrainConfig(robot=TABLETOP, data=data, model=model, steps=10, batch_size=2, log_every=100, keep_every=5_000)
