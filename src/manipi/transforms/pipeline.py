"""From a robot's observation to the model's input, and from the model's output to the robot's commands.

`build` is the only place that orders the steps. Training, norm stats, serving, `inspect` and evaluation call it.

    observation ──► ReadRobot ──► ActionSpace ──► Normalize ──► ResizeImages ──► Tokenize ──► ModelLayout ──► model
    actions     ◄────────────────  absolute    ◄─ unscale    ◄──────────────────  FAST       ◄─ cut        ◄──┘

A step is one object with both directions. `decode` is given the very sample that its `encode` received, so that no
state hides between the two.

The keys of a sample on its way:
    image/<slot>  uint8 [h, w, 3]     state  float32 [S]     prompt  str
    actions       float32 [H, A]      action_valid  bool [H]                        (training only)
    subtask       str: text to write behind the prompt, on which the actions depend (training only, where there is one)
    answer        str: text to write behind a prompt that asks about the pictures, without actions    (likewise)
and at the end those of `manipi.model.ModelInput`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from manipi.errors import ConfigError, NormStatsError
from manipi.model.config import ModelConfig, NormMode, Pi0Config, Pi0FastConfig
from manipi.robots.robot import Robot
from manipi.tokenizers import Tokenizers
from manipi.transforms.actions import ActionSpace
from manipi.transforms.model_input import ModelLayout, ResizeImages, TokenizePrompt, tokenize_step
from manipi.transforms.normalize import Normalize, contract
from manipi.transforms.observation import ReadRobot
from manipi.types import Frame, NormStats, Observation, Sample
from manipi_client.keys import PAST


class Transform(Protocol):
    """One step, both directions."""

    def encode(self, sample: Sample) -> Sample:
        """Robot side -> model side. `actions` is absent at inference."""
        ...

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        """Model side -> robot side; `sample` is what this step's `encode` received."""
        ...


@dataclass(frozen=True)
class Pipeline:
    """The ordered steps."""

    robot: Robot
    steps: Sequence[Transform]
    past: tuple[int, ...] = ()
    """How many control steps ago the older observations are that the model remembers, the oldest first."""

    def encode(self, observation: Observation) -> tuple[Sample, list[Sample]]:
        """The model's input, and what each step saw (for `decode`).

        Older observations take the way of the present one, but for the prompt.
        """
        sample, seen = {key: value for key, value in observation.items() if key != PAST}, []
        for step in self.steps:
            seen.append(sample)
            sample = step.encode(sample)  # type: ignore[arg-type]
        if self.past:
            sample |= self._remembered(observation.get(PAST) or [None] * len(self.past), sample)  # type: ignore[arg-type]
        return sample, seen  # type: ignore[return-value]

    def _remembered(self, past: Sequence[Observation | None], present: Mapping[str, np.ndarray]) -> Sample:
        steps = [step for step in self.steps if not isinstance(step, TokenizePrompt)]
        images, states = np.zeros_like(present["images"]), np.zeros_like(present["state"])
        made = {
            "past_images": np.stack([images] * len(past)),
            "past_states": np.stack([states] * len(past)),
            "past_valid": np.array([one is not None for one in past]),
        }
        for number, one in enumerate(past):
            if one is not None:
                sample: Sample = {**ReadRobot(self.robot).read_part(one), "prompt": ""}  # type: ignore[dict-item]
                for step in steps:
                    sample = step.encode(sample)
                # One that lacks a camera of the present would show black there.
                made["past_valid"][number] = not (present["image_valid"] & ~sample["image_valid"]).any()
                made["past_images"][number], made["past_states"][number] = sample["images"], sample["state"]
        return made

    def decode(self, actions: np.ndarray, seen: Sequence[Sample]) -> np.ndarray:
        """The model's output (actions [..., H, A], or token ids for π0-FAST) -> commands [..., H, A] of the robot."""
        for step, sample in zip(reversed(self.steps), reversed(seen), strict=True):
            actions = step.decode(actions, sample)
        return actions

    def normalised(self, actions: np.ndarray, seen: Sequence[Sample]) -> np.ndarray:
        """The model's output -> actions [H, A] as the model learned them: `decode` up to what `Normalize` undoes."""
        first = next(i for i, step in enumerate(self.steps) if isinstance(step, Normalize)) + 1
        return Pipeline(self.robot, self.steps[first:]).decode(actions, seen[first:])

    def encode_frame(self, frame: Frame) -> Sample:
        """A dataset's frame -> the model's training input."""
        return self.encode(observation_of(frame, self.robot))[0]


def observation_of(frame: Frame, robot: Robot) -> Sample:
    """A frame in the dataset's keys -> the observation in the robot's keys, with its actions."""
    keys = [*robot.cameras_in(frame.observation).values(), *(s.key for s in robot.state)]
    rest = {"actions": frame.actions, "action_valid": frame.action_valid, "prompt": frame.prompt}
    learned = {key: text for key, text in (("subtask", frame.subtask), ("answer", frame.answer)) if text}

    def own(shown: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: shown[robot.dataset_key(key)] for key in keys}

    past = {PAST: [None if one is None else own(one) for one in frame.past]} if frame.past else {}
    return {**own(frame.observation), **rest, **learned, **past}  # type: ignore[dict-item]


def build(robot: Robot, model: ModelConfig, stats: NormStats, tokenizers: Tokenizers, norm_mode: NormMode) -> Pipeline:
    """Order the steps for one robot and one model.

    Raises:
        ConfigError: the robot does not fit the model.
        NormStatsError: the statistics are of another robot or action horizon.
    """
    check_fit(robot, model)
    check_stats(stats, robot, model.action_horizon)
    steps = (
        ReadRobot(robot),
        ActionSpace(robot),
        Normalize(stats, norm_mode),
        ResizeImages(model.vision.image_size),
        tokenize_step(model, tokenizers, robot.model_action_size),
        ModelLayout(model, robot.model_action_size),
    )
    return Pipeline(robot, steps, model.past_steps)


def robot_of_questions(robot: Robot, model: ModelConfig) -> Robot:
    """What stands for a robot where pictures are asked about: it is as `robot`, with the model's slots as cameras."""
    slots = {slot: f"picture/{slot}" for slot in model.cameras}
    return replace(robot, name="questions", cameras=slots, optional=tuple(slots), dataset_keys={}, ignored=())


def build_questions(robot: Robot, model: ModelConfig, tokenizers: Tokenizers) -> Pipeline:
    """The steps for questions about pictures, in a run of `robot`.

    State and actions are zeros, with which nothing was measured, and are not normalised. Raises as `build` does.
    """
    asked, size = robot_of_questions(robot, model), robot.model_action_size
    steps = (
        ReadRobot(asked),
        ResizeImages(model.vision.image_size),
        tokenize_step(model, tokenizers, size),
        ModelLayout(model, size),
    )
    return Pipeline(asked, steps, model.past_steps)


def check_fit(robot: Robot, model: ModelConfig) -> None:
    """The robot's dimensions and camera slots fit the model's."""
    strange = sorted(set(robot.cameras) - set(model.cameras))
    # π0 alone reads the state as a vector; to the others it is words, however many, or nothing.
    size = max(robot.model_action_size, robot.state_size if isinstance(model, Pi0Config) else 0)
    if strange or size > model.action_dim:
        raise ConfigError(
            expected=f"cameras among {', '.join(model.cameras)}; at most {model.action_dim} dimensions",
            found=f"cameras {', '.join(sorted(robot.cameras))}; {size} dimensions",
            where=f"robot {robot.name!r} with {type(model).__name__}",
            next="raise the model's action_dim, or name its cameras as the robot does",
        )


def check_stats(stats: NormStats, robot: Robot, action_horizon: int) -> None:
    """The statistics were computed for this robot's layout and horizon."""
    sizes = (stats.state.mean.size, stats.actions.mean.size)
    if stats.contract != contract(robot, action_horizon) or sizes != (robot.state_size, robot.model_action_size):
        raise NormStatsError(
            expected=f"statistics of robot {robot.name!r}, {robot.state_size} state and {robot.model_action_size} "
            f"action dimensions, horizon {action_horizon} ({contract(robot, action_horizon)[:12]})",
            found=f"statistics of {sizes[0]} state and {sizes[1]} action dimensions ({stats.contract[:12]})",
            where="norm stats",
            next="compute them again: manipi stats TARGET",
        )


# What it does to one sample, step by step ----------------------------------------------------------------------------


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
    fast = isinstance(model, Pi0FastConfig)
    prefix = dict.fromkeys(model.cameras, model.vision.num_tokens)
    prefix["prompt and action codes" if fast else "prompt"] = model.max_token_len
    suffix = {"state": 1} if isinstance(model, Pi0Config) else {}
    if not fast:
        suffix["actions"] = model.action_horizon
    parts = {"prefix": prefix, "suffix": suffix}
    return [TokenRun(part=part, name=name, tokens=n) for part, runs in parts.items() for name, n in runs.items()]
