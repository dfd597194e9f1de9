"""A dataset as one robot's pipeline reads it: rows in, encoded samples out. What a loader's workers run."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from manipi.data.dataset import Dataset, PromptSource, frames
from manipi.robots.robot import Robot
from manipi.transforms.pipeline import Pipeline
from manipi.types import Frame, Sample


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything between a dataset's files and the samples of a batch."""

    dataset: Dataset
    pipeline: Pipeline
    action_horizon: int
    prompt: PromptSource = "task"

    def __post_init__(self) -> None:
        # Read once, here: what the workers would each read they then find in shared memory.
        frames_of(
            self.pipeline.robot, self.action_horizon, self.dataset, np.zeros(1, np.int64), self.prompt, pictures=False
        )

    def frames(self, rows: Int64[np.ndarray, " n"]) -> list[Frame]:
        """Raw frames in the dataset's keys, with action chunks of the model's horizon."""
        return frames_of(self.pipeline.robot, self.action_horizon, self.dataset, rows, self.prompt)

    def samples(self, rows: Int64[np.ndarray, " n"]) -> list[Sample]:
        """The rows as the model's training input."""
        return [self.pipeline.encode_frame(frame) for frame in self.frames(rows)]


def frames_of(
    robot: Robot,
    action_horizon: int,
    dataset: Dataset,
    rows: Int64[np.ndarray, " n"],
    prompt: PromptSource = "task",
    *,
    pictures: bool = True,
) -> list[Frame]:
    """The rows as frames with just the features that the robot names."""
    return frames(
        dataset,
        rows,
        cameras=[robot.dataset_key(key) for key in robot.cameras_in(dataset.features).values()] if pictures else [],
        state_keys=[robot.dataset_key(s.key) for s in robot.state],
        action_key=robot.dataset_key(robot.action_key),
        horizon=action_horizon,
        prompt=prompt,
    )
