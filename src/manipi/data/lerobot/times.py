"""When in its video file the picture of a row is shown.

LeRobot's rule: at `from_timestamp` of the episode + `timestamp` of the row. In most datasets `timestamp` is frame / fps
rounded to float32, and frame / fps the more exact. Where rows were cut out, an episode begins later or the rows have
another rate, it is not; such an episode is called off the grid here, and its timestamps count.
"""

from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import Bool, Float64, Int64

from manipi.data.lerobot.index import LeRobotIndex
from manipi.data.lerobot.tables import Fault, format_error

SLACK = 0.25
"""Times that differ by less than this share of a frame name the same picture."""


def off_grid(
    seconds_T: Float64[np.ndarray, " T"], frame_T: Int64[np.ndarray, " T"], fps: float
) -> Bool[np.ndarray, " T"]:
    """Which timestamps differ from frame / fps by more than rounding."""
    rounding_T = 0.5 * np.spacing(np.abs(seconds_T).astype(np.float32)).astype(np.float64)
    return np.abs(seconds_T - frame_T / fps) > SLACK / fps + rounding_T


def time_fault(
    index: LeRobotIndex, root: Path, camera: str, position: int, seconds_T: Float64[np.ndarray, " T"]
) -> Fault | None:
    """What is wrong where a video has no picture at the times of an episode that is off the grid.

    None also where the file cannot be read, which its decoder reports.

    Args:
        position: of the episode in `index.episodes`.
    """
    clip, episode = index.clips[camera][position], index.episodes[position]
    try:
        shown_F, period = _shown_at(clip.path, clip.path.stat().st_mtime_ns)
    except (FFmpegError, OSError, IndexError, ValueError):
        return None
    wanted_T = clip.start + seconds_T
    after_T = np.searchsorted(shown_F, wanted_T)
    before_T, after_T = shown_F[np.maximum(after_T - 1, 0)], shown_F[np.minimum(after_T, len(shown_F) - 1)]
    distance_T = np.minimum(np.abs(before_T - wanted_T), np.abs(after_T - wanted_T))
    bad_T = (distance_T > SLACK * period) | (wanted_T > clip.end - SLACK * period)
    if not bad_T.any():
        return None
    at = int(bad_T.argmax())
    lacking = f"none for {int(bad_T.sum())} of {episode.length} rows, the first at {wanted_T[at]:.3f} s"
    of_others = f", where another episode's may begin ({clip.end:.3f} s)" if wanted_T[at] > clip.end - period else ""
    what, _ = how_off(seconds_T, index.fps, clip.start)
    error = format_error(
        root,
        f"a picture in {camera!r} at from_timestamp + timestamp of every row",
        f"{lacking}{of_others}; {what}",
        f"{clip.path}, episode {episode.index}, frame {at}",
        f"where row i belongs to picture i of the episode, write timestamp = frame / fps into {index.tables[position]};"
        " else leave the episode out",
    )
    return Fault(error, (episode.index,), at)


def how_off(seconds_T: Float64[np.ndarray, " T"], fps: float, start: float) -> tuple[str, str]:
    """What is odd about timestamps off the grid, and what to do about it.

    Args:
        start: where the episode's pictures begin in their file, in seconds.
    """
    look = "look with `manipi view` whether its pictures belong to its rows"
    steps_T = np.diff(seconds_T) * fps
    first, step = float(seconds_T[0]), float(np.median(steps_T)) if len(steps_T) else 1.0
    if np.abs(steps_T - 1).max(initial=0) < SLACK:
        if abs(first * fps - 1) < SLACK:
            return f"its timestamps begin one frame late, at {first:.4g} s", look
        if start > 0 and abs(first - start) * fps < SLACK:
            return f"its timestamps run on through the file, from {first:.4g} s, and do not begin anew", look
        return f"its timestamps begin at {first:.4g} s", look
    if abs(step - 1) >= SLACK:
        what = f"its timestamps are {step / fps:.4g} s apart, and fps is {fps:g} in meta/info.json"
        return what, "correct fps, or the timestamps"
    at = int(np.argmax(np.abs(steps_T - 1)))
    what = f"its timestamps go from {seconds_T[at]:.4g} s to {seconds_T[at + 1]:.4g} s at frame {at + 1}"
    return what, f"action chunks go on over it: cut the episode there, or leave it out; {look}"


@lru_cache(maxsize=8)
def _shown_at(path: Path, changed: int) -> tuple[Float64[np.ndarray, " F"], float]:
    """The times of a video's pictures, ascending, and its period; nothing is decoded, and little read where the file's
    index has them: without B-frames, pictures are shown in the order in which they are decoded.

    Args:
        changed: when the file was, so that another one of that name is read anew.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        tick, period = float(stream.time_base or 1), float(1 / (stream.average_rate or 30))
        listed = () if stream.codec_context.has_b_frames else getattr(stream, "index_entries", ())
        shown = [entry.timestamp for entry in listed]
        shown = shown or [packet.pts for packet in container.demux(stream) if packet.pts is not None]
    if not shown:
        raise ValueError("no pictures")
    return np.sort(np.array(shown) * tick), period
