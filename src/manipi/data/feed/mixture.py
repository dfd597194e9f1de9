"""Rows in, encoded samples out: of one dataset, or of several and several robots in one stream.

part         dataset      robot   rows of the mixture
0   weight 3 open50       g1      0 ……………… 20,813        each part's rows, moved behind those of the part before
1   weight 1 transfer     aloha   20,814 …… 21,613        every part has its robot's own pipeline and statistics

Weights need not sum to one: a part's share of the samples is its weight over their sum.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from manipi.data.dataset import Dataset, PromptSource, frames
from manipi.data.feed.sampler import MixedStream, PlannedStream, Stream, deal
from manipi.data.questions import Questions
from manipi.robots.robot import Robot
from manipi.transforms.pipeline import Pipeline
from manipi.types import Frame, Sample, Say


@dataclass(frozen=True, kw_only=True)
class EncodedDataset:
    """Everything between a dataset's files and the samples of a batch."""

    dataset: Dataset
    pipeline: Pipeline
    action_horizon: int
    plan: tuple[Say, ...] = (Say(),)
    """What may be told and learned at a frame. Row r under choice k is row k · num_frames + r here: all rows of the
    dataset follow each other once for each choice."""

    def __post_init__(self) -> None:
        # Read once, here: what the workers would each read they then find in shared memory.
        frames_of(self.pipeline.robot, self.action_horizon, self.dataset, np.zeros(1, np.int64), pictures=False)
        if any(say.learn_subtask or say.instruct == "subtask" for say in self.plan):
            self.dataset.texts("subtask")

    def frames(self, rows: Int64[np.ndarray, " n"]) -> list[Frame]:
        """Raw frames in the dataset's keys, with action chunks of the model's horizon and what it remembers."""
        own, past = rows % self.dataset.num_frames, self.pipeline.past
        frames = frames_of(self.pipeline.robot, self.action_horizon, self.dataset, own, past=past)
        told = (self.told(row) for row in rows.tolist())
        return [
            frame if frame.answer else replace(frame, prompt=prompt, subtask=learned)
            for frame, (prompt, learned) in zip(frames, told, strict=True)
        ]

    def told(self, row: int) -> tuple[str, str]:
        """The prompt, and the text that is learned: the step's subtask, or the answer to a question; "": none."""
        choice, own = divmod(row, self.dataset.num_frames)
        say, learned = self.plan[choice], ""
        if style := self._learns(say):
            texts, numbers = self.dataset.texts(style)
            learned = texts[numbers[own]] if numbers[own] >= 0 else ""
        return self.dataset.prompt(own) if say.instruct == "task" else self.dataset.subtask(own), learned

    def instructions(self) -> tuple[list[str], Int64[np.ndarray, "N k"]]:
        """Every text that may be a prompt, and which of them each row of the dataset may have."""
        sources: dict[PromptSource, None] = dict.fromkeys(say.instruct for say in self.plan)
        return _joined(map(self.dataset.instructions, sources))

    def learned(self) -> tuple[list[str], Int64[np.ndarray, "N k"]]:
        """Every text that may be learned behind a prompt, and which of them each row may have; "": none."""
        found = []
        for style in dict.fromkeys(map(self._learns, self.plan)):
            texts, numbers = self.dataset.texts(style) if style else ([], np.full(self.dataset.num_frames, -1))
            found.append(([*texts, ""], np.where(numbers < 0, len(texts), numbers)[:, None]))
        return _joined(found)

    def _learns(self, say: Say) -> str:
        """The style of what is learned."""
        return "answer" if isinstance(self.dataset, Questions) else "subtask" if say.learn_subtask else ""

    def samples(self, rows: Int64[np.ndarray, " n"]) -> list[Sample]:
        """The rows as the model's training input."""
        return [self.pipeline.encode_frame(frame) for frame in self.frames(rows)]


def _joined(parts: Iterable[tuple[list[str], np.ndarray]]) -> tuple[list[str], np.ndarray]:
    """Texts and their numbers [N, k] of several sources as one of all their columns."""
    texts, columns = list[str](), list[np.ndarray]()
    for more, numbers in parts:
        columns.append(numbers + len(texts))
        texts += more
    return texts, np.concatenate(columns, axis=1)


def frames_of(
    robot: Robot,
    action_horizon: int,
    dataset: Dataset,
    rows: Int64[np.ndarray, " n"],
    *,
    pictures: bool = True,
    past: Sequence[int] = (),
) -> list[Frame]:
    """The rows as frames with just the features that the robot names; of questions, with their pictures."""
    if isinstance(dataset, Questions):
        return dataset.frames(rows if pictures else rows[:0], robot, action_horizon)
    return frames(
        dataset,
        rows,
        cameras=[robot.dataset_key(key) for key in robot.cameras_in(dataset.features).values()] if pictures else [],
        state_keys=[robot.dataset_key(s.key) for s in robot.state],
        action_key=robot.dataset_key(robot.action_key),
        horizon=action_horizon,
        past=past,
    )


@dataclass(frozen=True, kw_only=True)
class Part:
    """One dataset of a mixture."""

    source: EncodedDataset
    rows: Int64[np.ndarray, " train"]
    """Those to train on."""
    held_out: Int64[np.ndarray, " held_out"]
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a run sees of one part."""

    dataset: str
    robot: str
    episodes: int
    """With at least one row to train on."""
    frames: int
    """To train on."""
    held_out: int
    left_out: int
    """Frames that a mask keeps away from both."""
    share: float
    """Of the samples."""
    epochs: float
    """How often the run visits each frame."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a sample came from."""

    root: Path
    """The dataset's folder."""
    dataset: str
    episode: int
    """Its number in the dataset's own files."""
    frame: int
    where: str
    """Both in words, or the line of a file of questions."""

    def __str__(self) -> str:
        return f"dataset {self.dataset}, {self.where}"


class Mixture:
    """The parts as one source of samples."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)

    @cached_property
    def offsets(self) -> list[int]:
        """The mixture's first row of each part."""
        sizes = [part.source.dataset.num_frames * len(part.source.plan) for part in self.parts]
        return np.cumsum([0, *sizes])[:-1].tolist()

    def stream(self, seed: int) -> Stream | PlannedStream | MixedStream:
        """The endless stream of the mixture's rows; of a single part it is the part's own."""
        parts = [_stream(part, seed) for part in self.parts]
        if len(parts) == 1:
            return parts[0]
        return MixedStream(parts, [part.weight for part in self.parts], self.offsets, seed=seed)

    def samples(self, rows: Int64[np.ndarray, " n"]) -> list[Sample]:
        """The rows of the mixture as the model's training input, in their order."""
        owners = np.searchsorted(self.offsets, rows, side="right") - 1
        samples: dict[int, Sample] = {}
        for k in np.unique(owners).tolist():
            places = np.flatnonzero(owners == k)
            found = self.parts[k].source.samples(rows[places] - self.offsets[k])
            samples.update(zip(places.tolist(), found, strict=True))
        return [samples[place] for place in range(len(rows))]

    def part_of(self, row: int) -> tuple[Part, int]:
        """The part that a row of the mixture belongs to, and which row of its source it is."""
        k = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return self.parts[k], row - self.offsets[k]

    def places(self, rows: Int64[np.ndarray, " n"]) -> list[Place]:
        """Where the rows of the mixture came from, in their order."""
        return [_place(part.source.dataset, row) for part, row in map(self.part_of, rows.tolist())]

    def report(self, num_samples: int) -> list[Share]:
        """What a run of `num_samples` sees of each part."""
        shares = deal([part.weight for part in self.parts])
        return [_share(part, share, num_samples) for part, share in zip(self.parts, shares / shares.sum(), strict=True)]


def _stream(part: Part, seed: int) -> Stream | PlannedStream:
    dataset, plan = part.source.dataset, part.source.plan
    rows = Stream(part.rows, seed=seed, fingerprint=dataset.fingerprint)
    weights, key = [say.weight for say in plan], f"plan/{seed}/{dataset.fingerprint}"
    return PlannedStream(rows, weights, dataset.num_frames, key=key) if len(plan) > 1 else rows


def _place(dataset: Dataset, row: int) -> Place:
    row %= dataset.num_frames  # whatever is told there
    episode = dataset.episodes[int(dataset.episode_of(np.asarray(row)))]
    frame, where = row - episode.start, dataset.locate(row)
    return Place(root=dataset.root, dataset=dataset.name, episode=episode.index, frame=frame, where=where)


def _share(part: Part, share: float, num_samples: int) -> Share:
    dataset = part.source.dataset
    return Share(
        dataset=dataset.name,
        robot=part.source.pipeline.robot.name,
        episodes=len(np.unique(dataset.episode_of(part.rows))),
        frames=len(part.rows),
        held_out=len(part.held_out),
        left_out=dataset.num_frames - len(part.rows) - len(part.held_out),
        share=float(share),
        epochs=float(share) * num_samples / len(part.rows),
    )
