"""Cached pictures are the decoded ones; a changed or too large dataset is noticed."""

import pickle
import shutil

import numpy as np
import pytest

from manipi.data.cache import CachedDataset
from manipi.data.dataset import frames, open_dataset
from manipi.errors import ConfigError, DatasetFormatError, MissingFeatureError, StorageError
from manipi.transforms.images import resize_with_pad

CAMERA = "observation.images.top"
ROWS = np.array([49, 0, 7, 7, 20])


def test_same_pictures_without_the_videos(written, tmp_path):
    root = shutil.copytree(written, tmp_path / "set")
    expected = open_dataset(root).images(CAMERA, ROWS)
    cached = CachedDataset(open_dataset(root), [CAMERA], tmp_path / "cache", show=False)
    shutil.rmtree(root / "videos")
    again = CachedDataset(open_dataset(root), [CAMERA], tmp_path / "cache", show=False)
    for served in (cached, again, pickle.loads(pickle.dumps(cached))):
        np.testing.assert_array_equal(served.images(CAMERA, ROWS), expected)


def test_the_rest_is_the_dataset(dataset, tmp_path):
    cached = CachedDataset(dataset, [], tmp_path, show=False)
    keys = {"cameras": [CAMERA], "state_keys": ["observation.state"], "action_key": "action", "horizon": 3}
    for ours, theirs in zip(frames(cached, ROWS, **keys), frames(dataset, ROWS, **keys), strict=True):
        assert (ours.prompt, ours.episode, ours.index) == (theirs.prompt, theirs.episode, theirs.index)
        np.testing.assert_array_equal(ours.actions, theirs.actions)
        np.testing.assert_array_equal(ours.observation[CAMERA], theirs.observation[CAMERA])
    assert cached.fingerprint == dataset.fingerprint
    assert cached.column("action") is dataset.column("action")


def test_pickle_holds_no_pictures(dataset, tmp_path):
    cached = CachedDataset(dataset, [CAMERA], tmp_path, show=False)
    assert len(pickle.dumps(cached)) < 5_000


def test_size_bound(dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)at most 0.0001 GB.*0.00 GB for observation.images.top.*--data.cache"):
        CachedDataset(dataset, [CAMERA], tmp_path, max_gb=1e-4, show=False)


def test_disk_too_small(shared_datasets, tiny_disk):
    dataset = open_dataset(shared_datasets / "synthetic_lerobot_v30")
    with pytest.raises(StorageError, match=r"(?s)0.05 GB for .*cam_left_wrist of free space.*--data.cache none"):
        CachedDataset(dataset, ["observation.images.cam_left_wrist"], tiny_disk, show=False)


def test_nothing_half_decoded_stays(written, tmp_path):
    root = shutil.copytree(written, tmp_path / "set")
    video = next(root.rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:2000])
    with pytest.raises(DatasetFormatError, match="episode 0, frame 0"):
        CachedDataset(open_dataset(root), [CAMERA], tmp_path / "cache", show=False)
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_missing_camera(dataset, tmp_path):
    with pytest.raises(MissingFeatureError, match="image 'wrist'"):
        CachedDataset(dataset, ["wrist"], tmp_path, show=False)


def test_smaller_pictures_are_those_of_the_pipeline(dataset, tmp_path):
    cached = CachedDataset(dataset, [CAMERA], tmp_path, 16, show=False)
    expected = [resize_with_pad(image, 16, 16) for image in dataset.images(CAMERA, ROWS)]
    for served in (cached, pickle.loads(pickle.dumps(cached))):
        np.testing.assert_array_equal(served.images(CAMERA, ROWS), expected)
        assert served.features[CAMERA].shape == (16, 16, 3)
    full = CachedDataset(dataset, [CAMERA], tmp_path, show=False)
    np.testing.assert_array_equal(full.images(CAMERA, ROWS), dataset.images(CAMERA, ROWS))
