"""The index of an RLDS dataset that 0.1.0 made is used as it is: making it costs hours for a large dataset."""

import base64
import json
from pathlib import Path

import numpy as np
from tests.data.records import leaf, write_rlds

from manipi.data.rlds.fields import RldsFields
from manipi.data.rlds.reader import open_rlds
from manipi.records import fingerprint

RECORDED = json.loads((Path(__file__).parent / "index_0_1_0.json").read_text())
"""What 0.1.0 wrote for `write_two_episodes`: per file its content in base64, and the dataset's fingerprint."""
FIELDS = RldsFields(fps=5, vectors={"state": ("observation/state",)}, prompts=("language_instruction",))


def write_two_episodes(root: Path) -> Path:
    steps = {"observation/state": leaf("tensor", (2,)), "observation/image": leaf("image", (8, 8, 3), "uint8")}
    steps["language_instruction"] = leaf("text")
    episodes = [
        {
            "steps/observation/state": [float(10 * episode + i) for i in range(2 * length)],
            "steps/observation/image": [b"no picture"] * length,
            "steps/language_instruction": [f"task {episode}"] * length,
        }
        for episode, length in enumerate((3, 2))
    ]
    return write_rlds(root, steps, episodes, shards=[1, 1])


def test_the_index_of_0_1_0_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("MANIPI_HOME", str(tmp_path / "home"))
    root = write_two_episodes(tmp_path / "made/1.0.0")
    metadata = [json.loads((root / name).read_text()) for name in ("dataset_info.json", "features.json")]
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.glob("*.tfrecord*"))]
    read = [FIELDS.vectors, ["observation/image"], FIELDS.prompts, (), {}]
    key = fingerprint([2, root, fingerprint(metadata), stats, read])  # as 0.1.0 named the folder
    index = tmp_path / f"home/rlds/made-{key[:16]}/index"
    index.mkdir(parents=True)
    for name, content in RECORDED["files"].items():
        (index / name).write_bytes(base64.b64decode(content))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    dataset = open_rlds(root, fields=FIELDS, show=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "it is not made anew"
    assert dataset.fingerprint == RECORDED["fingerprint"]
    assert [(e.index, e.start, e.length, e.task) for e in dataset.episodes] == [
        (0, 0, 3, "task 0"),
        (1, 3, 2, "task 1"),
    ]
    expected = [[0, 1], [2, 3], [4, 5], [10, 11], [12, 13]]
    np.testing.assert_array_equal(dataset.column("state"), np.array(expected, np.float32))
