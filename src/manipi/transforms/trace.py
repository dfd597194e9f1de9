"""What the pipeline does to one sample, step by step, and where its tokens stand in the model's sequence."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from manipi.model.config import ModelConfig, Pi0Config, Pi0FastConfig
from manipi.transforms.pipeline import Pipeline
from manipi.types import Observation


@dataclass(frozen=True, kw_only=True)
class Value:
    """One entry of a sample."""

    dtype: str
    shape: tuple[int, ...] = ()
    min: float | None = None
    max: float | None = None
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A sample behind one step."""

    step: str
    values: Mapping[str, Value]
    changed: tuple[str, ...]
    """Keys that the step made or altered."""
    removed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TokenRun:
    """Consecutive tokens of the model's sequence."""

    part: str
    """`prefix` (cached while actions are sampled) or `suffix`."""
    name: str
    tokens: int


def trace(pipeline: Pipeline, observation: Observation) -> list[Stage]:
    """The sample before the first step and behind every step."""
    encoded, seen = pipeline.encode(observation)
    names = ["observation", *(type(step).__name__ for step in pipeline.steps)]
    stages, before = [], {}
    for name, sample in zip(names, [*seen, encoded], strict=True):
        changed = tuple(key for key in sample if key not in before or sample[key] is not before[key])
        removed = tuple(key for key in before if key not in sample)
        values = {key: _value(value) for key, value in sample.items()}
        stages.append(Stage(step=name, values=values, changed=changed, removed=removed))
        before = sample
    return stages


def _value(value: "np.ndarray | str") -> Value:
    if isinstance(value, str):
        return Value(dtype="text", text=value)
    low, high = (float(value.min()), float(value.max())) if value.size else (None, None)
    return Value(dtype=str(value.dtype), shape=value.shape, min=low, max=high)


def token_layout(model: ModelConfig) -> list[TokenRun]:
    """The model's sequence in training, in order."""
    return list(_spans(model))


def _spans(model: ModelConfig) -> Iterator[TokenRun]:
    for camera in model.cameras:
        yield TokenRun(part="prefix", name=camera, tokens=model.vision.num_tokens)
    if isinstance(model, Pi0FastConfig):
        yield TokenRun(part="prefix", name="prompt and action codes", tokens=model.max_token_len)
        return
    yield TokenRun(part="prefix", name="prompt", tokens=model.max_token_len)
    if isinstance(model, Pi0Config):
        yield TokenRun(part="suffix", name="state", tokens=1)
    yield TokenRun(part="suffix", name="actions", tokens=model.action_horizon)
