"""Recipes of published policies with the tabletop's small networks: to try robot, server and simulator.

manipi init simulators/small.py:pi05_libero runs/small        random weights, in a second, without a download
"""

from dataclasses import replace

from manipi.recipes.registry import load_recipe
from manipi.tabletop.recipes import EXPERT, VISION, VLM, VOCABULARY
from manipi.train.config import TrainConfig


def _small(recipe: str) -> TrainConfig:
    """All of the recipe but its networks, and a text tokenizer that is no file."""
    config = load_recipe(recipe)
    sizes = {"vision": VISION, "vlm": VLM, "action_expert": EXPERT, "vocab_size": VOCABULARY}
    return replace(config, tokenizer="byte", model=replace(config.model, **sizes))  # type: ignore[arg-type]


def pi0_libero() -> TrainConfig:
    return _small("pi0_libero")


def pi05_libero() -> TrainConfig:
    return _small("pi05_libero")


def pi0_aloha_sim() -> TrainConfig:
    return _small("pi0_aloha_sim")
