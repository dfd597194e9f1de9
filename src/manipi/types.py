"""The values that packages hand to each other: frozen, typed, numpy, no torch.

Shape letters: H action horizon, A action dimensions, S state dimensions; h, w picture height and width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

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
