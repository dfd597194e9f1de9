"""Real and synthetic LeRobot datasets against what lerobot itself returned, and against answers in the pixels."""

import json
import pickle
import shutil

import numpy as np
import pytest

from manipi.data.dataset import frames, open_dataset

GOLDEN = [
    ("open50_lerobot_v3", "actions", "state", "image"),
    ("g1_bottle_lerobot_v30", "action", "observation.state", "observation.images.cam_high"),
]
SYNTHETIC = ["lerobot_v21", "lerobot_v30", "lerobot_v30_multi", "lerobot_v30_image"]


@pytest.mark.parametrize(("name", "action", "state", "camera"), GOLDEN)
def test_equals_lerobot(shared_datasets, name, action, state, camera):
    dataset = open_dataset(shared_datasets / name)
    golden = np.load(shared_datasets / name / "golden_lerobot_0.4.4.npz")
    samples = sorted({key.split("/")[0] for key in golden.files}, key=int)
    rows = np.array([golden[f"{sample}/index"] for sample in samples])
    keys = {"cameras": [camera], "state_keys": [state], "action_key": action}
    for sample, frame in zip(samples, frames(dataset, rows, horizon=16, **keys), strict=True):
        np.testing.assert_array_equal(frame.actions, golden[f"{sample}/{action}"])
        np.testing.assert_array_equal(frame.action_valid, ~golden[f"{sample}/{action}_is_pad"])
        np.testing.assert_array_equal(frame.observation[state], golden[f"{sample}/{state}"])
        assert (frame.episode, frame.index) == (golden[f"{sample}/episode_index"], golden[f"{sample}/frame_index"])
        assert frame.prompt == str(golden[f"{sample}/task"])
        blocks = frame.observation[camera].reshape(60, 8, 80, 8, 3).mean((1, 3)) / 255
        np.testing.assert_allclose(blocks.transpose(2, 0, 1), golden[f"{sample}/img60x80"], atol=2e-6)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_pictures_are_those_of_the_row(shared_datasets, name):
    dataset = open_dataset(shared_datasets / f"synthetic_{name}")
    assert [episode.length for episode in dataset.episodes] == [40 + 7 * e for e in range(6)]
    rows = np.concatenate([np.random.default_rng(0).permutation(dataset.num_frames)[:60], [344, 0, 0, 39, 40, 41]])
    expected = rows - dataset.starts[dataset.episode_of(rows)]
    for camera in dataset.cameras:
        np.testing.assert_array_equal(written_numbers(dataset.images(camera, rows)), expected)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_columns_and_prompts(shared_datasets, name):
    dataset = open_dataset(shared_datasets / f"synthetic_{name}")
    row = dataset.episodes[3].start + 5
    np.testing.assert_allclose(
        dataset.column("observation.state")[row], np.sin(0.05 * 5 + np.arange(14) + 3), atol=1e-6
    )
    np.testing.assert_allclose(dataset.column("action")[row], np.sin(0.05 * 6 + np.arange(14) + 3), atol=1e-6)
    assert dataset.column("frame_index")[row] == 5
    assert dataset.column("frame_index").dtype == np.int64
    assert dataset.prompt(row) == dataset.episodes[3].task == "open the drawer"
    assert dataset.features["action"].names == tuple(f"j{i}" for i in range(14))


def test_versions_agree(shared_datasets):
    old, new = (open_dataset(shared_datasets / f"g1_bottle_lerobot_{version}") for version in ("v21", "v30"))
    assert old.features == new.features
    assert old.episodes == new.episodes
    for key in ("observation.state", "action"):
        np.testing.assert_array_equal(old.column(key), new.column(key))
    rows = np.array([1042, 70, 71, 500])
    camera = old.cameras[0]
    np.testing.assert_array_equal(old.images(camera, rows), new.images(camera, rows))


def test_version_2_0(shared_datasets, tmp_path):
    root = tmp_path / "v20"
    shutil.copytree(shared_datasets / "synthetic_lerobot_v21", root, copy_function=shutil.copyfile)
    (root / "meta").chmod(0o755)
    info = json.loads((root / "meta/info.json").read_text()) | {"codebase_version": "v2.0"}
    info["features"]["action"]["names"] = {"motors": [f"m{i}" for i in range(14)]}
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/episodes_stats.jsonl").unlink()
    dataset = open_dataset(root)
    assert dataset.num_frames == 345
    assert dataset.features["action"].names[13] == "m13"


@pytest.mark.parametrize("name", ["synthetic_lerobot_v21", "synthetic_lerobot_v30", "synthetic_lerobot_v30_image"])
def test_fingerprint_and_pickling(shared_datasets, tmp_path, name):
    dataset = open_dataset(shared_datasets / name)
    copy = tmp_path / "elsewhere"
    shutil.copytree(dataset.root, copy, copy_function=shutil.copyfile)
    again = pickle.loads(pickle.dumps(dataset))
    assert dataset.fingerprint == open_dataset(copy).fingerprint == again.fingerprint


def written_numbers(images: np.ndarray) -> np.ndarray:
    """The frame numbers in the top-left corners, as black or white blocks of 24 pixels."""
    bits = images[:, 12, 12 : 24 * 8 : 24].mean(-1) > 127
    return (bits << np.arange(8)).sum(-1)
