"""Records what a robot saw, was told and did: a run of `manipi_client.Runtime` as a LeRobot v3.0 dataset.

    environment ── observation ─▶ broker ── action ─▶ environment
                                  │    ▲         └──▶ Recorder.on_step         every frame
                                  ▼    │
                      Recorder.watch(policy) ─▶ server                         questions and answers, by their frame

Beside the robot's own cameras, state and commands, a frame has what was asked and answered there, so that the same
question can be put to another policy (`manipi.evaluate.replay`). Pictures are stored without loss but for the colour
space, which moves a value by 2 at most. Versions, robot and the policy's metadata are in `meta/recording.json`.

Shape letters: H action horizon, A dimensions of the robot's command.
"""

import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

import manipi
import manipi_client
from manipi.data.dataset import Feature
from manipi.data.lerobot_writer import LeRobotWriter
from manipi.records import json_bytes
from manipi.robots.robot import Robot
from manipi.storage import require_absent
from manipi.transforms.observation import ReadRobot
from manipi_client import Policy, Subscriber
from manipi_client.keys import DELAY, PREVIOUS, SEED, STEP

DESCRIPTION = "meta/recording.json"

TIME, STARVED, ASKED, CHUNK = "manipi.time_s", "manipi.starved", "manipi.asked", "manipi.chunk"
LEFT, NUM_LEFT, DELAYED, SEEDED = "manipi.left", "manipi.num_left", "manipi.delay", "manipi.seed"
ANSWER_MS, INFER_MS = "manipi.answer_ms", "manipi.infer_ms"
"""Features beside the robot's: chunks are flat, [H·A], and zero where nothing was asked; `manipi.left` is what was left
of the previous chunk, its first `manipi.num_left` steps."""

_BLOCK = 16
"""Pictures that are in memory at a time."""


class Recorder(Subscriber):
    """Writes every episode when it ends; the dataset appears at `root` when the block ends.

        with Recorder(root, robot) as recorder:
            broker = RealTimeBroker(recorder.watch(WebsocketPolicy("192.168.1.20")), execute_steps=8)
            Runtime(environment, PolicyAgent(broker), [recorder], max_hz=robot.control_hz).run()

    Args:
        root: a folder that does not exist yet.
        seed: of the first question's noise; each question has the next number, so that it can be asked again.

    Raises:
        StorageError: `root` exists, or the disk is full.
        ObservationError: an observation does not match the robot.
        ConfigError: an action of another size, or nothing was recorded.
    """

    def __init__(self, root: str | Path, robot: Robot, *, seed: int = 0):
        require_absent(Path(root))
        self._root, self._robot, self._seed = Path(root), robot, seed
        self._read = ReadRobot(robot)
        self._writer: LeRobotWriter | None = None
        self._policy: Policy | None = None
        self._questions = 0
        self._pictures: dict[str, _Pictures] = {}
        self._begin()

    def _begin(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._prompts: list[str] = []
        self._answers: dict[int, _Answer] = {}
        self._close_pictures()
        self._started = time.monotonic()

    def watch(self, policy: Policy) -> "WatchedPolicy":
        """The policy, whose questions and answers are recorded; put it behind the broker."""
        self._policy = policy
        return WatchedPolicy(self, policy)

    def on_episode_start(self) -> None:
        self._begin()

    def on_step(self, observation: Mapping[str, Any], action: Mapping[str, Any]) -> None:
        sample = self._read.encode(observation)
        for slot, key in self._robot.cameras.items():
            if (picture := sample.get(f"image/{slot}")) is not None:
                self._pictures_of(self._robot.dataset_key(key), picture.shape).add(picture)
        self._prompts.append(str(sample["prompt"]))
        self._rows.append(
            {
                **self._states(sample["state"]),
                self._robot.dataset_key(self._robot.action_key): np.asarray(action["actions"], np.float32),
                TIME: np.float32(time.monotonic() - self._started),
                STARVED: np.int64(action.get("starved", False)),
            }
        )

    def on_episode_end(self) -> None:
        """Encodes and writes the episode; one without a step is left out."""
        if not self._rows:
            return
        answers = dict(self._answers)  # an answer may still come
        if answers:
            none = next(iter(answers.values())).nothing()
            self._rows = [row | answers.get(i, none).columns() for i, row in enumerate(self._rows)]
        columns = {key: np.stack([np.atleast_1d(row[key]) for row in self._rows]) for key in self._rows[0]}
        writer = self._open(columns)
        writer.add_episode(columns | {key: p.blocks() for key, p in self._pictures.items()}, task=self._prompts)
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Also after an error: the episodes that ended before it are kept."""
        self._close_pictures()
        if self._writer is not None:
            self._writer.add_file(DESCRIPTION, json_bytes(self._description()))
            self._writer.close()

    # ---- questions, from the broker's thread

    def ask(self, policy: Policy, observation: Mapping[str, Any]) -> dict[str, Any]:
        """What `policy` answers to the observation with a seed of its own; kept for the frame that it belongs to."""
        answers, frame = self._answers, int(observation.get(STEP, len(self._rows)))
        observation = {SEED: self._seed + self._questions, **observation}
        self._questions += 1
        started = time.monotonic()
        answer = policy.infer(observation)
        answers[frame] = _Answer(
            chunk_HA=np.asarray(answer["actions"], np.float32),
            left_nA=np.asarray(observation.get(PREVIOUS, np.zeros((0, self._robot.action_size))), np.float32),
            delay=int(observation.get(DELAY, 0)),
            seed=int(observation[SEED]),
            answer_ms=(time.monotonic() - started) * 1000,
            infer_ms=answer.get("server_timing", {}).get("infer_ms", 0.0),
        )
        return answer

    # ---- columns

    def _pictures_of(self, feature: str, shape: tuple[int, ...]) -> "_Pictures":
        if feature not in self._pictures:
            self._pictures[feature] = _Pictures(shape)
        return self._pictures[feature]

    def _close_pictures(self) -> None:
        for pictures in self._pictures.values():
            pictures.close()
        self._pictures = {}

    def _states(self, state: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum([part.size for part in self._robot.state])
        parts = np.split(state, ends[:-1]) if self._robot.state else []
        return {self._robot.dataset_key(s.key): part for s, part in zip(self._robot.state, parts, strict=True)}

    def _open(self, columns: Mapping[str, np.ndarray]) -> LeRobotWriter:
        if self._writer is None:
            vectors = {k: Feature(kind="vector", shape=v.shape[1:], dtype=str(v.dtype)) for k, v in columns.items()}
            cameras = {k: Feature(kind="image", shape=p.shape, dtype="video") for k, p in self._pictures.items()}
            kind, rate = self._robot.name, round(self._robot.control_hz)
            settings = {"features": {**cameras, **vectors}, "robot_type": kind, "pix_fmt": "yuv444p", "crf": 0}
            self._writer = LeRobotWriter(self._root, fps=rate, **settings)
        return self._writer

    def _description(self) -> dict[str, Any]:
        versions = {"manipi": manipi.__version__, "manipi_client": manipi_client.__version__}
        return {
            "robot": self._robot.to_json(),
            "policy": {} if self._policy is None else dict(self._policy.metadata),
            "versions": versions | {"python": platform.python_version(), "numpy": np.__version__},
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A question of one frame, and what the policy said."""

    chunk_HA: np.ndarray
    left_nA: np.ndarray
    delay: int
    seed: int
    answer_ms: float
    infer_ms: float
    asked: bool = True

    def nothing(self) -> "_Answer":
        """What stands where nothing was asked."""
        left, none = self.left_nA[:0], np.zeros_like(self.chunk_HA)
        return _Answer(chunk_HA=none, left_nA=left, delay=0, seed=0, answer_ms=0.0, infer_ms=0.0, asked=False)

    def columns(self) -> dict[str, np.ndarray | np.generic]:
        padding = ((0, len(self.chunk_HA) - len(self.left_nA)), (0, 0))
        return {
            ASKED: np.int64(self.asked),
            CHUNK: self.chunk_HA.ravel(),
            LEFT: np.pad(self.left_nA, padding).ravel(),
            NUM_LEFT: np.int64(len(self.left_nA)),
            DELAYED: np.int64(self.delay),
            SEEDED: np.int64(self.seed),
            ANSWER_MS: np.float32(self.answer_ms),
            INFER_MS: np.float32(self.infer_ms),
        }


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
