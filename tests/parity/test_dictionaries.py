"""Renaming, repacking and prompts of the reference, against what means the same here: robots and datasets with keys."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from golden import ABSENT, find, name_of, read_json

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.open import open_dataset
from manipi.errors import ConfigError, DatasetFormatError, ObservationError
from manipi.robots import Joints, Robot, State
from manipi.transforms.actions import ActionSpace
from manipi.transforms.observation import ReadRobot
from manipi.transforms.pipeline import observation_of
from manipi.types import Frame


def flat(tree: dict[str, Any], folder: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{folder}{key}/") if isinstance(value, dict) else {folder + key: value}
    return found


def renamed(keys: dict[str, str], values: dict[str, Any]) -> dict[str, Any]:
    """The values under our robot's keys (key -> dataset feature); ours names each key and has no patterns."""
    states = tuple(State(key, 1) for key in keys if key != "prompt")
    robot = Robot(name="r", cameras={"base": "i"}, state=states, actions=(Joints(1),), dataset_keys=keys)
    prompt = values.get(keys.get("prompt", ""), "")
    nothing = np.zeros((1, 1), np.float32)
    frame = Frame({**values, "i": nothing}, nothing, nothing[0] == 0, prompt, episode=0, index=0)
    return {key: value for key, value in observation_of(frame, robot).items() if key in keys}


def check_mask(entry: dict[str, Any]) -> None:
    groups = [Joints(abs(n), relative=n > 0) for n in entry["dims"] if n]
    dims = len(entry["mask"])
    if not groups:
        assert not entry["mask"]
        return
    robot = Robot(name="r", cameras={"base": "i"}, state=(State("state", dims),), actions=tuple(groups))
    moved = ActionSpace(robot).to_model(np.zeros((1, dims)), np.ones(dims))[0] != 0
    assert moved.tolist() == entry["mask"]


def check_renaming(entry: dict[str, Any]) -> None:
    values = flat(entry["input"])
    if "raises" in entry:  # two values for one key: ours cannot be said
        with pytest.raises(ConfigError, match="every observation key once"):
            Robot(name="r", cameras={"base": "q"}, state=(State("q", 1),), actions=(Joints(1),))
        return
    expected = flat(entry["output"])
    came_from = {value: key for key, value in values.items()}
    assert renamed({key: came_from[value] for key, value in expected.items()}, values) == expected


def check_repacking(entry: dict[str, Any]) -> None:
    assert renamed(flat(entry["structure"]), flat(entry["input"])) == flat(entry["output"])


def check_missing_key(error: str) -> None:
    with pytest.raises({"KeyError": KeyError}[error]):
        renamed({"state": "absent"}, {"present": 1})


def check_task_prompts(entry: dict[str, Any], folder: Path) -> None:
    """Ours numbers the tasks of a dataset as they come; a number without a text is refused."""
    tasks = list(entry["tasks"].values())
    features = {"action": Feature(kind="vector", shape=(1,), dtype="float32")}
    with LeRobotWriter(folder, fps=10, features=features, robot_type="r") as writer:
        for task in tasks:
            writer.add_episode({"action": np.zeros((1, 1))}, task=task)
    places = {int(number): row for row, number in enumerate(entry["tasks"])}
    for case in entry["cases"]:
        if "raises" not in case:
            assert open_dataset(folder).prompt(places[case["task_index"]]) == case["prompt"]
    table = pq.read_table(folder / "meta/tasks.parquet")
    pq.write_table(table.slice(1), folder / "meta/tasks.parquet")
    with pytest.raises(DatasetFormatError, match="a task_index with a text, among"):
        open_dataset(folder).prompt(0)


def check_default_prompt(_: str) -> None:
    robot = Robot(name="r", cameras={"base": "i"}, state=(), actions=(Joints(1),), default_prompt="wait")
    picture = {"i": np.zeros((4, 5, 3), np.uint8)}
    assert ReadRobot(robot).encode(picture)["prompt"] == "wait"
    assert ReadRobot(robot).encode(picture | {"prompt": "go"})["prompt"] == "go"
    with pytest.raises(ObservationError, match="default_prompt"):
        ReadRobot(replace(robot, default_prompt=None)).encode(picture)


DICTIONARIES = {
    "make_bool_mask": check_mask,
    "transform_dict": check_renaming,
    "repack": check_repacking,
    "repack_missing_key_raises": check_missing_key,
    "prompt_from_task": check_task_prompts,
    "inject_default_prompt": check_default_prompt,
}
INDEXES = {name_of(path): read_json(path) for path in find("transforms/*.json")}
ENTRIES = [
    (f"{index}-{op}-{number}", op, entry)
    for index, operations in INDEXES.items()
    if isinstance(operations, dict)
    for op, entries in operations.items()
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries])
]


pytestmark = pytest.mark.skipif(not ENTRIES, reason=ABSENT)


@pytest.mark.parametrize(("op", "entry"), [e[1:] for e in ENTRIES], ids=[e[0] for e in ENTRIES])
def test_dictionaries(op, entry, tmp_path):
    assert op in DICTIONARIES, f"no check for the operation {op!r}"
    DICTIONARIES[op](entry, *([tmp_path / "data"] if op == "prompt_from_task" else []))
