"""Frames and action chunks; and every way in which a dataset can be broken, with the message that names it."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manipi.data.dataset import EpisodeSubset, action_chunks, frames
from manipi.data.open import open_dataset
from manipi.errors import (
    ConfigError,
    DatasetFormatError,
    DatasetNotFoundError,
    MissingFeatureError,
)

CAMERA = "observation.images.top"
TABLE = "data/chunk-000/file-000.parquet"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def test_chunks_stop_at_the_end_of_their_episode(dataset, episodes):
    rows = np.arange(dataset.num_frames)
    actions, valid = action_chunks(dataset, rows, action_key="action", horizon=6)
    row = 0
    for episode in episodes:
        recorded = episode["action"]
        for start in range(len(recorded)):
            steps = np.arange(start, start + 6)
            np.testing.assert_array_equal(actions[row], recorded[np.minimum(steps, len(recorded) - 1)])
            np.testing.assert_array_equal(valid[row], steps < len(recorded))
            row += 1


def test_frames_come_in_the_order_asked_for(dataset, episodes):
    rows = np.array([48, 3, 20, 3, 40])
    keys = {"cameras": [CAMERA], "state_keys": ["observation.state", "reward"], "action_key": "action"}
    found = frames(dataset, rows, horizon=2, **keys)
    assert [(frame.episode, frame.index) for frame in found] == [(4, 7), (0, 3), (1, 0), (0, 3), (3, 0)]
    for frame in found:
        for key in ("observation.state", "reward"):
            np.testing.assert_array_equal(frame.observation[key], episodes[frame.episode][key][frame.index])
        difference = frame.observation[CAMERA].astype(int) - episodes[frame.episode][CAMERA][frame.index]
        assert np.abs(difference).mean() < 3
    assert [frame.prompt for frame in found[:3]] == ["push the block", "push the block", "öffne die Schublade"]


@pytest.mark.parametrize("name", ["", "synthetic_lerobot_v21", "synthetic_droid_rlds/droidlike/1.0.0"])
def test_instructions_are_those_of_the_rows(name, dataset, shared_datasets, tmp_path, monkeypatch):
    """Those of a whole dataset in one go, as the prompts of its rows one by one."""
    monkeypatch.setenv("MANIPI_HOME", str(tmp_path))
    whole = (
        open_dataset(shared_datasets / name, fields="droid_joint_position" if "rlds" in name else "")
        if name
        else dataset
    )
    chosen = EpisodeSubset(whole, [whole.episodes[-1].index, whole.episodes[0].index])
    for some in (whole, chosen):
        texts, numbers = some.instructions("task")
        assert len(numbers) == some.num_frames
        possible = [{texts[number] for number in row} for row in numbers.tolist()]
        assert all(some.prompt(row) in texts for row, texts in enumerate(possible))
        assert "rlds" in name or all(len(texts) == 1 for texts in possible)
    with pytest.raises(MissingFeatureError, match=r"--data\.prompt task"):
        whole.instructions("subtask")


def test_columns_are_shared_and_read_only(dataset):
    assert dataset.column("action") is dataset.column("action")
    with pytest.raises(ValueError, match="read-only"):
        dataset.column("action")[0] = 1


def test_fingerprint_follows_the_data(root):
    before = open_dataset(root).fingerprint
    edit_table(root, "action", lambda values: values.__setitem__((5, 0), values[5, 0] + 1e-3))
    assert open_dataset(root).fingerprint != before


# What can be wrong ----------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"(?s)found nothing\n.*absent\n.*ls "):
        open_dataset(tmp_path / "absent")


def test_folder_of_something_else(tmp_path):
    (tmp_path / "episode_0.hdf5").touch()
    with pytest.raises(DatasetNotFoundError, match=r"(?s)meta/info\.json.*found \['episode_0.hdf5'\].*manipi convert"):
        open_dataset(tmp_path)


def test_folder_that_lost_its_metadata(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DatasetFormatError, match=r"(?s)a metadata file.*info\.json.*hf download"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("counts", [{"total_episodes": 0}, {"total_episodes": 0, "total_frames": 0}])
def test_empty(root, counts):
    edit_info(root, **counts)
    with pytest.raises(DatasetNotFoundError, match="at least one episode"):
        open_dataset(root)


def test_counts_disagree(root):
    edit_info(root, total_frames=51)
    with pytest.raises(DatasetFormatError, match=r"(?s)51 frames in all.*found 50\n.*manipi check"):
        open_dataset(root)


def test_broken_json(root):
    (root / "meta/info.json").write_text("{")
    with pytest.raises(DatasetFormatError, match=r"(?s)JSON.*info\.json"):
        open_dataset(root)


def test_missing_entry(root):
    info = json.loads((root / "meta/info.json").read_text())
    del info["fps"]
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetFormatError, match="'fps'"):
        open_dataset(root)


@pytest.mark.parametrize("name", ["info.json", "tasks.parquet", "episodes/chunk-000/file-000.parquet"])
def test_missing_metadata(root, name):
    (root / "meta" / name).unlink()
    with pytest.raises(DatasetFormatError, match=r"(?s)where .*meta/.*next hf download"):
        open_dataset(root)


def test_missing_metadata_column(root):
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).drop(["length"]), path)
    with pytest.raises(DatasetFormatError, match=r"columns length(?s:.)*file-000\.parquet"):
        open_dataset(root)


def test_missing_table(root):
    (root / TABLE).unlink()
    with pytest.raises(DatasetFormatError, match=TABLE):
        open_dataset(root).column("action")


def test_truncated_table(root):
    (root / TABLE).write_bytes((root / TABLE).read_bytes()[:-50])
    with pytest.raises(DatasetFormatError, match=rf"(?s)readable.*{TABLE}"):
        open_dataset(root).column("action")


def test_wrong_width(root):
    edit_info_feature(root, "action", shape=[4])
    with pytest.raises(DatasetFormatError, match=r"(?s)4 numbers per row in 'action'.*100 numbers in 50 rows"):
        open_dataset(root).column("action")


def test_missing_camera(dataset):
    keys = {"cameras": ["observation.images.wrist"], "state_keys": [], "action_key": "action", "horizon": 2}
    with pytest.raises(MissingFeatureError, match=rf"(?s)image 'observation.images.wrist'.*only {CAMERA}.*inspect"):
        frames(dataset, np.array([0]), **keys)


def test_require_checks_kind_and_size(dataset):
    dataset.require("action", "vector", 2)
    with pytest.raises(MissingFeatureError, match=r"(?s)vector 'action' of size 7.*shape \(2,\)"):
        dataset.require("action", "vector", 7)
    with pytest.raises(MissingFeatureError, match=rf"(?s)vector '{CAMERA}'.*found image"):
        dataset.column(CAMERA)


def test_rows_beyond_the_end(dataset):
    with pytest.raises(ConfigError, match=r"(?s)between 0 and 49.*rows -1 to 50"):
        dataset.images(CAMERA, np.array([50, -1]))


def test_broken_picture_in_a_table(shared_datasets, tmp_path):
    root = shutil.copytree(
        shared_datasets / "synthetic_lerobot_v30_image", tmp_path / "set", copy_function=shutil.copyfile
    )
    camera = "observation.images.cam_left_wrist"
    table = pq.read_table(root / TABLE)
    pictures = table.column(camera).to_pylist()
    pictures[41]["bytes"] = pictures[41]["bytes"][:100]
    column = pa.array(pictures, table.schema.field(camera).type)
    (root / TABLE).unlink()
    pq.write_table(table.set_column(table.column_names.index(camera), camera, column), root / TABLE)
    dataset = open_dataset(root)
    assert dataset.images(camera, np.array([40])).shape == (1, 224, 224, 3)
    with pytest.raises(DatasetFormatError, match=rf"(?s)an encoded picture.*{TABLE}, episode 1, frame 1\n"):
        dataset.images(camera, np.array([41]))


def test_missing_video(root):
    (root / VIDEO).unlink()
    with pytest.raises(DatasetFormatError, match=rf"(?s)found nothing.*{VIDEO}, episode 2, frame 1\n.*hf download"):
        open_dataset(root).images(CAMERA, np.array([28]))


def edit_info(root, **entries):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_info_feature(root, key, **entries):
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"][key] |= entries
    path.write_text(json.dumps(info))


def edit_table(root, key, change):
    table = pq.read_table(root / TABLE)
    column = table.column(key).combine_chunks()
    is_list = pa.types.is_fixed_size_list(column.type)
    values = (column.flatten() if is_list else column).to_numpy().reshape(len(column), -1).copy()
    change(values)
    array = pa.array(values.ravel())
    array = pa.FixedSizeListArray.from_arrays(array, values.shape[1]) if is_list else array
    pq.write_table(table.set_column(table.column_names.index(key), key, array), root / TABLE)
