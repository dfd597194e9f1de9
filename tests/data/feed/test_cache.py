"""Cached pictures are the decoded ones, whoever fills the cache and whatever interrupts them; its size is bounded."""

import multiprocessing
import pickle
import shutil
import tarfile
import time
from pathlib import Path

import av
import numpy as np
import pytest

from manipi.data.dataset import frames
from manipi.data.feed.cache import CachedDataset
from manipi.data.lerobot.video import VideoWriter
from manipi.data.open import open_dataset
from manipi.errors import ConfigError, DatasetFormatError, MissingFeatureError, StorageError
from manipi.transforms.model_input import resize_with_pad

SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4

CAMERA = "observation.images.top"
TESTS = Path(__file__).parents[2]
OF_0_1_0 = TESTS / "train/run/run_of_0.1.0.tar.xz", TESTS / "data/feed/pictures_of_0.1.0.tar.xz"
"""A dataset, and what the cache of manipi 0.1.0 kept of it at 8 x 8."""
ROWS = np.array([49, 0, 7, 7, 20])


def test_same_pictures_without_the_videos(written, tmp_path):
    root = shutil.copytree(written, tmp_path / "set")
    expected = open_dataset(root).images(CAMERA, ROWS)
    cached = CachedDataset(open_dataset(root), [CAMERA], tmp_path / "cache")
    np.testing.assert_array_equal(cached.images(CAMERA, ROWS), expected)
    shutil.rmtree(root / "videos")
    again = CachedDataset(open_dataset(root), [CAMERA], tmp_path / "cache")
    for served in (cached, again, pickle.loads(pickle.dumps(cached))):
        np.testing.assert_array_equal(served.images(CAMERA, ROWS), expected)


@pytest.mark.parametrize("format", ["raw", "jpeg"])
def test_filled_ahead(written, tmp_path, format):
    root = shutil.copytree(written, tmp_path / "set")
    expected = CachedDataset(open_dataset(root), [CAMERA], tmp_path / "other", format=format).images(CAMERA, ROWS)
    cached = CachedDataset(open_dataset(root), [CAMERA], tmp_path / "cache", format=format)
    cached.images(CAMERA, ROWS[:2])
    cached.fill(show=False)
    shutil.rmtree(root / "videos")
    np.testing.assert_array_equal(cached.images(CAMERA, ROWS), expected)
    cached.fill(show=False)  # nothing is left to do


@pytest.mark.parametrize("format", ["raw", "jpeg"])
def test_pictures_that_0_1_0_kept_are_served(tmp_path, format):
    for recorded in OF_0_1_0:
        with tarfile.open(recorded) as archive:
            archive.extractall(
                tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
            )  # since 3.11.4
    files = [path for path in (tmp_path / "pictures").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    assert len(before) == 4
    dataset = open_dataset(tmp_path / "dataset")
    rows = np.arange(dataset.num_frames)
    decoded = np.stack([resize_with_pad(image, 8, 8) for image in dataset.images("observation/image", rows)])
    cached = CachedDataset(dataset, ["observation/image"], tmp_path / "pictures", 8, format=format)
    shutil.rmtree(tmp_path / "dataset/videos")
    served = cached.images("observation/image", rows)
    # Other versions of FFmpeg may round the colours otherwise; JPEG loses some.
    assert np.abs(served.astype(int) - decoded).max() <= (1 if format == "raw" else 8)
    assert {path: path.read_bytes() for path in files} == before


def test_the_rest_is_the_dataset(dataset, tmp_path):
    cached = CachedDataset(dataset, [], tmp_path)
    keys = {"cameras": [CAMERA], "state_keys": ["observation.state"], "action_key": "action", "horizon": 3}
    for ours, theirs in zip(frames(cached, ROWS, **keys), frames(dataset, ROWS, **keys), strict=True):
        assert (ours.prompt, ours.episode, ours.index) == (theirs.prompt, theirs.episode, theirs.index)
        np.testing.assert_array_equal(ours.actions, theirs.actions)
        np.testing.assert_array_equal(ours.observation[CAMERA], theirs.observation[CAMERA])
    assert cached.fingerprint == dataset.fingerprint
    assert cached.column("action") is dataset.column("action")


@pytest.mark.parametrize("format", ["raw", "jpeg"])
def test_pictures_of_videos_that_were_replaced_are_forgotten(written, tmp_path, format):
    root, folder = shutil.copytree(written, tmp_path / "set"), tmp_path / "cache"
    old = CachedDataset(open_dataset(root), [CAMERA], folder, format=format).images(CAMERA, ROWS)
    for path in (root / "videos" / CAMERA).rglob("*.mp4"):
        turn_round(path)
    expected = CachedDataset(open_dataset(root), [CAMERA], tmp_path / "other", format=format).images(CAMERA, ROWS)
    again = CachedDataset(open_dataset(root), [CAMERA], folder, format=format)
    for served in (again, pickle.loads(pickle.dumps(again))):
        np.testing.assert_array_equal(served.images(CAMERA, ROWS), expected)
    assert not np.array_equal(old, expected)


def turn_round(path):
    """The same file with other colours."""
    with av.open(str(path)) as container:
        images = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        rate = int(container.streams.video[0].average_rate)
    video = VideoWriter(path, fps=rate, height=images.shape[1], width=images.shape[2])
    video.add(255 - images)
    video.close()


def test_pickle_holds_no_pictures(dataset, tmp_path):
    cached = CachedDataset(dataset, [CAMERA], tmp_path)
    assert len(pickle.dumps(cached)) < 5_000


def test_only_what_was_asked_for_is_there(written, tmp_path):
    root = shutil.copytree(written, tmp_path / "set")
    cached = CachedDataset(open_dataset(root), [CAMERA], tmp_path / "cache")
    expected = cached.images(CAMERA, ROWS)
    shutil.rmtree(root / "videos")
    np.testing.assert_array_equal(cached.images(CAMERA, ROWS), expected)
    with pytest.raises(DatasetFormatError, match="episode 0, frame 1"):
        cached.images(CAMERA, np.array([0, 1]))


def test_processes_fill_it_together(written, tmp_path):
    expected = open_dataset(written).images(CAMERA, np.arange(50))
    context = multiprocessing.get_context("spawn")
    cached = CachedDataset(open_dataset(written), [CAMERA], tmp_path)
    fillers = [context.Process(target=fill, args=(cached, CAMERA, 50)) for _ in range(3)]
    for filler in fillers:
        filler.start()
    for filler in fillers:
        filler.join()
        assert filler.exitcode == 0
    assert_complete(cached, expected)


def test_killed_while_filling(written, tmp_path):
    expected = open_dataset(written).images(CAMERA, np.arange(50))
    context = multiprocessing.get_context("spawn")
    cached = CachedDataset(open_dataset(written), [CAMERA], tmp_path)
    filler = context.Process(target=fill, args=(cached, CAMERA, 50, 0.05))
    filler.start()
    present = next(tmp_path.rglob("present"))
    while not any(present.read_bytes()):
        assert filler.is_alive()
        time.sleep(0.01)
    filler.kill()
    filler.join()
    kept = np.count_nonzero(np.fromfile(present, np.uint64))
    assert 0 < kept < 50
    again = CachedDataset(open_dataset(written), [CAMERA], tmp_path)
    np.testing.assert_array_equal(again.images(CAMERA, np.arange(50)), expected)
    assert_complete(again, expected)


def test_torn_picture_is_decoded_again(dataset, tmp_path):
    cached = CachedDataset(dataset, [CAMERA], tmp_path)
    expected = cached.images(CAMERA, np.arange(50))
    frames_file = next(tmp_path.rglob("frames"))
    with frames_file.open("r+b") as file:  # as a crashed machine may leave it: the table on the disk, the picture not
        file.seek(20 * 32 * 48 * 3 + 100)
        file.write(bytes(1000))
    np.testing.assert_array_equal(cached.images(CAMERA, np.arange(50)), expected)
    assert_complete(cached, expected)


def test_jpeg_is_the_same_from_the_first_time_on(dataset, tmp_path):
    plain = dataset.images(CAMERA, np.arange(50)).astype(int)
    for max_gb in (1.0, 0.0):  # kept, and not kept
        cached = CachedDataset(dataset, [CAMERA], tmp_path / str(max_gb), format="jpeg", max_gb=max_gb)
        first = cached.images(CAMERA, np.arange(50))
        np.testing.assert_array_equal(cached.images(CAMERA, ROWS), first[ROWS])
        assert np.abs(first - plain).max() < 40
        assert np.abs(first - plain).mean() < 1
    frames_files = sorted(tmp_path.rglob("frames"))
    assert [path.stat().st_blocks > 0 for path in frames_files] == [False, True]


def test_size_bound(dataset, tmp_path):
    with pytest.raises(
        ConfigError, match=r"(?s)at most 0.0001 GB.*0.00 GB for observation.images.top.*--data.cache jpeg"
    ):
        CachedDataset(dataset, [CAMERA], tmp_path, max_gb=1e-4)


def test_disk_too_small(shared_datasets, tiny_disk):
    dataset = open_dataset(shared_datasets / "synthetic_lerobot_v30")
    camera = "observation.images.cam_left_wrist"
    with pytest.raises(StorageError, match=r"(?s)room for \d+ MB of decoded .*cam_left_wrist.*--data.cache jpeg"):
        CachedDataset(dataset, [camera], tiny_disk)
    cached = CachedDataset(dataset, [camera], tiny_disk, format="jpeg")
    with pytest.raises(StorageError, match=r"(?s)No space left.*--data.cache none"):
        cached.images(camera, np.arange(dataset.num_frames))


def fill(cached: CachedDataset, camera: str, count: int, pause: float = 0.0) -> None:
    for row in range(count):
        cached.images(camera, np.array([row]))
        time.sleep(pause)


def assert_complete(cached: CachedDataset, expected: np.ndarray) -> None:
    """Every picture comes from the cache, and is the decoded one."""
    cached._dataset = None
    np.testing.assert_array_equal(cached.images(CAMERA, np.arange(len(expected))), expected)


def test_missing_camera(dataset, tmp_path):
    with pytest.raises(MissingFeatureError, match="image 'wrist'"):
        CachedDataset(dataset, ["wrist"], tmp_path)


def test_smaller_pictures_are_those_of_the_pipeline(dataset, tmp_path):
    cached = CachedDataset(dataset, [CAMERA], tmp_path, 16)
    expected = [resize_with_pad(image, 16, 16) for image in dataset.images(CAMERA, ROWS)]
    for served in (cached, pickle.loads(pickle.dumps(cached))):
        np.testing.assert_array_equal(served.images(CAMERA, ROWS), expected)
        assert served.features[CAMERA].shape == (16, 16, 3)
    full = CachedDataset(dataset, [CAMERA], tmp_path)
    np.testing.assert_array_equal(full.images(CAMERA, ROWS), dataset.images(CAMERA, ROWS))
