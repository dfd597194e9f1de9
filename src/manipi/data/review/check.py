"""Read a dataset in full, and say what is wrong with it.

    check        error                                          warning
    metadata     entries that are missing, twice or disagree
    tables       missing columns, rows, episodes; a data_path   tables of no episode
                 that leads nowhere
    numbering    frame_index, index, task_index
    timestamps   not ascending                                  not 1/fps apart
    values       NaN, infinity                                  dimensions that never move, jumps, clipped commands,
                                                                rotations that wrap or change their sign
    movement                                                    pauses, shaking, episodes that are alike
    language     broken items of LeRobot's language columns     no instruction, one instruction in several spellings
    pictures     frames that cannot be decoded; cameras that    a video longer than its episodes
                 no file has
    robot        a feature that the dataset lacks               another rate than the dataset's, commands beyond limits

Nothing stops at the first finding: what cannot be read is reported, and the rest is read all the same. Tables and
pictures pass through the reader that training uses, so what passes here trains.
"""

import copy
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from manipi.data.dataset import Dataset
from manipi.data.open import open_dataset
from manipi.data.review import values
from manipi.data.review.describe import is_action
from manipi.data.review.lerobot_files import open_lerobot
from manipi.data.review.report import CheckReport, EpisodeFacts, Finding, from_error, warning
from manipi.data.review.values import Signal
from manipi.errors import DataError, quoted
from manipi.processes import on_cluster
from manipi.robots.robot import Robot

BLOCK = 32
"""Pictures decoded at a time."""

TOGETHER = 16
"""Episodes of a task for a Ray cluster, each of which opens the dataset."""


def check_dataset(
    root: Path, *, robot: Robot | None = None, quick: bool = False, num_workers: int | None = None, ray: bool = False
) -> CheckReport:
    """Check everything about the dataset at `root`; what is wrong is in the report, never raised.

    Args:
        robot: also check that the dataset has what this robot names, and stays within its limits; errors in features
            that it does not name are warnings then.
        quick: decode the first and the last picture of each episode only.
        num_workers: threads that decode pictures; by default one per processor core.
        ray: decode on a Ray cluster instead, whose hosts all see `root`.
    """
    root, keys = Path(root).expanduser().resolve(), _keys(robot)
    try:
        findings, rows, to_decode = _open(root, None)
    except DataError as error:
        return CheckReport(root=str(root), findings=_located(root, [from_error(error, "metadata")]))
    facts: tuple[EpisodeFacts, ...] = ()
    absent = {key for finding in findings for key in finding.features}
    if rows is not None:
        signals, bad = values.read_signals(rows, rows.features.keys() - absent)
        found, facts = _look_into(rows, signals, robot)
        findings += [*bad, *found]
    if to_decode is not None:
        findings += _pictures(to_decode, _cameras(to_decode, keys, absent), quick, num_workers, ray=ray)
    dataset = to_decode or rows
    if dataset is None:
        return CheckReport(root=str(root), findings=_located(root, findings))
    if robot is not None:
        for i, finding in enumerate(findings):  # features that the robot does not name keep nothing from training
            if finding.severity == "error" and finding.features and not set(finding.features) & (keys or set()):
                what = f"{finding.what}; {robot.name!r} does not use it"
                findings[i] = replace(finding, severity="warning", what=what)
        findings += _robot(dataset, robot)
    return CheckReport(
        root=str(root),
        num_episodes=len(dataset.episodes),
        num_frames=dataset.num_frames,
        fps=dataset.fps,
        cameras=tuple(dataset.cameras),
        depth=tuple(key for key, feature in dataset.features.items() if feature.kind == "depth"),
        findings=_located(root, findings),
        episodes=facts,
        tasks=dict(Counter(e.task for e in dataset.episodes).most_common()),
    )


def sort_episodes(
    root: Path, *, robot: Robot | None = None, fields: str = "", num_workers: int | None = None
) -> tuple[tuple[int, ...], dict[int, str]]:
    """The numbers of the episodes that training can use; and of those that it cannot, each with its first error.

    Cheap enough for the start of a run: metadata, tables, numbering, timestamps, numbers that are not finite, and the
    first and last picture of each episode. Open the sound ones with `open_dataset(root, episodes=…)`, which touches no
    file of the bad ones.

    Args:
        robot: look at the features alone that this robot names; None: at all of them.
        fields: of RLDS, as `open_dataset` takes it.

    Raises:
        DataError: something is wrong that no choice of episodes avoids.
    """
    root, keys = Path(root).expanduser().resolve(), _keys(robot)
    findings, rows, to_decode = _open(root, keys, fields)
    absent = {key for finding in findings for key in finding.features}
    if rows is not None:
        wanted = rows.features.keys() if keys is None else keys
        findings += values.read_signals(rows, wanted - absent)[1]
    if to_decode is not None:
        cameras = [c for c in _cameras(to_decode, keys, absent) if keys is None or c in keys]
        findings += _pictures(to_decode, cameras, quick=True, num_workers=num_workers)
    bad: dict[int, str] = {}
    for finding in _located(root, findings):
        for number in finding.episodes if finding.severity == "error" else ():
            bad.setdefault(number, f"{finding.where}: {finding.what}")
    sound = [episode.index for episode in rows.episodes if episode.index not in bad] if rows is not None else []
    return tuple(sound), dict(sorted(bad.items()))


def _keys(robot: Robot | None) -> set[str] | None:
    """The features that a robot names."""
    if robot is None:
        return None
    keys = (*robot.cameras.values(), *(s.key for s in robot.state), robot.action_key)
    return {robot.dataset_key(key) for key in keys}


def _cameras(dataset: Dataset, asked: set[str] | None, absent: set[str]) -> list[str]:
    """Those of colours, and of depth those that are asked for and can be shown."""
    depth = [k for k, f in dataset.features.items() if f.kind == "depth" and f.shape[-1] == 3 and k in (asked or ())]
    return [camera for camera in (*dataset.cameras, *depth) if camera not in absent]


def _open(root: Path, keys: set[str] | None, fields: str = "") -> tuple[list[Finding], Dataset | None, Dataset | None]:
    """What the format's own checks find, the episodes whose rows can be read, and those whose pictures can be tried."""
    if (root / "meta").is_dir():
        return open_lerobot(root, keys)
    dataset, findings = open_dataset(root, fields=fields), list[Finding]()
    if "timestamp" in dataset.features:  # at which the reader of RLDS does not look
        seconds = dataset.column("timestamp")[:, 0]
        for e in dataset.episodes:
            findings += values.uneven_timestamps(e.index, seconds[e.start : e.start + e.length], dataset.fps)
    return findings, dataset, dataset


def _look_into(
    dataset: Dataset, signals: Sequence[Signal], robot: Robot | None
) -> tuple[list[Finding], tuple[EpisodeFacts, ...]]:
    idle_N, findings, jerks = values.find_idle(dataset, signals, robot), [], []
    for signal in signals:
        jerk_Ed = values.jerk(dataset, signal)
        leaps = values.find_leaps(dataset, signal)
        findings += [*values.still(signal), *values.report_leaps(dataset, signal, leaps, robot)]
        findings += values.jumps(dataset, signal, [(leap.rows, leap.dims) for leap in leaps])
        findings += values.shaking(dataset, signal, jerk_Ed)
        if is_action(signal.key):
            findings += values.clipped(dataset, signal, idle_N)
        jerks.append(jerk_Ed[:, signal.moving_d])
    findings += [*values.pauses(dataset, idle_N), *values.alike(dataset, signals), *values.language(dataset)]
    if robot is not None:
        findings += values.beyond_limits(dataset, robot, list(signals))
    jerk_E = np.concatenate([np.zeros((len(dataset.episodes), 0)), *jerks], axis=1)
    jerk_E = jerk_E.mean(axis=1) if jerk_E.shape[1] else np.zeros(len(jerk_E))
    facts = [
        EpisodeFacts(
            index=e.index,
            length=e.length,
            task=e.task,
            idle=float(idle_N[e.start : e.start + e.length].mean()),
            jerk=float(jerk),
            motion=motion,
        )
        for e, jerk, motion in zip(dataset.episodes, jerk_E, values.speed_curves(dataset, signals), strict=True)
    ]
    return findings, tuple(facts)


def _pictures(
    dataset: Dataset, cameras: Sequence[str], quick: bool, num_workers: int | None, *, ray: bool = False
) -> list[Finding]:
    """The first damaged picture of each camera and episode; `quick` looks at the first and the last alone."""
    jobs = [(camera, position) for camera in cameras for position in range(len(dataset.episodes))]
    local = threading.local()

    def begin() -> None:
        local.dataset = copy.copy(dataset)  # opens the files again: a decoder belongs to one thread

    def decode(job: tuple[str, int]) -> list[Finding]:
        return _decode(local.dataset, quick, [job])

    with ThreadPoolExecutor(num_workers or os.cpu_count() or 1, initializer=begin) as pool:
        try:
            size = TOGETHER if ray else 1
            tasks = [(jobs[first : first + size],) for first in range(0, len(jobs), size)]
            found = on_cluster(partial(_decode, dataset, quick), tasks) if ray else pool.map(decode, jobs)
            bar = tqdm(found, total=len(tasks), desc="pictures", unit="task" if ray else "clip", leave=False)
            damaged = [finding for some in bar for finding in some]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    findings = list[Finding]()
    for camera in cameras:
        here = [finding for finding in damaged if finding.features == (camera,)]
        if len(here) == len(dataset.episodes) and len({(finding.what, finding.next) for finding in here}) == 1:
            here = [replace(here[0], episodes=tuple(number for finding in here for number in finding.episodes))]
        findings += here  # what is the same in all of a camera's episodes is one finding
    return findings


def _decode(dataset: Dataset, quick: bool, jobs: Sequence[tuple[str, int]]) -> list[Finding]:
    """The first damaged picture of each camera and position of an episode, where there is one."""
    found = []
    for camera, position in jobs:
        episode = dataset.episodes[position]
        stop, step = episode.start + episode.length, max(1, episode.length - 1) if quick else BLOCK
        for first in range(episode.start, stop, step):
            rows = np.arange(first, min(first + (1 if quick else BLOCK), stop))
            if error := _damage(dataset, camera, rows):
                single = (row for row in rows.tolist() if _damage(dataset, camera, np.array([row])))
                frame = next(single, first) - episode.start
                found.append(from_error(error, "pictures", (episode.index,), frame, (camera,)))
                break
    return found


def _damage(dataset: Dataset, camera: str, rows: np.ndarray) -> DataError | None:
    try:
        dataset.images(camera, rows)
    except DataError as error:
        return error
    return None


def _robot(dataset: Dataset, robot: Robot) -> Iterator[Finding]:
    there = robot.cameras_in(dataset.features)
    for slot, key in robot.cameras.items():
        if slot not in there:
            what = f"no picture {robot.dataset_key(key)!r} for the optional camera {slot!r}"
            yield warning("robot", what, "nothing, if it is so; else correct the robot's cameras or dataset_keys")
    pictures = [(key, None) for key in there.values()]
    vectors = [(s.key, s.size) for s in robot.state] + [(robot.action_key, robot.action_size)]
    for key, size in (*pictures, *vectors):
        try:
            dataset.require(robot.dataset_key(key), "image" if size is None else "vector", size)
        except DataError as error:
            yield from_error(error, "robot")
    if what := other_rate(dataset, robot):
        yield warning("robot", what, "set control_hz; chunks would be executed at another speed")


def other_rate(dataset: Dataset, robot: Robot) -> str:
    """How the dataset's rate differs from the robot's; empty where they are one."""
    if robot.control_hz == dataset.fps:
        return ""
    return f"{robot.name!r} runs at {robot.control_hz:g} Hz, the dataset at {dataset.fps:g} Hz"


def _located(root: Path, findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """With paths as seen from the dataset's folder."""
    return tuple(
        replace(
            f,
            where=f.where.replace(f"{root}/", ""),
            what=f.what.replace(f"{root}/", ""),
            next=f.next.replace("<folder>", quoted(root)),
        )
        for f in findings
    )
