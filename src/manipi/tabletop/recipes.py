"""The demo's recipes, tiny policies from scratch; and how large the demo is."""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from manipi.model.config import (
    FixedCodes,
    GemmaSize,
    HistoryConfig,
    JointConfig,
    Pi0Config,
    Pi0FastConfig,
    Pi05Config,
    VisionSize,
)
from manipi.robots.tabletop import TABLETOP
from manipi.train.config import AugmentConfig, ComputeConfig, DataConfig, OptimizerConfig, TrainConfig
from manipi.types import Say

ModelName: TypeAlias = Literal["pi05", "pi0", "pi0_fast"]
RECIPES: dict[ModelName, str] = {"pi05": "tabletop", "pi0": "tabletop_pi0", "pi0_fast": "tabletop_pi0_fast"}
"""The recipe of each policy, by its name on the command line."""

FIRST_TRAINING_SEED = 1_000_000
"""Scenes of demonstrations count from here, scenes of the evaluation from 0: no scene is in both."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """How large the demonstration is."""

    model: ModelName = "pi05"
    """Which of the three policies to train."""
    episodes: int = 8_000
    """Demonstrations of the scripted expert to record."""
    steps: int = 0
    """Training steps; 0 takes the recipe's."""
    trials: int = 200
    """Unseen scenes for each kind of evaluation."""
    execute_steps: int = 8
    """Steps of each action chunk that the arm executes before it asks again."""
    films: int = 24
    """How many trials of the trained policy the report shows, half of each outcome where there are as many."""


IMAGE_SIZE = 56
VISION = VisionSize(width=64, depth=1, mlp_dim=128, num_heads=2, patch_size=8, image_size=IMAGE_SIZE)
VLM = GemmaSize(width=64, depth=2, mlp_dim=128, num_heads=2, num_kv_heads=1, head_dim=32)
EXPERT = GemmaSize(width=48, depth=2, mlp_dim=96, num_heads=2, num_kv_heads=1, head_dim=32)
VOCABULARY = 1280
"""Enough for the byte tokenizer's ids and for action codes behind them."""
SIZES: dict[str, Any] = {
    "vision": VISION,
    "vlm": VLM,
    "vocab_size": VOCABULARY,
    "action_dim": 4,
    "action_horizon": 8,
    "max_token_len": 20,
    "cameras": ("base",),
}
"""What the three policies have in common."""
CODES = FixedCodes(first_id=1011, places=16, per_place=64, softness=3.0, hidden=0.75)
"""Of π0-FAST and of joint training, behind the byte tokenizer's text: up to 4 frequencies of 4 dimensions."""


def pi05_tabletop() -> TrainConfig:
    """π0.5: the state is text, the timestep modulates the expert."""
    return TrainConfig(
        robot=TABLETOP,
        data=DataConfig(path="runs/demo/dataset", cache="raw", cache_fill="ahead", num_workers=0, holdout=0.02),
        model=Pi05Config(action_expert=EXPERT, **SIZES),
        optimizer=OptimizerConfig(
            lr=2e-3, final_lr=4e-5, warmup_steps=100, decay_steps=4_000, weight_decay=1e-4, clip_norm=1.0
        ),
        compute=ComputeConfig(precision="fp32"),
        steps=4_000,
        batch_size=64,
        noise_draws=4,
        ema_decay=0.995,
        log_every=50,
        save_every=500,
        augment=AugmentConfig(enabled=False),  # colours are what the instructions name
    )


def pi0_tabletop() -> TrainConfig:
    """π0: the state is one continuous token, and normalisation is by z-score."""
    base = pi05_tabletop()
    return replace(base, model=Pi0Config(action_expert=EXPERT, **SIZES), norm_mode="zscore")


def memory_tabletop() -> TrainConfig:
    """π0.5 that remembers: with 8 commands of each chunk executed, pictures and states of its last three answers."""
    base = pi05_tabletop()
    return replace(base, model=replace(base.model, history=HistoryConfig(frames=4, stride=8)))


def pi0_fast_tabletop() -> TrainConfig:
    """π0-FAST: actions are tokens, fixed codes fitted to the demonstrations."""
    base = pi05_tabletop()
    sizes: dict[str, Any] = SIZES | {"vocab_size": CODES.end_id, "max_token_len": 56}
    optimizer = replace(base.optimizer, decay_steps=6_000)
    model = Pi0FastConfig(**sizes, codes=CODES)
    return replace(base, model=model, action_tokenizer="dct", steps=6_000, optimizer=optimizer)


def joint_tabletop() -> TrainConfig:
    """π0.5 whole: the language model learns by the fixed codes of π0-FAST, the action expert by the flow, insulated."""
    base = pi05_tabletop()
    sizes: dict[str, Any] = SIZES | {"vocab_size": CODES.end_id}
    joint = JointConfig(text_weight=0.0, codes=CODES, max_code_len=CODES.places + 2)
    optimizer = replace(base.optimizer, decay_steps=6_000)
    model = Pi05Config(action_expert=EXPERT, **sizes, joint=joint)
    return replace(base, model=model, action_tokenizer="dct", steps=6_000, optimizer=optimizer)


def subtask_tabletop() -> TrainConfig:
    """Instructions of two steps (`tabletop/two-step`): it learns to write the present one and to act on it, and in half
    of the samples to act without.

    The flow teaches the language model too. With `--model.joint.codes-weight 1 --model.joint.insulate True` codes do.
    """
    base = joint_tabletop()
    assert isinstance(base.model, Pi05Config)
    assert base.model.joint is not None
    joint = replace(base.model.joint, codes_weight=0.0, text_weight=1.0, insulate=False)
    data = replace(base.data, path="runs/two_step/dataset", language=(Say(), Say(learn_subtask=True)))
    return replace(base, model=replace(base.model, joint=joint, max_token_len=48), data=data)
