"""π0.5 whole: the reference's π0.5 recipes, whose language model also learns to write (docs/pi05.md).

    pi05_NAME_ki         flow and FAST codes, insulated from each other (Driess et al. 2025, arXiv 2505.23705)
    pi05_NAME_subtask    and each step's words, which it writes before it acts (arXiv 2504.16054, section IV)

One rule makes both of every recipe whose name begins with `pi05_`. The data of none of them names its steps: a recipe
of subtasks is for a dataset of one's own (`--data.path`), or for a copy that was annotated, as LeRobot's
lerobot-annotate does; training without any says so before its first step. RLDS sets name no steps, so that their
mixtures have no such recipe.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from manipi.model.config import Compat, JointConfig, Pi05Config
from manipi.recipes import openpi
from manipi.train.config import TrainConfig
from manipi.types import Say
from manipi.weights.released import ASSETS

LONGEST = 256
"""Tokens of the longest codes that are foreseen: 50 steps of 26 joints took 248 of the universal FAST tokenizer's."""


def _variant(base: Callable[[], TrainConfig], kind: Literal["ki", "subtask"]) -> Callable[[], TrainConfig]:
    def recipe() -> TrainConfig:
        config = base()
        assert isinstance(config.model, Pi05Config)
        spelled = config.robot.model_action_size * config.model.action_horizon + 2  # number by number, "|" and EOS
        joint = JointConfig(text_weight=float(kind == "subtask"), max_code_len=min(spelled, LONGEST))
        # Of the reference's quirks this one is in the prompts that the weights know; the others are of code that no
        # joint policy ran through, and would decode codes at places where training never put them.
        model = replace(config.model, joint=joint, compat=Compat(minus_one_state_bins=True))
        data = replace(config.data, language=(Say(learn_subtask=True),)) if kind == "subtask" else config.data
        return replace(config, model=model, data=data, action_tokenizer=ASSETS["fast_tokenizer"])

    recipe.__name__ = f"{base.__name__}_{kind}"
    return recipe


_BASES = [one for name, one in vars(openpi).items() if name.startswith("pi05_")]
_MADE = [_variant(one, "ki") for one in _BASES]
_MADE += [_variant(one, "subtask") for one in _BASES if not one().data.mixture]
globals().update({recipe.__name__: recipe for recipe in _MADE})
