"""Demonstrations of the scripted expert, recorded as a real LeRobot v3.0 dataset with video."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.robots.robot import Robot
from manipi.robots.tabletop import TABLETOP
from manipi.tabletop.environment.demonstrations import demonstrations

BATCH = 50
"""Episodes that one process makes at a time."""


def record(target: Path, *, episodes: int, first_seed: int, image_size: int, workers: int = 2) -> None:
    """Write `episodes` successful demonstrations to `target`, in the order of their seeds.

    Raises:
        StorageError: `target` exists, or the disk is full; nothing half-written is left.
    """
    seeds = range(first_seed, first_seed + episodes)
    batches = [seeds[i : i + BATCH] for i in range(0, episodes, BATCH)]
    with (
        LeRobotWriter(
            target,
            fps=round(TABLETOP.control_hz),
            features=features(TABLETOP, image_size),
            robot_type=TABLETOP.name,
            pix_fmt="yuv444p",
            crf=18,
        ) as writer,
        tqdm(total=episodes, desc="record", unit="episode") as bar,
    ):
        for batch in _make(batches, image_size, workers):
            for episode in batch:
                if episode["success"]:
                    writer.add_episode({key: episode[key] for key in writer.features}, task=episode["task"])
            bar.update(len(batch))


def features(robot: Robot, image_size: int) -> dict[str, Feature]:
    """What the dataset holds: the robot's cameras, state and actions."""
    picture = Feature(kind="image", shape=(image_size, image_size, 3), dtype="video")
    cameras = dict.fromkeys(robot.cameras.values(), picture)
    states = {s.key: Feature(kind="vector", shape=(s.size,), dtype="float32", names=s.names) for s in robot.state}
    action = Feature(kind="vector", shape=(robot.action_size,), dtype="float32", names=robot.state[0].names)
    return {**cameras, **states, robot.action_key: action}


def _make(batches: Sequence[range], image_size: int, workers: int) -> Iterator[list[dict[str, Any]]]:
    # A forked process would inherit the locks of the video writer's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(partial(_episodes, image_size), batches)


def _episodes(image_size: int, seeds: range) -> list[dict[str, Any]]:
    return list(demonstrations(seeds, image_size=image_size))
