"""Puts the questions of a recorded run to another policy, and compares the answers number by number.

    recording   observation, what was left of the previous chunk, delay, seed of the noise ──► chunk
                     │                                                                           │
    target           └─────────────► the same question, the same noise ──► chunk ── difference ──┘

Noise has the recorded seed, so that a policy differs from itself by its pictures' colours and by rounding alone, and
the difference to another checkpoint, precision or server is theirs. openpi's server draws noise as it likes.

Shape letters: n questions, H action horizon, A dimensions of the robot's command.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int64
from tqdm import tqdm

from manipi.data.action_error import evenly_spaced
from manipi.data.dataset import Dataset, command_names
from manipi.data.lerobot.language import PERSISTENT
from manipi.data.norm_stats import NEAR_CONSTANT
from manipi.data.recorder import ANSWER_MS, ASKED, CHUNK, DELAYED, DESCRIPTION, LEFT, NUM_LEFT, SEEDED
from manipi.errors import ConfigError, MissingFeatureError
from manipi.records import read_object
from manipi.robots.robot import Robot
from manipi_client.keys import DELAY, PREVIOUS, SEED, SUBTASK

_BLOCK = 32


class Answering(Protocol):
    """What can be asked: a `manipi.policy.Policy`, or a `manipi_client.WebsocketPolicy`."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def infer(self, observation: Mapping[str, Any]) -> Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Replay:
    """How far the answers are from the recorded ones."""

    questions: int
    steps: int
    """Of each chunk that were compared: the shorter horizon."""
    dimensions: tuple[str, ...]
    travel: Float[np.ndarray, "A"]
    """Largest less smallest recorded command; 0 where a dimension is constant."""
    mean: Float[np.ndarray, "A"]
    """Mean absolute difference, in the robot's own units."""
    largest: Float[np.ndarray, "A"]
    share: Float[np.ndarray, "A"]
    """The largest difference as a share of the travel; in the robot's own units where there is none."""
    recorded_ms: float
    """Median time to the answer, then."""
    said: tuple[str, ...]
    """What the target could not be asked."""

    @property
    def worst(self) -> float:
        return float(self.share.max())


def recorded_robot(dataset: Dataset) -> Robot:
    """The robot of a recording. Raises MissingFeatureError where the dataset is none."""
    if ASKED not in dataset.features:
        raise MissingFeatureError(
            expected=f"a recording with questions and answers ({ASKED})",
            found=f"features {', '.join(dataset.features)}",
            where=str(dataset.root),
            next="record with manipi.data.recorder.Recorder and its `watch`; for demonstrations use manipi eval",
        )
    return Robot.from_json(read_object(dataset.root / DESCRIPTION).get("robot"), DESCRIPTION)


def replay(dataset: Dataset, target: Answering, *, max_questions: int = 256, show: bool = True) -> Replay:
    """Ask `target` what was asked, evenly spaced over the recording.

    Raises:
        MissingFeatureError: the dataset is no recording, or nothing was asked in it.
        ConfigError: the target is for another robot.
    """
    robot, told = recorded_robot(dataset), target.metadata.get("robot")
    if isinstance(told, Mapping) and Robot.from_json(dict(told), "metadata").contract() != robot.contract():
        raise ConfigError(
            expected=f"a policy for the recorded robot {robot.name!r}, with its state and actions",
            found=f"one for {told.get('name')!r}",
            where="the target of the replay",
            next="choose a checkpoint of that robot (manipi serve --robot NAME for one of several)",
        )
    rows = evenly_spaced(np.flatnonzero(dataset.column(ASKED)[:, 0]), max_questions)
    recorded = dataset.column(CHUNK)[rows].reshape(len(rows), -1, robot.action_size)
    goes_on, answers = bool(target.metadata.get("real_time")), []
    holds = PERSISTENT in dataset.features and any(dataset.said(e)[0] for e in range(len(dataset.episodes)))
    follows = holds and bool(target.metadata.get("writes_text"))
    questions = _questions(dataset, robot, rows, goes_on, follows)
    for observation in tqdm(questions, "replay", len(rows), disable=not show):
        answers.append(np.asarray(target.infer(observation)["actions"]))
    steps = min(recorded.shape[1], len(answers[0]))
    difference = np.abs(np.stack(answers)[:, :steps].astype(np.float64) - recorded[:, :steps])
    travel = np.ptp(recorded[:, :steps].astype(np.float64), axis=(0, 1))
    travel = np.where(travel < NEAR_CONSTANT, 0.0, travel)
    largest = difference.max(axis=(0, 1))
    had_previous = bool((dataset.column(NUM_LEFT)[rows] > 0).any())
    said = ("it does not go on from a previous chunk, which was left out",) if had_previous and not goes_on else ()
    said += ("it follows no subtask, which was left out",) if holds and not follows else ()
    return Replay(
        questions=len(rows),
        steps=steps,
        dimensions=command_names(robot, dataset),
        travel=travel,
        mean=difference.mean(axis=(0, 1)),
        largest=largest,
        share=largest / np.where(travel > 0, travel, 1.0),
        recorded_ms=float(np.median(dataset.column(ANSWER_MS)[rows])),
        said=said,
    )


def _questions(
    dataset: Dataset, robot: Robot, rows: Int64[np.ndarray, "n"], goes_on: bool, follows: bool
) -> Iterator[dict[str, Any]]:
    """What was sent at these frames, in the robot's keys; where it `follows` subtasks, with the one that held there."""
    kept = [*robot.cameras.values(), *(s.key for s in robot.state)]
    keys = {key: robot.dataset_key(key) for key in kept if robot.dataset_key(key) in dataset.features}
    left, num_left, delay, seed = (dataset.column(key) for key in (LEFT, NUM_LEFT, DELAYED, SEEDED))
    subtasks, which = dataset.texts("subtask") if follows else ([], np.full(dataset.num_frames, -1))
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        pictures = {name: dataset.images(name, block) for name in keys.values() if name in dataset.cameras}
        for i, row in enumerate(block.tolist()):
            seen = {k: pictures[n][i] if n in pictures else dataset.column(n)[row] for k, n in keys.items()}
            question = {**seen, "prompt": dataset.prompt(row), SEED: int(seed[row, 0])}
            question |= {SUBTASK: subtasks[which[row]]} if which[row] >= 0 else {}
            if goes_on and (count := int(num_left[row, 0])):
                question |= {PREVIOUS: left[row].reshape(-1, robot.action_size)[:count], DELAY: int(delay[row, 0])}
            yield question
