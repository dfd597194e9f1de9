"""Models of more layers than the one that those of most tests have."""

from dataclasses import replace

from manipi.train.config import TrainConfig


def with_layers(config: TrainConfig, depth: int) -> TrainConfig:
    """So many in each expert."""
    experts = [name for name in ("vlm", "action_expert") if hasattr(config.model, name)]
    sizes = {name: replace(getattr(config.model, name), depth=depth) for name in experts}
    return replace(config, model=replace(config.model, **sizes))
