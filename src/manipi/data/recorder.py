"""Records what a robot saw, was told and did: a run of `manipi_client.Runtime` as a LeRobot v3.0 dataset.

    environment ── observation ─▶ broker ── action ─▶ environment
                                  │    ▲         └──▶ Recorder.on_step         every frame
                                  ▼    │
                      Recorder.watch(policy) ─▶ server                         questions and answers, by their frame

Beside the robot's own cameras, state and commands, a frame has what was asked and answered there, so that the same
question can be put to another policy (`manipi.evaluate.replay`). Pictures are stored without loss but for the colour
space, which moves a value by 2 at most. Versions, robot and the policy's metadata are in `meta/recording.json`.

A subtask that the policy writes or is told (`manipi/subtask`) goes to `language_persistent`. There it holds until the
next one, since that column has no word for an end. The dataset has the column where the policy says that it writes
text, or where the first episode has a subtask.

An episode is on the disk when its `on_episode_end` returns: encoded, in a folder of its own beside the dataset
(`manipi.data.lerobot.writer`). A process that is killed loses the episode at hand and no other.

Shape letters: H action horizon, A dimensions of the robot's command.
"""

import difflib
import json
import logging
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

import av
import numpy as np

import manipi
import manipi_client
from manipi.data.dataset import Feature
from manipi.data.lerobot.episode import EpisodeEncoder, read_episode
from manipi.data.lerobot.language import LANGUAGE, PERSISTENT
from manipi.data.lerobot.writer import Parts, how_to_finish
from manipi.errors import ConfigError, DatasetFormatError, DatasetNotFoundError, StorageError, quoted
from manipi.records import from_json, json_bytes, read_json
from manipi.robots.robot import Robot
from manipi.storage import atomic_directory, atomic_write, require_absent
from manipi.transforms.observation import ReadRobot
from manipi.types import Said
from manipi_client import Policy, Subscriber
from manipi_client.keys import DELAY, PREVIOUS, SEED, STEP, SUBTASK

logger = logging.getLogger(__name__)

DESCRIPTION = "meta/recording.json"

TIME, STARVED, ASKED, CHUNK = "manipi.time_s", "manipi.starved", "manipi.asked", "manipi.chunk"
LEFT, NUM_LEFT, DELAYED, SEEDED = "manipi.left", "manipi.num_left", "manipi.delay", "manipi.seed"
ANSWER_MS, INFER_MS = "manipi.answer_ms", "manipi.infer_ms"
"""Features beside the robot's: chunks are flat, [H·A], and zero where nothing was asked; `manipi.left` is what was left
of the previous chunk, its first `manipi.num_left` steps."""

_BLOCK = 16
"""Pictures that are in memory at a time."""


class Recorder(Subscriber):
    """Keeps every episode when it ends; the dataset of all of them appears at `root` when the block ends.

        with Recorder(root, robot) as recorder:
            broker = RealTimeBroker(recorder.watch(WebsocketPolicy("192.168.1.20")), execute_steps=8)
            Runtime(environment, PolicyAgent(broker), [recorder], max_hz=robot.control_hz).run()

    A recorder that was killed left its episodes; the next one with this root goes on behind them, and
    `finish_recording` makes the dataset of them.

    Args:
        root: a folder that does not exist yet.
        seed: of the first question's noise; each question has the next number, so that it can be asked again.

    Raises:
        StorageError: `root` exists, or the disk is full; the episodes before are kept.
        ObservationError: an observation does not match the robot.
        ConfigError: an action of another size; another recording is going on there, or one of another robot or policy
            was begun.
    """

    def __init__(self, root: str | Path, robot: Robot, *, seed: int = 0):
        self._parts = Parts(Path(root), "recording")
        if self._parts.finished:
            with self._parts.claimed():
                self._parts.settle()
        require_absent(self._parts.target)
        self._robot, self._seed = robot, seed
        self._read = ReadRobot(robot)
        self._stack = ExitStack()
        self._policy: Policy | None = None
        self._begun: dict[str, Any] = {}
        """What all episodes have in common, beside them from the first one on: encoder, its version, description."""
        self._number = self._num_kept = self._questions = 0
        self._pictures: dict[str, _Pictures] = {}
        self.on_episode_start()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._parts.claimed())
            if kept := self._parts.episodes():  # go on behind them
                self._begun = _read_begun(self._parts)
                self._require_begun("robot", self._begun["description"]["robot"], self._robot.to_json())
                self._require_begun("video encoder", self._begun["video_encoder"], av.__version__)
                self._number = self._num_kept = int(kept[-1].name.removeprefix("episode-")) + 1
                if (seeds := read_episode(kept[-1]).columns.get(SEEDED)) is not None:
                    self._questions = max(0, int(seeds.max()) + 1 - self._seed)
                begun = "going on with the recording that was begun in %s: %d episodes"
                logger.warning(begun, self._parts.folder, len(kept))
            self._stack = stack.pop_all()
        return self

    def _require_begun(self, name: str, begun: Any, now: Any) -> None:
        """Episodes of one dataset have one robot, one policy and one layout. Compares as a file keeps it."""
        if begun == json.loads(json_bytes(now)):
            return
        raise ConfigError(
            expected=f"the {name} of the recording that was begun there",
            found=f"another {name}",
            where=str(self._parts.folder),
            next=f"manipi record --finish {quoted(self._parts.target)}  # then record to another folder",
        )

    def watch(self, policy: Policy) -> "WatchedPolicy":
        """The policy, whose questions and answers are recorded; put it behind the broker.

        Raises:
            ConfigError: the episodes that are there already are of another policy.
        """
        if self._begun:
            self._require_begun("policy", self._begun["description"]["policy"], dict(policy.metadata))
        self._policy = policy
        return WatchedPolicy(self, policy)

    def on_episode_start(self) -> None:
        self._ended = False
        self._rows: list[dict[str, Any]] = []
        self._prompts: list[str] = []
        self._answers: dict[int, dict[str, np.ndarray | np.generic]] = {}
        """By the frame that they belong to, the columns of questions and answers."""
        self._subtasks: dict[int, str] = {}
        """By the frame from which on they hold; the same one may follow itself."""
        self._close_pictures()
        self._started = time.monotonic()

    def on_step(self, observation: Mapping[str, Any], action: Mapping[str, Any]) -> None:
        sample = self._read.encode(observation)
        for slot, key in self._robot.cameras.items():
            if (picture := sample.get(f"image/{slot}")) is not None:
                feature = self._robot.dataset_key(key)
                if feature not in self._pictures:
                    self._pictures[feature] = _Pictures(picture.shape)
                self._pictures[feature].add(picture)
        self._prompts.append(str(sample["prompt"]))
        if told := str(observation.get(SUBTASK, "")).strip():  # what the policy answered at this frame is later news
            self._subtasks.setdefault(len(self._rows), told)
        ends = np.cumsum([state.size for state in self._robot.state], dtype=int)
        states = zip(self._robot.state, np.split(sample["state"], ends[:-1]))
        self._rows.append(
            {
                **{self._robot.dataset_key(state.key): values for state, values in states},
                self._robot.dataset_key(self._robot.action_key): np.asarray(action["actions"], np.float32),
                TIME: np.float32(time.monotonic() - self._started),
                STARVED: np.int64(action.get("starved", False)),
            }
        )

    def on_episode_end(self) -> None:
        """Encodes the episode and returns when it is on the disk; one without a step is left out."""
        if not self._rows:
            return
        self._ended = True
        folder = self._parts.episode(self._number)
        if not folder.exists():  # it does where Ctrl-C came after it was named
            self._encode(folder)
        self._number += 1
        self.on_episode_start()

    def _encode(self, folder: Path) -> None:
        answers = dict(self._answers)  # an answer may still come
        rows = self._rows
        if answers:
            nothing = {key: np.zeros_like(value) for key, value in next(iter(answers.values())).items()}
            rows = [row | answers.get(i, nothing) for i, row in enumerate(rows)]
        columns = {key: np.stack([np.atleast_1d(row[key]) for row in rows]) for key in rows[0]}
        vectors = {k: Feature(kind="vector", shape=v.shape[1:], dtype=str(v.dtype)) for k, v in columns.items()}
        cameras = {k: Feature(kind="image", shape=p.shape, dtype="video") for k, p in self._pictures.items()}
        rate = round(self._robot.control_hz)
        said, keeps = self._said(rate), PERSISTENT in self._begun.get("encoder", {}).get("features", {})
        if not self._begun:
            keeps = bool(said or (self._policy is not None and self._policy.metadata.get("writes_text")))
        elif said and not keeps:
            warning = "episode %d is kept without its subtasks: the first one had none; record them to another folder"
            logger.warning(warning, self._number)
        language = {PERSISTENT: LANGUAGE} if keeps else {}
        encoder = EpisodeEncoder(features={**cameras, **vectors, **language}, fps=rate, pix_fmt="yuv444p", crf=0)
        if not self._begun:  # the first episode's layout is that of all
            versions = {"manipi": manipi.__version__, "manipi_client": manipi_client.__version__}
            description = {
                "robot": self._robot.to_json(),
                "policy": {} if self._policy is None else dict(self._policy.metadata),
                "versions": versions | {"python": platform.python_version(), "numpy": np.__version__},
            }
            begun = {"encoder": encoder, "video_encoder": av.__version__, "description": description}
            atomic_write(self._parts.begun, json_bytes(begun))
            self._begun = _read_begun(self._parts)
        self._require_begun("layout", self._begun["encoder"], encoder)
        where = f"{self._parts.target}, episode {self._number}"
        next_ = "make room; the episodes before this one are kept"
        with atomic_directory(folder, next_) as partial:
            data = columns | {key: pictures.blocks() for key, pictures in self._pictures.items()}
            data |= dict.fromkeys(language, said)
            encoder.encode(partial, data, self._prompts, where)

    def _said(self, rate: int) -> list[tuple[int, Said]]:
        """The episode's subtasks where they change, as an item of `language_persistent` each."""
        said, last = list[tuple[int, Said]](), ""
        for frame, text in sorted(dict(self._subtasks).items()):  # an answer may still come
            if text != last and frame < len(self._rows):
                said.append((frame, Said("assistant", text, "subtask", frame / rate)))
                last = text
        return said

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Also after an error: the episodes that ended before it are kept.

        One that comes before the first new episode, such as another policy's, leaves what was begun as it was.
        """
        with self._stack:
            if self._ended and kind and issubclass(kind, KeyboardInterrupt):
                self.on_episode_end()  # Ctrl-C came while it was being encoded
            self._close_pictures()
            if not self._parts.episodes():
                self._parts.remove()
            elif kind is None or self._number > self._num_kept:
                _finish(self._parts, show=False)

    # ---- questions, from the broker's thread

    def ask(self, policy: Policy, observation: Mapping[str, Any]) -> dict[str, Any]:
        """What `policy` answers to the observation with a seed of its own; kept for the frame that it belongs to."""
        answers, subtasks, frame = self._answers, self._subtasks, int(observation.get(STEP, len(self._rows)))
        observation = {SEED: self._seed + self._questions, **observation}
        self._questions += 1
        started = time.monotonic()
        answer = policy.infer(observation)
        chunk_HA = np.asarray(answer["actions"], np.float32)
        if subtask := str(answer.get("subtask") or observation.get(SUBTASK, "")).strip():
            subtasks[frame] = subtask
        left_nA = np.asarray(observation.get(PREVIOUS, np.zeros_like(chunk_HA[:0])), np.float32)
        answers[frame] = {
            ASKED: np.int64(True),
            CHUNK: chunk_HA.ravel(),
            LEFT: np.pad(left_nA, ((0, len(chunk_HA) - len(left_nA)), (0, 0))).ravel(),
            NUM_LEFT: np.int64(len(left_nA)),
            DELAYED: np.int64(observation.get(DELAY, 0)),
            SEEDED: np.int64(observation[SEED]),
            ANSWER_MS: np.float32((time.monotonic() - started) * 1000),
            INFER_MS: np.float32(answer.get("server_timing", {}).get("infer_ms", 0.0)),
        }
        return answer

    def _close_pictures(self) -> None:
        for pictures in self._pictures.values():
            pictures.close()
        self._pictures = {}


# What was begun -----------------------------------------------------------------------------------------------------


def finish_recording(root: Path, *, show: bool = True) -> dict[str, int]:
    """Make the dataset at `root` of the episodes that a killed recorder left; returns `num_episodes`, `num_frames`.

    Raises:
        DatasetNotFoundError: nothing was left there.
        ConfigError: the recording is going on.
        StorageError: something has the name `root`, or the disk is full; the episodes stay.
        DatasetFormatError: an episode's files are damaged.
    """
    parts = Parts(root, "recording")
    if not (parts.finished or (parts.begun.exists() and parts.episodes())):
        whole = (parts.target / DESCRIPTION).exists()
        raise DatasetNotFoundError(
            expected=f"the episodes of a recording that was not finished, in {parts.folder}",
            found="a dataset that is whole" if whole else "none",
            where=str(parts.target),
            next=f"manipi check {quoted(parts.target)}" if whole else _other_recording(parts.target),
        )
    with parts.claimed():
        return parts.settle() if parts.finished else _finish(parts, show=show)


def _other_recording(target: Path) -> str:
    """What to run where a folder has nothing to finish: most likely its name was mistyped."""
    if waits := how_to_finish(target):
        return waits
    beside = [parts.name[1:].removesuffix(".parts") for parts in target.parent.glob(".*.parts")]
    waiting = [name for name in beside if Parts(target.with_name(name), "recording").begun.exists()]
    named = difflib.get_close_matches(target.name, waiting, n=1, cutoff=0)
    if named:
        return f"manipi record --finish {quoted(target.with_name(named[0]))}"
    return "name the folder that was recorded to; its episodes are in .NAME.parts"


def _finish(parts: Parts, *, show: bool) -> dict[str, int]:
    begun = _read_begun(parts)
    # The description stays as it is in the file: its robot is of types of its own.
    described = begun["description"] | {"written": datetime.now(UTC).isoformat(timespec="seconds")}
    files, robot_type = {DESCRIPTION: json_bytes(described)}, begun["description"]["robot"]["name"]
    encoder = from_json(begun["encoder"], (EpisodeEncoder, Feature), str(parts.begun))
    again = f"manipi record --finish {quoted(parts.target)}  # the episodes wait in {parts.folder}"
    try:
        require_absent(parts.target)
        return parts.finish(parts.episodes(), encoder, robot_type, {}, files=files, show=show)
    except StorageError as error:
        next_ = f"{'move it away' if parts.target.exists() else 'make room'}, then: {again}"
        raise StorageError(expected=error.expected, found=error.found, where=error.where, next=next_) from error


def _read_begun(parts: Parts) -> dict[str, Any]:
    parts.require_own()
    return read_json(parts.begun, DatasetFormatError)


class WatchedPolicy:
    """A policy whose questions and answers a `Recorder` keeps."""

    def __init__(self, recorder: Recorder, policy: Policy):
        self._recorder, self._policy = recorder, policy

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._policy.metadata

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        return self._recorder.ask(self._policy, observation)

    def reset(self) -> None:
        self._policy.reset()

    def interrupt(self) -> None:
        """As the policy's own, where it has one."""
        getattr(self._policy, "interrupt", lambda: None)()


class _Pictures:
    """One camera's pictures of an episode, on disk until they are encoded."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it.

    def add(self, picture: np.ndarray) -> None:
        self._file.write(picture.tobytes())

    def blocks(self) -> Iterator[np.ndarray]:
        """uint8 [n, h, w, 3] in order."""
        size = int(np.prod(self.shape))
        self._file.seek(0)
        while block := self._file.read(_BLOCK * size):
            yield np.frombuffer(block, np.uint8).reshape(-1, *self.shape)

    def close(self) -> None:
        self._file.close()
