"""The picture of a row is the one at from_timestamp + timestamp, LeRobot's rule, or there is none and it is said."""

import av
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.addressed import CAMERA, LENGTHS, addresses, edit_column, picture, write_set
from tests.data.encoders import encode, samples

from manipi.convert.convert import ConvertSettings, convert
from manipi.convert.formats import open_reader
from manipi.data.feed.cache import CachedDataset
from manipi.data.lerobot.index import off_grid
from manipi.data.lerobot.reader import LeRobotDataset
from manipi.data.open import open_dataset
from manipi.data.review.check import check_dataset, sort_episodes
from manipi.data.review.values import uneven_timestamps
from manipi.errors import DatasetFormatError

VERSIONS = ["v2.1", "v3.0"]
CUT = [[*range(4), *range(7, length)] for length in LENGTHS]
TRIMMED = [range(3, length) for length in LENGTHS]
READ = {
    "sound": {},
    "rows removed": {"rows": CUT},
    "rows removed from one episode": {"rows": [range(LENGTHS[0]), CUT[1], range(LENGTHS[2])]},
    "trimmed start": {"rows": TRIMMED},
    "every second row": {"rows": [range(0, length, 2) for length in LENGTHS]},
    "one row each": {"rows": [[length - 1] for length in LENGTHS]},
    "rows and video faster than info.json": {"video_fps": 20, "seconds": lambda e, frames: frames / 20},
    "times of a clock that wanders": {"seconds": lambda e, frames: frames / 10 + 0.02 * np.sin(frames)},
    "rows removed, times in float64": {"rows": CUT, "time_type": pa.float64()},
    "rows removed, whole seconds as integers": {
        "rows": CUT,
        "fps": 1,
        "video_fps": 1,
        "time_type": pa.int64(),
        "seconds": lambda e, frames: frames,
    },
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", READ)
def test_pictures_are_found_by_time(kind, version, tmp_path):
    changes = READ[kind]
    root = write_set(tmp_path / "set", version, **changes)
    rows = changes.get("rows", [range(length) for length in LENGTHS])
    expected = [(frame, e) for e, kept in enumerate(rows) for frame in kept]
    dataset = open_dataset(root)
    np.testing.assert_array_equal(addresses(dataset.images(CAMERA, np.arange(len(expected)))), expected)
    report = check_dataset(root)
    off = [e for e, kept in enumerate(rows) if list(kept) != list(range(len(kept)))]
    off = off if changes.get("video_fps", 10) <= 10 else [0, 1, 2]
    found = [
        f.episodes[0] for f in report.findings if f.check == "timestamps" and "are taken at the timestamps" in f.what
    ]
    assert found == off
    assert not report.count("error"), report.findings
    assert not sort_episodes(root)[1]


@settings(max_examples=25)
@given(data=st.data(), version=st.sampled_from(VERSIONS))
def test_whatever_rows_are_left(data, version, tmp_path_factory):
    """Any rows cut out of any episode, with or without the pictures before its first; the loader's way to them too."""
    rows = [sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1))) for length in (7, 5)]
    root = write_set(tmp_path_factory.mktemp("set") / "set", version, lengths=(7, 5), rows=rows)
    expected = np.array([(frame, e) for e, kept in enumerate(rows) for frame in kept])
    order = np.array(data.draw(st.permutations(range(len(expected)))))
    found = samples(encode, open_dataset(root), order, camera=CAMERA)
    np.testing.assert_array_equal(addresses(np.stack([one["image"] for one in found])), expected[order])
    np.testing.assert_array_equal([one["actions"][0] - [1, 0] for one in found], expected[order])
    chosen = open_dataset(root, [1])
    images = chosen.images(CAMERA, np.arange(chosen.num_frames))
    np.testing.assert_array_equal(addresses(images), expected[expected[:, 1] == 1])


def other_half(e, frames):
    return frames / 10 + (0.05 if e == 1 else 0)


REFUSED = {
    # The last row's picture would be the next episode's, or none; whether rows or times are late nobody can tell.
    "one frame late": (lambda e, frames: (frames + 1) / 10, "begin one frame late, at 0.1 s", (0, 1, 2)),
    "on through the file": (
        lambda e, frames: frames / 10 + [0, 1.2, 2.1][e],
        r"run on through the file, from 1.2 s|begin at 1.2 s",
        (1, 2),
    ),
    "half a frame off": (other_half, r"none for 9 of 9 rows.*begin at 0.05 s", (1,)),
    "another rate": (lambda e, frames: frames / 20, "0.05 s apart, and fps is 10", (0, 1, 2)),
    "of the clock": (lambda e, frames: 1.7e9 + frames / 10, r"begin at 1.7e\+09 s", (0, 1, 2)),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", REFUSED)
def test_no_picture_at_a_time(kind, version, tmp_path):
    seconds, what, bad = REFUSED[kind]
    root = write_set(tmp_path / "set", version, seconds=seconds, time_type=pa.float64())
    with pytest.raises(
        DatasetFormatError, match=rf"(?s)from_timestamp \+ timestamp.*{what}.*mp4, episode {bad[0]}, frame"
    ):
        open_dataset(root).images(CAMERA, np.array([0]))
    errors = [f for f in check_dataset(root).findings if f.severity == "error"]
    assert [(f.check, f.episodes) for f in errors] == [("timestamps", (e,)) for e in bad]
    sound, named = sort_episodes(root)
    assert tuple(named) == bad
    if sound:
        dataset = open_dataset(root, sound)
        rows = np.arange(dataset.num_frames)
        expected = [(frame, e) for e in sound for frame in range(LENGTHS[e])]
        np.testing.assert_array_equal(addresses(dataset.images(CAMERA, rows)), expected)


def test_the_last_row_may_not_show_the_next_episode(tmp_path):
    """Where the file goes on, a picture is there; it belongs to another episode."""
    root = write_set(tmp_path / "set", rows=[range(LENGTHS[0]), range(3), range(3)])
    table = root / "data/chunk-000/file-000.parquet"
    late = np.concatenate([np.arange(12) / 10 + 0.1, np.arange(3) / 10, np.arange(3) / 10])
    edit_column(table, "timestamp", pa.array(late, pa.float32()))
    with pytest.raises(DatasetFormatError, match=r"(?s)none for 1 of 12 rows.*another episode's may begin \(1.200 s\)"):
        open_dataset(root).images(CAMERA, np.array([0]))


def test_rounding_of_float32_is_no_other_time():
    """Of an episode of more than a day at 30 per second; and half a frame is another time, also there."""
    frames = np.arange(0, 3_000_000, 7)
    stored = (frames / 30).astype(np.float32).astype(np.float64)
    assert np.abs(stored - frames / 30).max() > 0.003
    assert not off_grid(stored, frames, 30).any()
    assert off_grid(stored + 0.5 / 30, frames, 30).all()


def test_ten_thousand_seconds_into_a_video(tmp_path):
    """Where float32 has steps of a millisecond. The file is made of 256 pictures over and over."""
    fps, first = 20, 10_000 * 20
    root = write_set(tmp_path / "set", lengths=[256], rows=[range(7)], fps=fps, video_fps=fps)
    (video,) = root.rglob("*.mp4")
    repeat(video, [picture(frame, 0) for frame in range(256)], fps, first + 300)
    table = next((root / "data").rglob("*.parquet"))
    kept = first + np.array([0, 1, 2, 5, 100, 101, 299])
    edit_column(table, "timestamp", pa.array(kept / fps, pa.float32()))
    ends = f"videos/{CAMERA}/to_timestamp"
    edit_column(next((root / "meta/episodes").rglob("*.parquet")), ends, pa.array([(first + 300) / fps]))
    images = open_dataset(root).images(CAMERA, np.array([3, 0, 1, 6, 5, 4, 2]))
    np.testing.assert_array_equal(addresses(images)[:, 0], kept[[3, 0, 1, 6, 5, 4, 2]] % 256)


def repeat(path, images, fps, count):
    with av.open(str(path), "w") as container:
        options = {"g": "1", "bf": "0", "preset": "ultrafast"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "yuv420p"
        frames = [av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24") for image in images]
        packets = [packet for frame in (*frames, None) for packet in stream.encode(frame)]
        tick = packets[0].time_base * fps
        copies = [bytes(packet) for packet in packets]
        for i in range(count):
            packet = av.Packet(copies[i % len(copies)])
            packet.stream, packet.time_base, packet.is_keyframe = stream, packets[0].time_base, True
            packet.pts = packet.dts = round(i / tick)
            container.mux(packet)


def test_rounding_of_float32_is_no_uneven_time():
    times = (10_000 + np.arange(1000) / 100).astype(np.float32)
    assert not list(uneven_timestamps(0, times, 100))
    assert list(uneven_timestamps(0, np.delete(times, 500), 100))


def test_check_sees_episodes_that_share_pictures(tmp_path):
    root = write_set(tmp_path / "set")
    assert not check_dataset(root).findings
    start = f"videos/{CAMERA}/from_timestamp"
    edit_column(root / "meta/episodes/chunk-000/file-000.parquet", start, pa.array([0.0, 1.2, 1.8]))
    (finding,) = check_dataset(root).findings
    assert (finding.severity, finding.episodes) == ("warning", (1,))
    assert "run to 2.000 s, its part of that file only to 1.800 s" in finding.what


def test_an_end_may_be_the_time_of_the_last_picture(tmp_path):
    """Some writers state that instead of when it is over; rows removed or not, its picture is there."""
    column, last = f"videos/{CAMERA}/to_timestamp", np.cumsum(LENGTHS) / 10 - 0.1
    for name, rows in {"sound": None, "rows removed": CUT}.items():
        root = write_set(tmp_path / name, rows=rows)
        edit_column(root / "meta/episodes/chunk-000/file-000.parquet", column, pa.array(last))
        assert not [f for f in check_dataset(root).findings if f.check != "timestamps" or f.severity == "error"]
        images = open_dataset(root).images(CAMERA, np.array([-1]) % open_dataset(root).num_frames)
        assert addresses(images).tolist() == [[LENGTHS[2] - 1, 2]]


@pytest.mark.parametrize("version", VERSIONS)
def test_conversion_keeps_each_picture_with_its_row(version, tmp_path):
    source = open_reader(write_set(tmp_path / "set", version, rows=CUT))
    convert(source, tmp_path / "converted", ConvertSettings(), num_workers=0, show=False)
    dataset = open_dataset(tmp_path / "converted")
    rows = np.arange(dataset.num_frames)
    expected = [(frame, e) for e, kept in enumerate(CUT) for frame in kept]
    np.testing.assert_array_equal(addresses(dataset.images(CAMERA, rows)), expected)
    np.testing.assert_array_equal(dataset.column("observation.state"), expected)


RATES = {
    "sound": ({}, 10, None),
    "a gap": ({"rows": [range(LENGTHS[0]), CUT[1], range(LENGTHS[2])]}, 10, "[1]"),
    "another rate": ({"video_fps": 20, "seconds": lambda e, frames: frames / 20}, 10, "[0, 1, 2]"),
    "another rate, which is named": ({"video_fps": 20, "seconds": lambda e, frames: frames / 20}, 20, None),
}


@pytest.mark.parametrize("kind", RATES)
def test_conversion_says_that_rows_were_not_evenly_apart(kind, tmp_path):
    """`manipi check` of what is written sees no gap."""
    how, fps, named = RATES[kind]
    source, target = open_reader(write_set(tmp_path / "set", **how)), tmp_path / "converted"
    report = convert(source, target, ConvertSettings(fps=fps), num_workers=0, show=False)
    assert [text.partition(" in episodes ")[2].partition(", and")[0] for _, text in report.remarks] == (
        [named] if named else []
    )
    assert not [finding for finding in check_dataset(target).findings if finding.check == "timestamps"]


def test_a_cache_of_other_pictures_is_not_mixed_in(tmp_path, monkeypatch):
    """A dataset off the grid has another fingerprint than before, by which its pictures are kept; others have not."""
    sound, cut = (open_dataset(write_set(tmp_path / name, rows=rows)) for name, rows in (("a", None), ("b", CUT)))
    without = {}
    for dataset in (sound, cut):
        again = LeRobotDataset(dataset.root, (), {})  # as if no episode were off the grid
        without[dataset.root] = again.fingerprint
    assert sound.fingerprint == without[sound.root]
    assert cut.fingerprint != without[cut.root]
    cached = CachedDataset(cut, [CAMERA], tmp_path / "cache")
    assert (tmp_path / "cache" / cut.fingerprint[:16]).is_dir()
    expected = [(frame, e) for e, kept in enumerate(CUT) for frame in kept]
    for _ in range(2):
        np.testing.assert_array_equal(addresses(cached.images(CAMERA, np.arange(cut.num_frames))), expected)


@pytest.mark.parametrize("name", ["rows_removed", "trimmed_start"])
def test_cases(shared_cases, name):
    """Public problem threads, rebuilt small, with pictures of 48 x 256."""
    dataset = open_dataset(shared_cases / name)
    images = dataset.images(CAMERA, np.arange(dataset.num_frames))
    bits = (images[:, 8, 8::16].mean(-1) > 127).reshape(-1, 2, 8)
    expected = np.stack(
        [np.rint(dataset.column("timestamp")[:, 0] * dataset.fps), dataset.column("episode_index")[:, 0]], axis=1
    )
    np.testing.assert_array_equal((bits << np.arange(8)).sum(-1), expected)
    named = {f.episodes[0] for f in check_dataset(shared_cases / name).findings if f.check == "timestamps"}
    assert named == {0, 1, 2}
