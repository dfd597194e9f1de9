"""Which arrays of a recording are pictures, and that they come out as they were, however they are stored."""

import importlib
import io
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from manipi.convert.convert import ConvertSettings, convert
from manipi.convert.formats import kind_of, open_reader
from manipi.data.open import open_dataset
from manipi.errors import DatasetFormatError, MissingFeatureError

CASES = Path(os.environ.get("MANIPI_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "cases/data"


def smooth(length: int) -> np.ndarray:
    """[n, 32, 48, 3], every channel from 20 to below 250 and never two frames alike."""
    frame, y, x = np.meshgrid(np.arange(length), np.arange(32), np.arange(48), indexing="ij")
    return np.stack([frame * 7 + 20 + x, y * 3 + 40, x * 2 + 90], axis=-1).astype(np.uint8)


COLOURS = smooth(12)
GREY = COLOURS[..., :1].repeat(3, axis=3)


@pytest.fixture
def recordings(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "data")
    return importlib.import_module("recordings")


def run(root, target, **settings):
    source = open_reader(root)
    return convert(source, target, ConvertSettings(task="t", crf=0, **settings), num_workers=0, show=False)


@pytest.fixture
def zarr_of(recordings):
    """A Zarr store with two episodes of these arrays, beside actions and a state."""

    def write(folder, **arrays):
        folder.mkdir(exist_ok=True)
        vectors = {"action": recordings.numbers(12, 2, 0), "state": recordings.numbers(12, 2, 1)}
        return recordings.write_zarr(folder / "set.zarr", vectors | arrays, [5, 12])

    return write


def video(target):
    return (target / "videos/observation.images.img/chunk-000/file-000.mp4").read_bytes()


UNIT = COLOURS.astype(np.float32) / 255
STORED = {
    "[N, 3, h, w]": (COLOURS, np.moveaxis(COLOURS, 3, 1)),
    "[N, h, w, 1]": (GREY, GREY[..., :1]),
    "[N, 1, h, w]": (GREY, np.moveaxis(GREY[..., :1], 3, 1)),
    "[N, h, w]": (GREY, GREY[..., 0]),
    "float32 to 1": (COLOURS, UNIT),
    "float64 to 1": (COLOURS, COLOURS / 255),
    "float16 to 1": (COLOURS, (COLOURS / 255).astype(np.float16)),
    "float32 to 1, [N, 3, h, w]": (COLOURS, np.moveaxis(UNIT, 3, 1)),
    "float32 to 1, [N, h, w, 1]": (GREY, GREY[..., :1].astype(np.float32) / 255),
    "float32 to 255": (COLOURS, COLOURS.astype(np.float32)),
    "int64": (COLOURS, COLOURS.astype(np.int64)),
}


@pytest.mark.parametrize("stored", STORED)
def test_pictures_come_out_as_they_were_however_they_are_stored(zarr_of, tmp_path, stored):
    """To the byte: the encoder was given the same pictures as where they are uint8 [N, h, w, 3]."""
    plain, images = STORED[stored]
    run(zarr_of(tmp_path / "plain", img=plain), tmp_path / "plain/out", fps=10)
    report = run(zarr_of(tmp_path / "stored", img=images), tmp_path / "stored/out", fps=10)
    assert open_dataset(tmp_path / "stored/out").cameras == ["observation.images.img"]
    assert video(tmp_path / "stored/out") == video(tmp_path / "plain/out")
    assert [key for key, _ in report.remarks] == ["observation.images.img"]  # what is unusual is said


@pytest.mark.parametrize("layout", ["aloha", "robomimic"])
@pytest.mark.parametrize("stored", ["[N, 3, h, w]", "float32 to 1", "[N, h, w]"])
def test_hdf5_likewise(recordings, tmp_path, layout, stored):
    plain, images = STORED[stored]
    with h5py.File(tmp_path / "episode_0.hdf5", "w") as file:
        if layout == "aloha":
            file["action"] = file["observations/qpos"] = recordings.numbers(12, 14, 0)
            file["observations/images/img"] = images
        else:
            file["data/demo_0/actions"] = recordings.numbers(12, 7, 0)
            file["data/demo_0/obs/img"] = images
    run(tmp_path / "episode_0.hdf5", tmp_path / "out", fps=10, pix_fmt="yuv444p")
    shown = open_dataset(tmp_path / "out").images("observation.images.img", np.arange(12)).astype(int)
    assert np.abs(shown - plain).max() <= 3


def test_chunks_that_a_zarr_store_lacks_are_said(zarr_of, tmp_path):
    """They read as zeros, and nothing else tells a broken copy."""
    root = zarr_of(tmp_path, img=COLOURS)
    assert run(root, tmp_path / "whole", fps=10).remarks == ()
    chunks = [path for path in (root / "data/img").rglob("*") if path.is_file() and path.name[0].isdigit()]
    chunks[0].unlink()
    ((feature, text),) = run(root, tmp_path / "broken", fps=10).remarks
    assert feature == "observation.images.img"
    assert text.startswith(f"1 of {len(chunks)} chunks are not in the store, and read as 0")
    assert run(root, tmp_path / "without", fps=10, exclude=("observation.images.img",)).remarks == ()


def test_floats_that_begin_in_the_dark(zarr_of, tmp_path):
    """Black says nothing about the range; the first picture that is not black does."""
    for name, scale in (("unit", 255), ("whole", 1)):
        dark = COLOURS.astype(np.float32) / scale
        dark[5:7] = 0
        run(zarr_of(tmp_path / name, img=dark), tmp_path / name / "out", fps=10)
    assert video(tmp_path / "unit/out") == video(tmp_path / "whole/out")


def test_depth_is_left_out_by_name(zarr_of, tmp_path):
    depth = np.random.default_rng(0).integers(300, 4000, (12, 32, 48))
    arrays = {
        "head_depth": depth.astype(np.float32),
        "depth_u8": (depth // 16).astype(np.uint8),
        "range": depth.astype(np.uint16),
        "range_1": depth.astype(np.uint16)[..., None],
    }
    report = run(zarr_of(tmp_path, img=COLOURS, **arrays), tmp_path / "out", fps=10)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.cameras == ["observation.images.img"]
    assert not [key for key in dataset.features if "range" in key or "depth" in key]
    names = {f"observation.images.{name}" for name in arrays}
    assert {key for key, text in report.remarks if text == "records depth, not colours: left out"} == names


REFUSED = {
    "four channels": (np.zeros((12, 32, 48, 4), np.uint8), r"uint8 of shape \(32, 48, 4\)"),
    "a history of pictures": (np.zeros((12, 2, 32, 48, 3), np.uint8), r"shape \(2, 32, 48, 3\)"),
    "masks": (np.zeros((12, 32, 48), bool), "bool of shape"),
    "16 bits": (COLOURS.astype(np.uint16), "uint16 from"),
    "from -1 to 1": (UNIT * 2 - 1, "float32 from -"),
    "halves": (COLOURS / 2, "whole numbers from 0 to 255, or floats from 0 to 1"),
    "NaN": (np.where(UNIT > 0.5, np.nan, UNIT), "float32 from nan to nan"),
    "two ranges": (np.concatenate([UNIT[:6], COLOURS[6:]]), "one of them in all of an episode"),
}


@pytest.mark.parametrize("stored", REFUSED)
def test_what_is_no_picture_is_refused_and_can_be_left_out(zarr_of, tmp_path, stored):
    images, message = REFUSED[stored]
    root = zarr_of(tmp_path, img=images)
    with pytest.raises(DatasetFormatError, match=f"(?s){message}.*next [^\n]*--exclude"):
        run(root, tmp_path / "out", fps=10)
    run(root, tmp_path / "other", fps=10, exclude=("observation.images.img",))
    assert open_dataset(tmp_path / "other").cameras == []


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2,), "f4"), ((9, 2), "f4"), ((3, 3), "f8"), ((4, 4), "u1"), ((1024, 6), "f4"), ((2, 21, 3), "f4"), ((), "i8")],
)
def test_what_is_too_small_for_a_picture_is_a_vector(shape, dtype):
    assert kind_of("keypoints", shape, np.dtype(dtype)) == "vector"


def test_depth_in_a_png_of_16_bits(recordings, tmp_path):
    """It would be white all over."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((48, 64), 1500, np.uint16)).save(buffer, "PNG")
    row = np.frombuffer(buffer.getvalue(), np.uint8)
    with h5py.File(recordings.write_aloha(tmp_path / "source", (4,), cameras=()) / "episode_0.hdf5", "a") as file:
        file["observations/images/d"] = np.stack([row] * 4)
    with pytest.raises(DatasetFormatError, match=r"(?s)8 bits per channel.*PNG of 16 bits.*, d, frame 0.*--exclude"):
        run(tmp_path / "source", tmp_path / "out")


def test_what_is_no_picture_among_the_cameras_can_be_left_out(recordings, tmp_path):
    with h5py.File(recordings.write_aloha(tmp_path / "source", (4,), cameras=("top",)) / "episode_0.hdf5", "a") as file:
        file["observations/images/pose"] = recordings.numbers(4, 5, 0)
        file["observations/images/more/left"] = recordings.pictures(4)
    with pytest.raises(DatasetFormatError, match=r"(?s)float32 of shape \(5,\).*, pose.*--exclude"):
        run(tmp_path / "source", tmp_path / "out", exclude=("observation.images.more",))
    with pytest.raises(DatasetFormatError, match=r"(?s)pictures, raw or encoded.*group.*more.*--exclude"):
        run(tmp_path / "source", tmp_path / "out", exclude=("observation.images.pose",))
    left_out = ("observation.images.pose", "observation.images.more")
    run(tmp_path / "source", tmp_path / "out", exclude=left_out)
    assert open_dataset(tmp_path / "out").cameras == ["observation.images.top"]


# ---- channels in another order


@pytest.mark.parametrize(("swapped", "changed"), [(None, ()), ((), (0, 1)), (("observation.images.cam_high",), (0,))])
def test_swapped_channels(recordings, tmp_path, swapped, changed):
    root = recordings.write_aloha(tmp_path / "source", (5,))
    run(root, tmp_path / "out", swap_channels=swapped, pix_fmt="yuv444p")
    dataset = open_dataset(tmp_path / "out")
    for number, camera in enumerate(("cam_high", "cam_left_wrist")):
        recorded = recordings.pictures(5, number)
        recorded = recorded[..., ::-1] if number in changed else recorded
        shown = dataset.images(f"observation.images.{camera}", np.arange(5)).astype(int)
        assert np.abs(shown - recorded).max() <= 3, camera


def test_channels_of_a_camera_that_is_not_there(recordings, tmp_path):
    root = recordings.write_aloha(tmp_path / "source", (5,))
    with pytest.raises(MissingFeatureError, match=r"(?s)--swap-channels, among observation.images.cam_high.*'cam_low'"):
        run(root, tmp_path / "out", swap_channels=("cam_low",))


def test_the_cases_of_others(tmp_path):
    if not CASES.is_dir():
        pytest.skip(f"the cases are not at {CASES}; set MANIPI_SHARED")
    run(CASES / "zarr_channels_first.zarr", tmp_path / "zarr", fps=10)
    dataset = open_dataset(tmp_path / "zarr")
    assert dataset.features["observation.images.img"].shape == (48, 256, 3)
    assert "observation.img" not in dataset.features
    run(CASES / "jpeg_swapped_colours", tmp_path / "jpeg", swap_channels=())
    means = open_dataset(tmp_path / "jpeg").images("observation.images.cam_high", np.arange(2)).mean((0, 1, 2))
    assert means[0] > 150 > 100 > means[2]
