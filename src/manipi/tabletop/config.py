"""How large the demonstration is. No torch here."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

ModelName: TypeAlias = Literal["pi05", "pi0", "pi0_fast"]
RECIPES: dict[ModelName, str] = {"pi05": "tabletop", "pi0": "tabletop_pi0", "pi0_fast": "tabletop_pi0_fast"}

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
