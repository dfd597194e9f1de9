"""What is in a dataset, and a robot that would fit it."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from manipi.data.dataset import Dataset, Feature
from manipi.errors import one_line, shown
from manipi.records import read_json

_STATE_WORDS, _GRIPPER_WORDS = ("state", "qpos", "joint", "proprio"), ("grip", "jaw")
_RATE_WORDS = ("vel", "delta", "/s")
_POSITION = ("x", "y", "z")
_ROTATIONS = {
    ("roll", "pitch", "yaw"): "euler_xyz",
    ("rx", "ry", "rz"): "rotvec",
    ("qx", "qy", "qz", "qw"): "quat_xyzw",
    ("r1", "r2", "r3", "r4", "r5", "r6"): "rot6d",
    ("r0", "r1", "r2", "r3", "r4", "r5"): "rot6d",
}
"""What the names of a rotation's dimensions say, behind those of a position."""
_PREFIXES = {
    **dict.fromkeys(("rot", "rotation", "rotvec", "axisangle", "aa", "rot6d", "r6d"), "r"),
    **dict.fromkeys(("quat", "quaternion", "orientation"), "q"),
    **dict.fromkeys(("euler", "rpy"), "e"),
}
"""A word before the axis in the name, and what the axis is called then: quat_x is qx, rot_x is rx, rot6d_1 is r1."""
_EULER = {"ex": "roll", "ey": "pitch", "ez": "yaw"}


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """A dataset at a glance."""

    root: str
    version: str
    robot_type: str
    fps: float
    num_episodes: int
    num_frames: int
    hours: float
    episode_frames: tuple[int, int, int]
    """Of the shortest, the median and the longest episode."""
    features: Mapping[str, Feature]
    tasks: Mapping[str, int]
    """Episodes per instruction."""
    robot: str
    """Python source of a `Robot` that fits, guessed from the features."""


def describe_dataset(dataset: Dataset) -> DatasetSummary:
    """Reads the metadata only; no table and no picture."""
    root, robot_type = dataset.root, ""
    if (root / "meta/info.json").is_file():
        info = read_json(root / "meta/info.json")
        version, told = f"LeRobot {info['codebase_version']}", info.get("robot_type") or ""
        robot_type = told if isinstance(told, str) else shown(told)
    elif (root / "dataset_info.json").is_file():
        info = read_json(root / "dataset_info.json")
        version = f"RLDS {info['name']} {info.get('version', '')}".strip()
    else:  # another package's reader
        version = f"{type(dataset).__module__}.{type(dataset).__name__}"
    lengths = sorted(episode.length for episode in dataset.episodes)
    return DatasetSummary(
        root=str(root),
        version=version,
        robot_type=robot_type or "unknown",
        fps=dataset.fps,
        num_episodes=len(lengths),
        num_frames=dataset.num_frames,
        hours=dataset.num_frames / dataset.fps / 3600,
        episode_frames=(lengths[0], lengths[len(lengths) // 2], lengths[-1]),
        features=dataset.features,
        tasks=dict(Counter(episode.task for episode in dataset.episodes).most_common()),
        robot=sketch_robot(dataset, robot_type or dataset.name),
    )


def is_action(key: str) -> bool:
    """Whether a feature of that name holds commands, by the habits of those who name them."""
    return key.split(".")[-1].startswith("action")


def is_state(key: str) -> bool:
    return any(word in key for word in _STATE_WORDS)


def is_rate(name: str) -> bool:
    """Whether a dimension of that name is a velocity or an offset per step, not a position."""
    return any(word in name.lower() for word in _RATE_WORDS)


def is_gripper(name: str) -> bool:
    return any(word in name.lower() for word in _GRIPPER_WORDS)


def state_and_action_keys(dataset: Dataset) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The vectors whose names suggest state, and those whose names suggest commands."""
    names = [k for k, f in dataset.features.items() if f.kind == "vector" and "float" in f.dtype and k != "timestamp"]
    actions = tuple(filter(is_action, names))
    return tuple(name for name in names if is_state(name) and name not in actions), actions


def sketch_robot(dataset: Dataset, name: str) -> str:
    """Python source of a `Robot` with every camera, state and action that the features' names suggest.

    The dataset's names stand in it as literals and, on one line, in comments: whatever they are, none of them is run.
    """
    states, actions = state_and_action_keys(dataset)
    action_key = actions[0] if actions else "action"
    cameras, slots = "", Counter[str]()
    for key in dataset.cameras:  # wrists to their side, everything else from `base` on
        wrist = any(word in key for word in ("wrist", "hand", "gripper"))
        slot = ("right_wrist" if "right" in key else "left_wrist") if wrist else "base"
        slots[slot] += 1
        cameras += f"        {_text(slot if slots[slot] == 1 else f'{slot}_{slots[slot]}')}: {_text(key)},\n"
    state = "".join(f"        State({_text(key)}, {math.prod(dataset.features[key].shape)}),\n" for key in states)
    groups = list(_groups(dataset.features.get(action_key, Feature(kind="vector", shape=(1,), dtype="float32"))))
    commands = "".join(f"        {source},  # {note}\n" for source, note in groups)
    kinds = sorted({source.partition("(")[0] for source, _ in groups} | {"Robot", "State"})
    return f"""\
from manipi.robots import {", ".join(kinds)}

ROBOT = Robot(
    name={_text(name)},
    cameras={{
{cameras}    }},
    state=(
{state}    ),
    actions=(  # Joints(n, relative=True): the model sees offsets from the state
{commands}    ),
    action_key={_text(action_key)},
    control_hz={dataset.fps:g},
)
"""


def _text(value: str) -> str:
    """A Python literal, also of characters that no terminal should see."""
    return f'"{value}"' if value.isprintable() and not set(value) & {'"', "\\"} else repr(value)


def _groups(action: Feature) -> Iterator[tuple[str, str]]:
    """Source and comment of each group, by the dimensions' names: grippers, tool poses, and joints between."""
    size = math.prod(action.shape)
    names = [one_line(name, 60) for name in action.names] if len(action.names) == size else [""] * size
    for gripper, group in groupby(names, key=is_gripper):
        members = list(group)
        if gripper:
            yield from (("Gripper(open=0.0, closed=1.0)", f"{name}: correct the range") for name in members)
            continue
        axes, start, position = [_axis(name) for name in members], 0, 0
        while position <= len(members):
            pose, rotation = 0, ""  # dimensions of a tool pose from this one on, and the form of its rotation
            if tuple(axes[position : position + 3]) == _POSITION:
                at = position + 3
                forms = ((len(f) + 3, form) for f, form in _ROTATIONS.items() if tuple(axes[at : at + len(f)]) == f)
                pose, rotation = next(forms, (3, ""))
            if (pose or position == len(members)) and position > start:
                span = f"{members[start]} … {members[position - 1]}" if members[start] else "is one of them a gripper?"
                yield f"Joints({position - start})", span
            if pose:
                source = f'EndEffector(rotation="{rotation}")' if rotation else "EndEffector()"
                yield source, f"{members[position]} … {members[position + pose - 1]}: is it so, and absolute?"
                start = position + pose
            position += pose or 1


def _axis(name: str) -> str:
    """`x`, `yaw`, `qw` … of a dimension's name, without what stands before it; of offsets and velocities nothing."""
    words: list[str] = re.findall(r"[a-z]+\d*[a-z]*\d*|\d+", name.lower())
    if not words or is_rate(name):
        return ""
    prefix = next((_PREFIXES[word] for word in reversed(words[:-1]) if word in _PREFIXES), "")
    axis = prefix + words[-1] if re.fullmatch(r"[xyzw]|\d", words[-1]) else words[-1]
    return _EULER.get(axis, axis)
