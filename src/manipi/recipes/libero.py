"""LIBERO: fine-tuning of each base model, whole or by low-rank adapters."""

from dataclasses import replace
from typing import Any

from manipi.model.config import ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.recipes import openpi
from manipi.robots.franka import libero
from manipi.train.config import TrainConfig

FAST = Pi0FastConfig(action_dim=7, action_horizon=10, max_token_len=180)
LOW_MEMORY = {"ema_decay": 0.0, "trained": "lora", "frozen_dtype": "bfloat16"}


def pi0_libero() -> TrainConfig:
    """With the commands relative once more, as the released weights had it; see `manipi.robots.franka`."""
    return _libero(Pi0Config(), "pi0_base")


def pi0_libero_low_mem_finetune() -> TrainConfig:
    model = Pi0Config(vlm_adapters=openpi.VLM_ADAPTERS, action_adapters=openpi.ACTION_ADAPTERS)
    return _libero(model, "pi0_base", **LOW_MEMORY)


def pi0_fast_libero() -> TrainConfig:
    return _libero(FAST, "pi0_fast_base")


def pi0_fast_libero_low_mem_finetune() -> TrainConfig:
    return _libero(replace(FAST, vlm_adapters=openpi.VLM_ADAPTERS), "pi0_fast_base", **LOW_MEMORY)


def pi05_libero() -> TrainConfig:
    """The policy never sees its state: the prompt does not spell it out, and π0.5 has no other place for it."""
    model = Pi05Config(action_horizon=10, state_in_prompt=False)
    optimizer = replace(openpi.STEADY, warmup_steps=10_000)
    return _libero(model, "pi05_base", relative=False, optimizer=optimizer, batch_size=256, ema_decay=0.999)


def _libero(model: ModelConfig, weights: str, *, relative: bool = True, **settings: Any) -> TrainConfig:
    data = openpi.data("hf://datasets/physical-intelligence/libero")
    return openpi.config(libero(relative=relative), model, weights, data=data, **settings)
