"""Every frame of every layout of file is found exactly, whatever the order of the requests."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from manipi.data.lerobot.video import VideoFrames, VideoWriter, decoders_for
from manipi.errors import ConfigError, DatasetFormatError

COUNT, FPS = 60, 30
LAYOUTS = {
    "keyframe every second frame": {"g": "2", "bf": "0"},
    "keyframe every second frame, as lerobot encodes": {"g": "2"},
    "long groups with B-frames": {"g": "30", "bf": "3", "sc_threshold": "0"},
    "one keyframe": {"g": "1000", "bf": "2", "sc_threshold": "0"},
}


@pytest.fixture(params=LAYOUTS)
def path(request, tmp_path):
    """A file whose frame i is grey level 4 i + 10; its index stands in front, so that it opens when truncated."""
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=LAYOUTS[request.param] | {"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(COUNT):
            image = np.full((48, 64, 3), 4 * i + 10, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("group", ["1", "2", "30"])
@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_frames_at_uneven_times(group, order, tmp_path):
    """A quarter of the mean period is more than the time between frames that come in a burst."""
    ticks = np.cumsum([0, *([100, 12, 13, 14, 15, 180, 90, 110, 11, 155] * 4)])
    path = tmp_path / "uneven.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": group, "bf": "0", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, tick in enumerate(ticks.tolist()):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * i + 10, np.uint8), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    numbers = np.arange(len(ticks))
    numbers = {"forward": numbers, "backward": numbers[::-1], "random": np.random.default_rng(0).permutation(numbers)}[
        order
    ]
    videos = VideoFrames()
    for off in (0.0, 0.003, -0.003):
        found = [videos.frame(path, ticks[number] / 1000 + off, where="").mean() for number in numbers.tolist()]
        np.testing.assert_array_equal(np.rint((np.array(found) - 10) / 4), numbers)


@pytest.mark.parametrize("order", ["forward", "backward", "random", "strided", "repeated"])
def test_exact_frame(path, order):
    numbers = {
        "forward": np.arange(COUNT),
        "backward": np.arange(COUNT)[::-1],
        "random": np.random.default_rng(0).permutation(COUNT),
        "strided": np.arange(0, COUNT, 7),
        "repeated": np.array([5, 5, 59, 59, 0, 0]),
    }[order]
    videos = VideoFrames()
    found = [videos.frame(path, number / FPS, where="") for number in numbers.tolist()]
    np.testing.assert_array_equal(np.rint((np.mean(found, axis=(1, 2, 3)) - 10) / 4), numbers)


def test_many_frames_at_times_that_are_not_exact(path):
    """Each is decoded with the one after it, which is kept for the next request."""
    videos = VideoFrames()
    for _ in range(3):
        found = [videos.frame(path, (number + 0.2) / FPS, where="").mean() for number in range(COUNT)]
        np.testing.assert_array_equal(np.rint((np.array(found) - 10) / 4), np.arange(COUNT))


def test_no_frame_at_that_time(path):
    videos = VideoFrames()
    with pytest.raises(DatasetFormatError, match=r"(?s)frame at 2.000 s.*end of the file.*a.mp4, episode 1"):
        videos.frame(path, COUNT / FPS, where="a.mp4, episode 1")
    with pytest.raises(DatasetFormatError, match=r"the next frame at 0.333 s"):
        videos.frame(path, 9.5 / FPS, where="")
    assert videos.frame(path, 0.0, where="").mean() == pytest.approx(10, abs=2)


def test_truncated_with_its_index_in_front(path):
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size * 3 // 4)
    videos = VideoFrames()
    found, lost = [], []
    for number in range(COUNT):
        try:
            found.append(videos.frame(path, number / FPS, where=f"frame {number}"))
        except DatasetFormatError as error:
            lost.append(error)
    np.testing.assert_array_equal(np.rint((np.mean(found, axis=(1, 2, 3)) - 10) / 4), np.arange(len(found)))
    assert len(lost) == COUNT - len(found) > 0
    assert lost[-1].where == f"frame {COUNT - 1}"


def test_damaged_frame(tmp_path):
    path = tmp_path / "a.mp4"
    writer = VideoWriter(path, fps=FPS, height=96, width=128)
    writer.add(np.random.default_rng(0).integers(0, 255, (10, 96, 128, 3), dtype=np.uint8))
    writer.close()
    middle = path.stat().st_size // 2
    content = path.read_bytes()
    path.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    videos = VideoFrames()
    videos.frame(path, 0.0, where="")
    with pytest.raises(DatasetFormatError, match=r"(?s)found .*[Ii]nvalid data|damaged"):
        [videos.frame(path, number / FPS, where="") for number in range(10)]


def test_more_files_than_open_decoders(tmp_path):
    paths = [tmp_path / f"{i}.mp4" for i in range(20)]
    for i, path in enumerate(paths):
        writer = VideoWriter(path, fps=FPS, height=16, width=16)
        writer.add(np.full((2, 16, 16, 3), 10 * i, np.uint8))
        writer.close()
    videos = VideoFrames(num_decoders=3)
    for i in [*range(20), *range(20)]:
        assert videos.frame(paths[i], 1 / FPS, where="").mean() == pytest.approx(10 * i, abs=2)
    held = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert sum(path.startswith(str(tmp_path)) for path in held) == 3


def test_fewer_decoders_of_larger_pictures():
    small, hd, huge = decoders_for(84 * 84), decoders_for(720 * 1280), decoders_for(10**9)
    assert 128 == small > hd > huge == 1
    assert hd * 720 * 1280 * 9 <= 256 << 20


def test_full_chroma_keeps_small_colours(tmp_path):
    checkered = np.zeros((4, 33, 35, 3), np.uint8)
    checkered[:, ::2, ::2, 0] = checkered[:, 1::2, 1::2, 2] = 255
    writer = VideoWriter(tmp_path / "a.mp4", fps=10, height=33, width=35, pix_fmt="yuv444p", crf=5)
    writer.add(checkered)
    writer.close()
    found = VideoFrames().frame(tmp_path / "a.mp4", 0.3, where="")
    assert np.abs(found.astype(int) - checkered[3]).max() < 25


def test_odd_size_needs_full_chroma(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)even height and width.*33x35.*yuv444p"):
        VideoWriter(tmp_path / "a.mp4", fps=10, height=33, width=35)


def test_open_groups_in_order(tmp_path):
    path = tmp_path / "open.mp4"
    options = {"g": "12", "bf": "3", "sc_threshold": "0", "x264-params": "open-gop=1:b-adapt=0", "crf": "10"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(COUNT):
            image = np.full((48, 64, 3), 4 * i + 10, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    videos = VideoFrames()
    found = [videos.frame(path, number / FPS, where="").mean() for number in range(COUNT)]
    np.testing.assert_array_equal(np.rint((np.array(found) - 10) / 4), np.arange(COUNT))
