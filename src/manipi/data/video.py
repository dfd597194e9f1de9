"""Exact frames out of video files, and frames into them.

A long-lived decoder per file, without decoder threads, is the fastest way to random frames on a CPU that other
workers share; with a keyframe every second frame (as LeRobot encodes) a seek decodes at most two frames.
"""

from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from manipi.errors import ConfigError, DatasetFormatError

_OPEN_FILES = 16
"""Decoders kept open per reader; a decoder of 480×640 holds a few MB."""
_SCAN_FRAMES = 4
"""Up to this many frames ahead, decoding on is cheaper than a seek."""


class VideoFrames:
    """Random access to the frames of many video files, through a few open decoders."""

    def __init__(self):
        # The cache drops the decoder that was used longest ago, and dropping it closes its file.
        self._decoder = lru_cache(maxsize=_OPEN_FILES)(_Decoder)

    def frame(self, path: Path, seconds: float, *, where: str) -> UInt8[np.ndarray, "h w 3"]:
        """The one frame shown at a time, RGB. Consecutive frames are decoded without a seek.

        Args:
            seconds: its time stamp, exact to a quarter of a frame.
            where: names the frame in errors.
        """
        if not path.is_file():
            raise _broken("a video file", "nothing", where)
        try:
            return self._decoder(path).frame(seconds)
        except (FFmpegError, _NoFrame) as error:
            self._decoder.cache_clear()
            raise _broken(f"a frame at {seconds:.3f} s", str(error), where) from error


def _broken(expected: str, found: str, where: str) -> DatasetFormatError:
    return DatasetFormatError(
        expected=expected,
        found=found,
        where=where,
        next="hf download <dataset> --repo-type dataset --local-dir <folder>  # fetch this file again",
    )


class _NoFrame(Exception):
    """The file ends before a time, or has no undamaged frame there."""


class _Decoder:
    """One open file, and the frame that it decoded last."""

    def __init__(self, path: Path):
        self._container = av.open(str(path))
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "NONE"
        # dav1d has threads of its own, which decode frames that a seek then throws away.
        self._stream.codec_context.thread_count = 1
        # A damaged frame is an error, where FFmpeg would rather paint over it.
        self._stream.codec_context.options = {"err_detect": "explode"}
        self._period = float(1 / (self._stream.average_rate or 30))
        self._reformatter = VideoReformatter()
        self._ahead: Iterator[av.VideoFrame] = iter(())
        self._last: av.VideoFrame | None = None

    def frame(self, seconds: float) -> np.ndarray:
        return self._reformatter.reformat(self._find(seconds), format="rgb24").to_ndarray()

    def _find(self, seconds: float) -> av.VideoFrame:
        if self._last is not None:
            ahead = (seconds - _time(self._last)) / self._period
            if abs(ahead) < 0.25:
                return self._last
            if 0 < ahead < _SCAN_FRAMES + 0.25:
                return self._scan(seconds)
        self._seek(seconds)
        return self._scan(seconds)

    def _seek(self, seconds: float) -> None:
        """Go to the keyframe before a time, and decode it."""
        # A quarter of a frame later, so that rounding to the file's time base cannot fall into the frame before.
        target = int((seconds + 0.25 * self._period) / float(self._stream.time_base or 1))
        self._container.seek(target, stream=self._stream, backward=True)
        self._ahead = self._container.decode(self._stream)
        self._last = next(self._ahead, None)

    def _scan(self, seconds: float) -> av.VideoFrame:
        """Decode on until a time; the frame there must be the one asked for, and whole."""
        frame = self._last
        while frame is not None and _time(frame) < seconds - 0.25 * self._period:
            frame = self._last = next(self._ahead, None)
        if frame is None:
            raise _NoFrame("the end of the file: it is truncated, or shorter than its metadata say")
        if abs(_time(frame) - seconds) > 0.25 * self._period:
            raise _NoFrame(f"the next frame at {_time(frame):.3f} s")
        if frame.is_corrupt:
            raise _NoFrame("a damaged frame")
        return frame


def _time(frame: av.VideoFrame) -> float:
    return float(frame.time or 0.0)


class VideoWriter:
    """Encode pictures into one H.264 file, with a keyframe every second frame for fast random access.

    Args:
        pix_fmt: "yuv420p" plays everywhere; "yuv444p" keeps the colours of very small pictures.
        crf: quality of x264, 0 (lossless up to the colour space) to 51.
    """

    def __init__(self, path: Path, *, fps: int, height: int, width: int, pix_fmt: str = "yuv420p", crf: int = 23):
        if pix_fmt == "yuv420p" and (height % 2 or width % 2):
            raise ConfigError(
                expected="even height and width for yuv420p",
                found=f"{height}x{width}",
                where=str(path),
                next='LeRobotWriter(..., pix_fmt="yuv444p")  # or pad the pictures to an even size',
            )
        self._container = av.open(str(path), "w")
        # For training data, fast random access and fidelity count for more than size: at equal crf, "ultrafast" has
        # smaller errors than the slower presets, encodes and decodes about twice as fast, and takes twice the bytes.
        options = {"crf": str(crf), "g": "2", "bf": "0", "preset": "ultrafast", "threads": "1"}
        self._stream = self._container.add_stream("libx264", rate=fps, options=options)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, pix_fmt
        self._stream.codec_context.time_base = Fraction(1, fps)
        self._reformatter = VideoReformatter()
        self.num_frames = 0
        self.num_bytes = 0

    def add(self, images: UInt8[np.ndarray, "n h w 3"]) -> None:
        for image in images:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = self._reformatter.reformat(rgb, format=self._stream.pix_fmt)
            frame.pts = self.num_frames
            self.num_frames += 1
            self._mux(frame)

    def close(self) -> None:
        """Flush the encoder, and write the file's index."""
        self._mux(None)
        self._container.close()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            self.num_bytes += packet.size
            self._container.mux(packet)
