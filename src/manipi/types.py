"""The values that packages hand to each other: frozen, typed, numpy, no torch.

Shape letters: H action horizon, A action dimensions, S state dimensions; h, w picture height and width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float32

Observation: TypeAlias = Mapping[str, "np.ndarray | str | Mapping[str, Any]"]
"""What a robot sends: pictures, state vectors, a `prompt`; keys are the robot's own, flat (`a/b`) or nested."""

Sample: TypeAlias = dict[str, np.ndarray]
"""One example inside the transform pipeline (the keys are listed in `manipi.transforms.pipeline`)."""


@dataclass(frozen=True)
class Frame:
    """One time step of an episode with the action chunk that starts there, in the dataset's own keys."""

    observation: Mapping[str, np.ndarray]
    """Pictures uint8 [h, w, 3] and float32 vectors, by feature name."""
    actions: Float32[np.ndarray, "H A"]
    """Steps beyond the end of the episode repeat the last action and are not valid."""
    action_valid: Bool[np.ndarray, "H"]
    prompt: str
    episode: int
    index: int
    """Frame number within the episode."""
    subtask: str = ""
    """What the policy learns to write after the prompt, and acts upon; empty: nothing."""
    answer: str = ""
    """What it learns to write after a `prompt` that asks about the pictures, without actions; empty: no question."""
    past: tuple[Mapping[str, np.ndarray] | None, ...] = ()
    """Observations of so many steps before, the oldest first; None: before the episode's start."""


@dataclass(frozen=True)
class Said:
    """A text about an episode, as LeRobot's language columns have it."""

    role: str
    """Who says it: user, assistant …"""
    content: str | None
    style: str | None
    """subtask, plan, memory: it holds until the next of its style; vqa, interjection …: it belongs to one frame."""
    timestamp: float | None = None
    """When it begins to hold, in seconds of the episode; None: it belongs to one frame."""
    camera: str | None = None
    """The feature that it is about."""
    tool_calls: tuple[str, ...] | None = None
    """As JSON."""


@dataclass(frozen=True, kw_only=True)
class Say:
    """One choice of a language plan: what the policy is told at a frame, and what it learns to write."""

    weight: float = 1.0
    """Its share of the samples, relative to the plan's other weights."""
    instruct: Literal["task", "subtask"] = "task"
    """What the prompt is: the instruction of the episode, or of the step."""
    learn_subtask: bool = False
    """Learn to write the step's subtask behind the prompt, where it has one."""


@dataclass(frozen=True)
class FieldStats:
    """Statistics of one vector, each float64 [dim]."""

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    min: np.ndarray
    max: np.ndarray

    def __post_init__(self) -> None:
        for name in ("mean", "std", "q01", "q99", "min", "max"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))


@dataclass(frozen=True, kw_only=True)
class NormStats:
    """What normalisation needs, and where it came from."""

    state: FieldStats
    """As the model sees it: with the signs and linkages of the robot's groups undone."""
    actions: FieldStats
    """Of the action chunks as the model sees them: relative, 6D rotations, gripper 0 to 1."""
    num_frames: int
    """0 where the statistics were imported."""
    contract: str
    """Fingerprint of the robot's state and action layout and of the action horizon."""
    data: str
    """Fingerprint of the dataset; empty where the statistics were imported."""
    rows: str = ""
    """Fingerprint of the rows that count: split, mask, chosen episodes; empty where it is not known."""
