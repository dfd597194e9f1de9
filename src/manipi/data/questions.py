"""Questions about pictures, with their answers: of a JSONL file, or of the language_events of a robot's dataset.

    {"image": "kitchen/1.jpg", "question": "what is red?", "answer": "the cup"}
    {"image": {"base": "a.png", "left_wrist": "b.png"}, "question": "is it closed?", "answer": "no"}

Paths are seen from the file and stay in its folder. A picture takes the model's camera slot that is named, as the only
one by "camera", else the first. Questions about the same pictures are an episode, so that they are held out together;
those of a robot's dataset are held out with the episode that they are about.

No robot is asked: the state is zeros, no step of the actions is valid, and absent cameras are masked.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Int64

from manipi.data.dataset import Dataset, Episode, in_a_row
from manipi.errors import DatasetFormatError, DatasetNotFoundError, one_line, shown
from manipi.records import fingerprint
from manipi.robots.robot import Robot
from manipi.transforms.observation import MAX_PROMPT
from manipi.types import Frame


@dataclass(frozen=True)
class Asked:
    """One question."""

    question: str
    answer: str
    pictures: tuple[tuple[str, Path | str], ...]
    """Camera slots, each with a file or with a feature of the robot's dataset."""
    at: int
    """Line of the file, or row of the robot's dataset."""


class Questions(Dataset):
    """One row per question; `read_questions` and `questions_of` make it.

    Args:
        dataset: that of the robot; None: pictures are files.
        digest: of what was read.
    """

    def __init__(
        self, root: Path, episodes: Sequence[Episode], asked: Sequence[Asked], dataset: Dataset | None, digest: str
    ):
        name = dataset.name if dataset else root.name
        super().__init__(root=root, fps=1.0, features={}, episodes=episodes, name=f"questions of {name}")
        self._asked, self._dataset, self._digest = tuple(asked), dataset, digest
        self._answers = [one.answer for one in asked]

    def __reduce__(self) -> tuple:
        return Questions, (self.root, self.episodes, self._asked, self._dataset, self._digest)

    def prompt(self, row: int) -> str:
        return self._asked[row].question

    def texts(self, style: str) -> tuple[list[str], np.ndarray]:
        """Of style "answer"."""
        return (self._answers, np.arange(len(self._answers))) if style == "answer" else super().texts(style)

    def frames(self, rows: Int64[np.ndarray, "n"], robot: Robot, horizon: int) -> list[Frame]:
        """Questions in the keys of a robot whose cameras are the model's slots, without any actions."""
        nothing = {state.key: np.zeros(state.size, np.float32) for state in robot.state}
        actions = np.zeros((horizon, robot.model_action_size), np.float32)
        positions, made = self.episode_of(rows).tolist(), []
        for row, position in zip(rows.tolist(), positions, strict=True):
            one, episode = self._asked[row], self.episodes[position]
            pictures = {robot.cameras[slot]: self._picture(row, source) for slot, source in one.pictures}
            frame = Frame(
                observation={**pictures, **nothing},
                actions=actions,
                action_valid=np.zeros(horizon, bool),
                prompt=one.question,
                episode=episode.index,
                index=row - episode.start,
                answer=one.answer,
            )
            made.append(frame)
        return made

    def _picture(self, row: int, source: Path | str) -> np.ndarray:
        if isinstance(source, str):
            assert self._dataset is not None, "features belong to a dataset"
            return self._dataset.images(source, np.array([self._asked[row].at]))[0]
        from manipi.data.lerobot.video import decode_picture  # PyAV takes long to import

        try:
            return decode_picture((self.root.parent / source).read_bytes())
        except (OSError, ValueError) as error:
            _refuse(
                "a picture of 8 bits, such as JPEG or PNG", f"{source}: {one_line(str(error), 200)}", self.place(row)
            )

    def locate(self, row: int) -> str:
        at = self._asked[row].at
        return f"line {at}" if self._dataset is None else self._dataset.locate(at)

    def picture_files(self, cameras: Sequence[str]) -> dict[str, str]:
        shown = {source for one in self._asked for _, source in one.pictures if isinstance(source, str)}
        return self._dataset.picture_files(sorted(shown)) if self._dataset else {}

    def _fingerprint(self) -> str:
        return self._digest

    def _read_column(self, key: str) -> np.ndarray:
        raise AssertionError("there are no columns")

    def _read_images(self, camera: str, rows: np.ndarray) -> np.ndarray:
        raise AssertionError("cameras differ from question to question")


def read_questions(path: Path, slots: Sequence[str]) -> Questions:
    """The questions of a JSONL file.

    Args:
        slots: the model's cameras.

    Raises:
        DatasetNotFoundError: no file, or no line in it.
        DatasetFormatError: a line that is no such JSON, an empty question or answer, a picture that is not there or
            outside of the file's folder, a camera that the model lacks; names the line.
    """
    try:
        content = path.read_bytes()
        lines = content.decode().split("\n")
    except FileNotFoundError:
        lines, content = [], b""
    except (OSError, UnicodeDecodeError) as error:
        _refuse("a readable text file in UTF-8", one_line(str(error), 200), str(path))
    asked = [_parse(line, number, path, slots) for number, line in enumerate(lines, start=1) if line.strip()]
    if not asked:
        raise DatasetNotFoundError(
            expected='a JSONL file of {"image": …, "question": …, "answer": …}',
            found="no line" if path.exists() else "nothing",
            where=str(path),
            next=f"ls {path.parent}  # then give the right path (DatasetConfig.path)",
        )
    groups: dict[tuple, list[Asked]] = {}
    for one in asked:
        groups.setdefault(one.pictures, []).append(one)
    sizes = {str(source): (path.parent / source).stat().st_size for one in asked for _, source in one.pictures}
    episodes = [Episode(index=i, start=0, length=len(group), task="") for i, group in enumerate(groups.values())]
    digest = fingerprint([hashlib.sha256(content).hexdigest(), sizes])
    return Questions(path, in_a_row(episodes), [one for group in groups.values() for one in group], None, digest)


def _parse(line: str, number: int, path: Path, slots: Sequence[str]) -> Asked:
    where = f"{path}, line {number}"
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        _refuse("JSON", one_line(str(error), 200), where)
    if not isinstance(entry, dict):
        _refuse("a JSON object", shown(entry), where)
    image = entry.get("image")
    images = list(image.items()) if isinstance(image, dict) else [(entry.get("camera", slots[0]), image)]
    folder, pictures = path.parent.resolve(), []
    for slot, name in images or [(None, None)]:
        if slot not in slots:
            _refuse(f"a camera among {', '.join(slots)}", shown(slot), where)
        try:
            there = (
                isinstance(name, str) and (folder / name).resolve().is_relative_to(folder) and (folder / name).is_file()
            )
        except (OSError, ValueError):  # a name that no file can have
            there = False
        if not there:
            _refuse(f"the path of a picture in {folder}, as 'image'", shown(name), where)
        pictures.append((slot, Path(str(name))))
    for key in ("question", "answer"):
        text = entry.get(key)
        if not isinstance(text, str) or not text.strip() or len(text) > MAX_PROMPT:
            _refuse(f"a text of 1 to {MAX_PROMPT:,} characters as {key!r}", shown(text), where)
    return Asked(entry["question"], entry["answer"], tuple(sorted(pictures)), number)


def questions_of(dataset: Dataset, slot_of: Mapping[str, str]) -> Questions:
    """The questions that a robot's dataset has at its frames, in language_events of style vqa.

    Args:
        slot_of: by feature, the model's camera slot that its pictures take; questions about others are left out.

    Raises:
        DatasetNotFoundError: there is none.
        DatasetFormatError: a broken item, as `LeRobotDataset.said` has it, or a question without an answer.
    """
    from manipi.data.lerobot.language import question_pairs  # PyArrow takes long to import

    asked, episodes = list[Asked](), list[Episode]()
    for position, episode in enumerate(dataset.episodes):
        before = len(asked)
        for frame, items in dataset.said(position)[1].items():
            row = episode.start + frame
            for camera, question, answer in question_pairs(items, dataset.place(row)):
                if max(len(question), len(answer)) > MAX_PROMPT:
                    _refuse(f"texts of at most {MAX_PROMPT:,} characters", shown(question + answer), dataset.place(row))
                if camera in slot_of:
                    asked.append(Asked(question, answer, ((slot_of[camera], camera),), row))
        # One without questions stays, so that as many are held out, and the same ones, as of the dataset itself.
        episodes.append(replace(episode, length=len(asked) - before))
    if not asked:
        raise DatasetNotFoundError(
            expected=f"language_events of style vqa about {', '.join(slot_of)}",
            found="none",
            where=str(dataset.root),
            next="annotate the dataset, as LeRobot's lerobot-annotate does, or name a JSONL file of questions",
        )
    return Questions(dataset.root, in_a_row(episodes), asked, dataset, fingerprint([dataset.fingerprint, slot_of]))


def _refuse(expected: str, found: str, where: str) -> NoReturn:
    raise DatasetFormatError(expected=expected, found=found, where=where, next="correct it there, or take it out")
