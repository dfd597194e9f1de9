"""MetaWorld's Sawyer arm, and tiny policies that learn its tasks on a processor.

manipi demonstrate metaworld/four runs/metaworld/dataset --robot simulators/metaworld/recipe.py:METAWORLD
manipi train simulators/metaworld/recipe.py:pi05_metaworld
"""

from dataclasses import replace

from manipi.model.config import Pi0Config, Pi0FastConfig, Pi05Config
from manipi.robots.robot import Gripper, Joints, Robot, State
from manipi.tabletop.recipes import CODES, EXPERT, SIZES, VISION, pi05_tabletop
from manipi.train.config import DataConfig, TrainConfig

METAWORLD = Robot(
    name="metaworld",
    cameras={"base": "image"},
    state=(State("state", 4, names=("x", "y", "z", "gripper")),),
    # Motions of the tool, not poses, so there is nothing relative about them.
    actions=(
        Joints(3, unit="", low=(-1.0,) * 3, high=(1.0,) * 3),
        Gripper(open=-1.0, closed=1.0, low=(-1.0,), high=(1.0,)),
    ),
    control_hz=80.0,
)

_SIZES = SIZES | {"vision": replace(VISION, image_size=96, patch_size=12), "action_horizon": 16, "max_token_len": 24}
"""The tabletop's networks; chunks of 0.2 s. Its longest instruction, with the state, is 22 tokens."""

STEPS = 12_000
"""Half an hour on two cores: with the recording, well within an hour."""


def pi05_metaworld() -> TrainConfig:
    """π0.5: the state is text, the timestep modulates the expert."""
    base = pi05_tabletop()
    return replace(
        base,
        robot=METAWORLD,
        data=DataConfig(path="runs/metaworld/dataset", cache="raw", cache_fill="ahead", num_workers=0, holdout=0.02),
        model=Pi05Config(action_expert=EXPERT, **_SIZES),
        optimizer=replace(base.optimizer, decay_steps=STEPS),
        steps=STEPS,
    )


def pi0_metaworld() -> TrainConfig:
    """π0: the state is one continuous token, and normalisation is by z-score."""
    return replace(pi05_metaworld(), model=Pi0Config(action_expert=EXPERT, **_SIZES), norm_mode="zscore")


def pi0_fast_metaworld() -> TrainConfig:
    """π0-FAST: actions are tokens, fixed codes fitted to the demonstrations."""
    sizes = _SIZES | {"vocab_size": CODES.end_id, "max_token_len": 96}
    return replace(pi05_metaworld(), model=Pi0FastConfig(**sizes, codes=CODES), action_tokenizer="dct")
