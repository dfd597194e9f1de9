"""Exact frames out of video files, frames into them, and encoded pictures.

A long-lived decoder per file, without decoder threads, is the fastest way to random frames on a CPU that other
workers share; with a keyframe every second frame (as LeRobot encodes) a seek decodes at most two frames.
"""

import io
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image

from manipi.errors import ConfigError, DatasetFormatError, quoted

_DECODER_MB, _MOST_DECODERS = 256, 128
"""Bounds on the decoders that a reader keeps open: their memory, and their number, since each holds a file."""
_SLACK, _EXACT = 0.25, 0.05
"""Shares of a frame: how far a frame may be from its time, and what is no more than rounding. Where frames come at
uneven times, one that is farther from its time than rounding may have a nearer neighbour."""


def decoders_for(pixels: int) -> int:
    """How many decoders of pictures of that size fit the bounds; each holds about six of them, of 1.5 bytes a pixel."""
    return max(1, min(_MOST_DECODERS, (_DECODER_MB << 20) // (9 * pixels))) if pixels else _MOST_DECODERS


class VideoFrames:
    """Random access to the frames of many video files, through a few open decoders.

    Opening a file again costs about two random frames, so that many decoders pay where files are few. With more files
    than decoders, rows in file order open each file at most once per batch.
    """

    def __init__(self, num_decoders: int = 16):
        self._num_decoders = num_decoders
        self._decoders: dict[Path, _Decoder] = {}
        """The one used last stands last."""

    def frame(self, path: Path, seconds: float, *, where: str) -> UInt8[np.ndarray, "h w 3"]:
        """The frame nearest to a time, RGB. Consecutive frames are decoded without a seek.

        Args:
            seconds: its time stamp, exact to a quarter of a frame.
            where: names the frame in errors.
        """
        if not path.is_file():
            raise _broken("a video file", "nothing", where, without_camera())
        try:
            self._decoders[path] = decoder = self._decoders.pop(path, None) or _Decoder(path)
            if len(self._decoders) > self._num_decoders:
                self._close(next(iter(self._decoders)))
            if is_deep(decoder.pix_fmt):
                mark = 'write "info": {"is_depth_map": true} into its entry in meta/info.json, which leaves it out'
                raise _broken("pictures of 8 bits per channel", f"a depth map ({decoder.pix_fmt})", where, mark)
            return decoder.frame(seconds)
        except (FFmpegError, _NoFrame) as error:
            self._close(path)
            allow = f"chmod +r {quoted(path)}" if isinstance(error, PermissionError) else ""
            raise _broken(f"a frame at {seconds:.3f} s", str(error), where, allow) from error

    def _close(self, path: Path) -> None:
        # FFmpeg's objects refer to each other; left to the garbage collector, they would stay open for long.
        if decoder := self._decoders.pop(path, None):
            decoder.container.close()


def _broken(expected: str, found: str, where: str, next: str = "") -> DatasetFormatError:
    fetch = "hf download <dataset> --repo-type dataset --local-dir <folder>  # fetch this file again"
    return DatasetFormatError(expected=expected, found=found, where=where, next=next or fetch)


def without_camera(root: Path | None = None) -> str:
    """What to do about a camera without files."""
    folder = "<folder>" if root is None else quoted(root)
    return (
        f"hf download <dataset> --repo-type dataset --local-dir {folder}  # if it was recorded; or do without it: "
        "manipi view --without CAMERA, manipi convert --exclude CAMERA, a robot that does not name it"
    )


def is_deep(pix_fmt: str) -> bool:
    """Whether FFmpeg's format is grey of more than 8 bits, as depth maps are: gray12le, gray16be, grayf32le."""
    return pix_fmt.startswith(("gray9", "gray1", "grayf"))


class DeepPicture(ValueError):
    """A picture whose numbers do not fit 8 bits, and would become white or black."""


def decode_picture(encoded: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """An encoded picture, such as JPEG or PNG.

    Raises:
        DeepPicture: its numbers do not fit 8 bits.
        ValueError: the bytes are no picture.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            if picture.mode.startswith(("I", "F")):
                bits = {"I": "32 bits", "F": "a float"}.get(picture.mode, "16 bits")
                raise DeepPicture(f"{picture.format} of {bits} per pixel, perhaps depth")
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


class _NoFrame(Exception):
    """The file ends before a time, or has no undamaged frame there."""


class _Decoder:
    """One open file, and the frame that it decoded last."""

    def __init__(self, path: Path):
        self.container = av.open(str(path))
        self._stream = self.container.streams.video[0]
        codec = self._stream.codec_context
        codec.thread_type = "NONE"
        # dav1d has threads of its own, which decode frames that a seek then throws away.
        codec.thread_count = 1
        # A damaged frame is an error, where FFmpeg would rather paint over it.
        codec.options = {"err_detect": "explode"}
        self.pix_fmt = codec.pix_fmt or ""
        self._tick = float(self._stream.time_base or 1)
        self._period = float(1 / (self._stream.average_rate or 30))
        self._reformatter = VideoReformatter()
        self._ahead: Iterator[av.VideoFrame] = iter(())
        self._seen: av.VideoFrame | None = None
        """The frame after the last, where it was decoded too."""
        self._last: av.VideoFrame | None = None
        self._longest_run = 1
        """Most frames decoded from a keyframe on to reach another: what a seek can cost."""

    def frame(self, seconds: float) -> np.ndarray:
        """The picture there, whole and the one asked for, or _NoFrame."""

        def to_go(frame: av.VideoFrame) -> float:
            """How many frames it is before the time."""
            return (seconds - (frame.pts or 0) * self._tick) / self._period

        last, run = self._last, 0
        if last is None or not -_EXACT < to_go(last) < self._longest_run + _SLACK:
            # To the keyframe before it, and a little later, so that rounding to the file's time base cannot fall into
            # the frame before.
            target = int((seconds + _EXACT * self._period) / self._tick)
            self.container.seek(target, stream=self._stream, backward=True)
            self._ahead, self._seen = _decode(self.container, self._stream), None
            last = self._next()
            run = 0 if last is None else round(to_go(last))
        while last is not None and to_go(last) > _SLACK:
            last = self._next()
        if last is None:
            raise _NoFrame("the end of the file: it is truncated, or shorter than its metadata say")
        while to_go(last) > _EXACT and (after := self._next()):
            if abs(to_go(after)) >= to_go(last):
                self._seen = after
                break
            last = after
        if to_go(last) < -_SLACK:
            raise _NoFrame(f"the next frame at {(last.pts or 0) * self._tick:.3f} s")
        if last.is_corrupt:
            raise _NoFrame("a damaged frame")
        self._last, self._longest_run = last, max(self._longest_run, run)
        return self._reformatter.reformat(last, format="rgb24").to_ndarray()

    def _next(self) -> av.VideoFrame | None:
        frame, self._seen = self._seen or next(self._ahead, None), None
        return frame


def _decode(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """The frames from here on. Decoders hold frames back until later packets show that none comes before them; at the
    end of a closed group of pictures they are told that none does, and need not decode into the next group for it."""
    codec, started = stream.codec_context, False
    for packet, following in pairwise(chain(container.demux(stream), [av.Packet()])):
        # In an open group, what follows the keyframe is shown before it, and needs the group before.
        is_open = following.pts is not None and packet.pts is not None and following.pts < packet.pts
        if started and packet.is_keyframe and not is_open:
            yield from codec.decode(None)
            codec.flush_buffers()
        started = True
        yield from codec.decode(packet)


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

    def add(self, images: UInt8[np.ndarray, "n h w 3"]) -> None:
        for image in images:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = self._reformatter.reformat(rgb, format=self._stream.pix_fmt)
            frame.pts = self.num_frames
            self.num_frames += 1
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Flush the encoder, and write the file's index."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
