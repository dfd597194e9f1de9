"""Demonstrations of a suite's expert as a LeRobot dataset, made by worker processes; a kill loses no episode.

TARGET              when all are there
.TARGET.episodes/   until then: NUMBER.npz for each, which the same command goes on with
"""

import json
import queue
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.errors import ConfigError, MissingFeatureError, SimulatorError, StorageError, shown
from manipi.evaluate.evaluation import Worker
from manipi.evaluate.suites import FIRST_SCENE, Suite
from manipi.records import json_bytes, read_object
from manipi.robots.robot import Robot
from manipi.storage import Lock, atomic_write, require_absent, storage_errors

SUBTASK = "subtask_index"
"""The column with the number of each step's subtask, whose words are in meta/subtasks.parquet."""


def record_demonstrations(
    suite: Suite, robot: Robot, target: Path, *, episodes: int, noise: Sequence[float] = (0.0,), workers: int = 1
) -> tuple[int, int]:
    """Write the expert's successes on scenes 0, 1, 2 …, which no trial of a suite has.

    Args:
        robot: whose keys the simulator's observations have.
        noise: levels of disturbance, in turns; see `manipi_client.trials.demonstrate`.

    Returns:
        How many episodes succeeded and are in the dataset, and how many were made.

    Raises:
        StorageError: `target` exists, or the disk is full.
        SimulatorError: a simulator died or hung, or its expert never succeeds.
        MissingFeatureError: the simulator has no observation that the robot names.
    """
    require_absent(target)
    assert episodes < FIRST_SCENE
    folder = target.with_name(f".{target.name}.episodes")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(folder / ".lock", wait=False)
    except BlockingIOError:
        raise StorageError(
            expected="one process at a time that makes these episodes",
            found="another one that makes them now",
            where=str(folder),
            next="wait for its end, or choose another name",
        ) from None
    with lock:
        return _record(suite, robot, target, folder, episodes, noise, workers)


def _record(
    suite: Suite, robot: Robot, target: Path, folder: Path, episodes: int, noise: Sequence[float], workers: int
) -> tuple[int, int]:
    options = {**suite.options, **suite.demonstrated}
    asked = {"suite": suite.name, "options": options, "tasks": suite.tasks, "noise": noise}
    asked = json.loads(json_bytes(asked))  # tuples are lists in a file
    made = folder / "episodes.json"
    if not made.exists():
        atomic_write(made, json_bytes(asked))
    if (before := read_object(made)) != asked:
        raise ConfigError(
            expected=f"episodes of {shown(asked, 300)}",
            found=f"some of {shown(before, 300)}, which an earlier command left",
            where=str(folder),
            next="choose another name for the dataset, or delete that folder",
        )
    paths = [folder / f"{number:06d}.npz" for number in range(episodes)]
    _make(suite, [number for number, path in enumerate(paths) if not path.exists()], paths, noise, workers)
    kept, subtasks = 0, dict[str, int]()
    with np.load(paths[0]) as first:
        features = _features(robot, {key: first[key] for key in first.files})
        if "subtasks" in first:
            features[SUBTASK] = Feature(kind="vector", shape=(1,), dtype="int64")
    keys = {robot.dataset_key(key): key for key in (*robot.cameras.values(), *(s.key for s in robot.state))}
    settings = {"robot_type": robot.name, "pix_fmt": "yuv444p", "crf": 18}
    with LeRobotWriter(target, fps=round(robot.control_hz), features=features, **settings) as writer:
        for path in tqdm(paths, desc="write", unit="episode"):
            with np.load(path) as episode:
                if not episode["success"]:
                    continue
                rows = {name: _upright(episode[key]) for name, key in keys.items()}
                rows[robot.dataset_key(robot.action_key)] = episode["actions"].astype(np.float32)
                if "subtasks" in episode:
                    words = [subtasks.setdefault(text, len(subtasks)) for text in episode["subtasks"].tolist()]
                    rows[SUBTASK] = np.array(words)[:, None]
                writer.add_episode(rows, task=str(episode["prompt"]))
            kept += 1
        if subtasks:
            writer.add_texts("subtask", list(subtasks))
        if not kept:
            raise SimulatorError(
                expected="an expert that succeeds at least once",
                found=f"{episodes} episodes without success",
                where=f"suite {suite.name}",
                next="try it: python -m manipi_client.trials, see docs/simulators.md",
            )
    shutil.rmtree(folder)
    return kept, episodes


def _make(suite: Suite, missing: Sequence[int], paths: Sequence[Path], noise: Sequence[float], workers: int) -> None:
    pending, ended = queue.SimpleQueue[int](), queue.SimpleQueue[BaseException | None]()
    for number in missing:
        pending.put(number)
    processes = [
        Worker(suite, "ws://127.0.0.1:1", {**suite.options, **suite.demonstrated})
        for _ in range(min(workers, len(missing)))
    ]

    def drive(worker: Worker) -> None:
        try:
            worker.ready()
            while True:
                number = pending.get_nowait()
                task, level = suite.tasks[number % len(suite.tasks)], noise[number // len(suite.tasks) % len(noise)]
                request = {"demonstration": str(paths[number]), "scene": number, "task": task, "noise": level}
                worker.ask(request, "demonstration", f"episode {number}")
                ended.put(None)
        except queue.Empty:
            pass
        except Exception as error:  # noqa: BLE001 - the main thread raises it.
            ended.put(error)

    try:
        for worker in processes:
            threading.Thread(target=drive, args=(worker,), daemon=True).start()
        for _ in tqdm(missing, desc="demonstrate", unit="episode"):
            if (error := ended.get()) is not None:
                raise error
    finally:
        for worker in processes:
            worker.close()


def _features(robot: Robot, example: dict[str, np.ndarray]) -> dict[str, Feature]:
    """Of a dataset with the robot's pictures, states and commands."""
    found: dict[str, Feature] = {}
    for key in (*robot.cameras.values(), *(s.key for s in robot.state)):
        if key not in example:
            raise MissingFeatureError(
                expected=f"an observation {key!r}, as robot {robot.name!r} names it",
                found=", ".join(sorted(example)),
                where="the simulator's observations",
                next="name a robot with the simulator's keys: --robot",
            )
    for key in robot.cameras.values():
        shape = _upright(example[key]).shape[1:]
        found[robot.dataset_key(key)] = Feature(kind="image", shape=shape, dtype="video")
    for state in robot.state:
        found[robot.dataset_key(state.key)] = Feature(
            kind="vector", shape=(state.size,), dtype="float32", names=state.names
        )
    names = tuple(dimension.name for dimension in robot.action_space)
    action = Feature(kind="vector", shape=(robot.action_size,), dtype="float32", names=names)
    return found | {robot.dataset_key(robot.action_key): action}


def _upright(values: np.ndarray) -> np.ndarray:
    """Pictures [T, 3, h, w] with their channels last; all else as it is."""
    return np.moveaxis(values, 1, -1) if values.ndim == 4 and values.shape[1] == 3 != values.shape[-1] else values
