"""What is written reads back, has lerobot's own schema, and is there whole or not at all."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.open import open_dataset
from manipi.errors import BadValueError, ConfigError, MissingFeatureError, StorageError

CAMERA = "observation.images.top"


@pytest.mark.parametrize("options", [{}, {"data_mb": 0, "video_mb": 0}, {"pix_fmt": "yuv444p", "crf": 5}])
def test_round_trip(write, episodes, tmp_path, options):
    dataset = open_dataset(write(tmp_path / "set", **options))
    assert [(e.index, e.length) for e in dataset.episodes] == [(i, len(e["action"])) for i, e in enumerate(episodes)]
    assert dataset.fps == 10
    for key in ("observation.state", "action", "reward"):
        np.testing.assert_array_equal(dataset.column(key), np.concatenate([e[key] for e in episodes]))
    pictures = np.concatenate([e[CAMERA] for e in episodes])
    difference = np.abs(dataset.images(CAMERA, np.arange(50)).astype(int) - pictures)
    assert difference[:, :, :20].max() <= (2 if "crf" in options else 6)
    assert difference[:, :, 28:].max() <= (2 if "crf" in options else 6)
    assert dataset.prompt(20) == dataset.episodes[1].task == "öffne die Schublade"
    files = 5 if "data_mb" in options else 1
    assert len(list(dataset.root.rglob("data/*/*.parquet"))) == len(list(dataset.root.rglob("*.mp4"))) == files


@pytest.mark.parametrize("name", ["data/chunk-000", "meta/episodes/chunk-000"])
def test_schema_is_that_of_lerobot(shared_datasets, written, name):
    theirs = pq.read_schema(shared_datasets / "synthetic_lerobot_v30" / name / "file-000.parquet")
    ours = pq.read_schema(written / name / "file-000.parquet")
    for field in theirs:
        if "images" not in field.name and "state" not in field.name and "action" not in field.name:
            assert ours.field(field.name).type == field.type, field.name
    pictures = [field for field in theirs if "cam_high" in field.name]
    for field in pictures:
        assert ours.field(field.name.replace("cam_high", "top")).type == field.type, field.name
    known = {name.replace("cam_high", "top") for name in theirs.names} | {"reward"}
    assert {name for name in ours.names if "reward" not in name} <= known
    if name.startswith("data"):
        assert ours.field("action").type.list_size == 2
        assert json.loads(ours.metadata[b"huggingface"])["info"]["features"]["action"]["_type"] == "List"


def test_metadata_is_that_of_lerobot(shared_datasets, written):
    theirs, ours = (
        json.loads((root / "meta/info.json").read_text())
        for root in (shared_datasets / "synthetic_lerobot_v30", written)
    )
    assert ours.keys() == theirs.keys()
    assert {**ours["features"], CAMERA: None}.keys() >= {
        "timestamp",
        "frame_index",
        "episode_index",
        "index",
        "task_index",
    }
    assert ours["features"][CAMERA]["info"].keys() == theirs["features"]["observation.images.cam_high"]["info"].keys()
    index = pq.read_schema(shared_datasets / "synthetic_lerobot_v30/meta/tasks.parquet").pandas_metadata[
        "index_columns"
    ]
    assert pq.read_schema(written / "meta/tasks.parquet").pandas_metadata["index_columns"] == index


def test_statistics(written, episodes):
    stats = json.loads((written / "meta/stats.json").read_text())
    actions = np.concatenate([episode["action"] for episode in episodes])
    for name, function in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
        np.testing.assert_allclose(stats["action"][name], function(actions, axis=0), rtol=1e-5, atol=1e-7)
    assert stats["action"]["count"] == [50]
    row = pq.read_table(written / "meta/episodes/chunk-000/file-000.parquet").slice(2, 1).to_pydict()
    np.testing.assert_allclose(row["stats/action/q90"][0], np.quantile(episodes[2]["action"], 0.9, axis=0), rtol=1e-6)
    chosen = episodes[4][CAMERA][np.linspace(0, 8, 8).astype(int)].astype(np.float64) / 255
    for name, value in (("mean", chosen.mean()), ("std", chosen.std()), ("max", chosen.max())):
        found = pq.read_table(written / "meta/episodes/chunk-000/file-000.parquet").column(f"stats/{CAMERA}/{name}")
        np.testing.assert_allclose(np.ravel(found[4].as_py()), value, rtol=1e-6)


# Nothing or all ----------------------------------------------------------------------------------------------------


def test_nothing_stays_when_the_block_fails(tmp_path, episodes):
    def record():
        with writer_at(tmp_path / "set") as writer:
            writer.add_episode(episodes[0], task="push")
            raise RuntimeError("the robot fell")

    with pytest.raises(RuntimeError, match="robot fell"):
        record()
    assert list(tmp_path.iterdir()) == []


def test_no_episodes(tmp_path):
    with pytest.raises(ConfigError, match="at least one episode"), writer_at(tmp_path / "set"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_refuses_to_overwrite(written):
    with pytest.raises(StorageError, match=r"(?s)does not exist yet.*written"):
        writer_at(written)


FILL = """
import resource, sys
import numpy as np
from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.errors import StorageError

if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
features = {"cam": Feature(kind="image", shape=(64, 64, 3), dtype="video"),
            "action": Feature(kind="vector", shape=(4,), dtype="float32")}
noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
try:
    with LeRobotWriter(sys.argv[1] + "/set", fps=10, features=features, robot_type="x") as writer:
        for _ in range(60):
            writer.add_episode({"cam": noise, "action": np.zeros((20, 4), np.float32)}, task="t")
except StorageError as error:
    sys.exit(f"StorageError {error}")
"""


def test_file_size_limit(tmp_path):
    result = subprocess.run([sys.executable, "-c", FILL, str(tmp_path), "300000"], capture_output=True, text=True)
    assert "StorageError" in result.stderr, result.stderr
    assert "File too large" in result.stderr
    assert "nothing half-written was left" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tiny_disk):
    result = subprocess.run([sys.executable, "-c", FILL, str(tiny_disk)], capture_output=True, text=True)
    assert "No space left on device" in result.stderr, result.stderr
    assert "StorageError" in result.stderr
    assert list(tiny_disk.iterdir()) == []


# What is refused ----------------------------------------------------------------------------------------------------


def test_refused_episodes_leave_the_writer_usable(tmp_path, episodes):
    good = episodes[0]
    with writer_at(tmp_path / "set") as writer:
        with pytest.raises(MissingFeatureError, match=r"(?s)values for action.*found observation"):
            writer.add_episode({key: value for key, value in good.items() if key != "action"}, task="t")
        with pytest.raises(ConfigError, match=r"(?s)'action' as float32 of shape \(20, 2\).*\(20, 3\).*episode 0"):
            writer.add_episode({**good, "action": np.zeros((20, 3), np.float32)}, task="t")
        with pytest.raises(ConfigError, match=r"'reward' as float32 of shape \(20, 1\)"):
            writer.add_episode({**good, "reward": good["reward"][:7]}, task="t")
        with pytest.raises(ConfigError, match=r"(?s)'observation.images.top' as video.*float64"):
            writer.add_episode({**good, CAMERA: good[CAMERA] / 255}, task="t")
        with pytest.raises(ConfigError, match="'T'"):
            writer.add_episode({key: value[:0] for key, value in good.items()}, task="t")
        bad = good["action"].copy()
        bad[3, 1] = np.nan
        with pytest.raises(BadValueError, match=r"(?s)'action'.*episode 0, frame 3"):
            writer.add_episode({**good, "action": bad}, task="t")
        writer.add_episode(good, task="t")
    assert open_dataset(tmp_path / "set").num_frames == 20


def test_refused_features(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)vectors of shape \(d,\).*\(2, 7\).*'pose'"):
        LeRobotWriter(
            tmp_path / "set",
            fps=10,
            robot_type="x",
            features={"pose": Feature(kind="vector", shape=(2, 7), dtype="float32")},
        )
    assert list(tmp_path.iterdir()) == []


def writer_at(root) -> LeRobotWriter:
    features = {
        CAMERA: Feature(kind="image", shape=(32, 48, 3), dtype="video"),
        "observation.state": Feature(kind="vector", shape=(3,), dtype="float32"),
        "action": Feature(kind="vector", shape=(2,), dtype="float32"),
        "reward": Feature(kind="vector", shape=(1,), dtype="float32"),
    }
    return LeRobotWriter(root, fps=10, features=features, robot_type="tabletop")
