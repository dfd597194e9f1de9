"""The formats that can be converted: what every reader offers, and which reads a folder.

A reader is a subclass of `EpisodeReader`, and `FORMATS` names it.
"""

import abc
import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal, NoReturn

import numpy as np
from jaxtyping import UInt8

from manipi.data.lerobot.episode import Texts
from manipi.errors import ConfigError, DatasetFormatError, DatasetNotFoundError, quoted, unknown_name

BLOCK = 16
"""Pictures in RAM at a time."""


@dataclass(frozen=True, kw_only=True)
class RecordedEpisode:
    """One open episode of T frames; its pictures are read as they are asked for."""

    columns: Mapping[str, np.ndarray]
    """Vectors [T, d], float32 or int64."""
    pictures: Mapping[str, Iterable[UInt8[np.ndarray, "n h w 3"]]]
    """Per camera its pictures in blocks, anew from the first whenever they are iterated."""
    task: str | Sequence[str] = ""
    """The instruction, or one per frame; empty where the source has none."""
    remarks: Mapping[str, str] = field(default_factory=dict)
    """What to know of a feature: how its pictures are stored, where that is unusual, and why it is left out."""
    language: Mapping[str, Texts] = field(default_factory=dict)
    """What LeRobot's language columns say, by column."""
    seconds: np.ndarray | None = None
    """When each frame was, [T], where `language` speaks of time."""


class EpisodeReader(abc.ABC):
    """Episodes by name. Holds paths and settings only, so that it pickles; files are open inside `open` alone.

    Raises:
        DatasetNotFoundError: no episode at `root`.
        DatasetFormatError: a file is missing, damaged, or laid out differently.
        ConfigError: the library that reads the format is not installed.
    """

    layout: str
    """What the files of this format look like, for messages."""
    names: Sequence[str]
    """Of the episodes, in order."""
    robot_type: str = "unknown"
    fps: float | None = None
    """None where the source does not say."""
    joins: Sequence[tuple[str, tuple[str, ...]]] = ()
    """Vectors that belong together in this format: the name of the whole, and its parts, where all of them exist."""
    dimension_names: Mapping[str, tuple[str, ...]] = {}
    marks_skipped: bool = False
    """Whether frames are marked in which the robot did not take commands, and `drop_skipped` leaves them out."""
    drop_skipped: bool = False

    def __init__(self, root: Path):
        self.root = root

    @classmethod
    def recognises(cls, root: Path) -> bool:
        """Whether a folder or file is in this format; where none says so, the format has to be named."""
        return False

    @abc.abstractmethod
    def open(self, name: str) -> AbstractContextManager[RecordedEpisode]:
        """The episode of that name."""

    def remarks(self, fps: float) -> Mapping[str, str]:
        """What to know of the source as a whole, by feature or array, where it becomes rows of `fps` per second."""
        return {}

    def kept_files(self) -> Mapping[str, bytes]:
        """Content of files that the dataset is to have as they are, by their path in it."""
        return {}

    def files(self) -> Iterable[Path]:
        """Files that differ when the episodes do."""
        return [self.root] if self.root.is_file() else (path for path in self.root.rglob("*") if path.is_file())


# What the readers share ---------------------------------------------------------------------------------------------


def find_files(root: Path, *patterns: str) -> dict[str, Path]:
    """`root` itself where it is a file, else what lies below it, by relative name; numbers count as numbers."""
    if root.is_file():
        return {root.name: root}
    found = {str(path.relative_to(root)): path for pattern in patterns for path in root.rglob(pattern)}
    return {name: found[name] for name in sorted(found, key=by_number)}


def by_number(name: str) -> list[tuple[int, str]]:
    """A sorting key that puts demo_10 behind demo_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def vector(values: np.ndarray) -> np.ndarray:
    """Any numbers of T frames as [T, d]: floats as float32, the rest as int64."""
    return values.reshape(len(values), math.prod(values.shape[1:])).astype(
        np.float32 if values.dtype.kind == "f" else np.int64
    )


def optional_module(name: str) -> ModuleType:
    """A library of the extra `convert`; ConfigError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(
            expected=f"the library {name}, which reads this format",
            found="not installed",
            where="the Python environment",
            next="pip install 'manipi[convert]'",
        ) from None


OTHER_LAYOUT = "name the --format, if another one was recognised; --skip-bad-episodes leaves such episodes out"
"""What to do about a whole file that holds something else."""


def broken(expected: str, found: str, where: str | Path, next: str = "") -> NoReturn:
    """Raise the error for a file that is missing, damaged, or laid out differently."""
    raise DatasetFormatError(
        expected=expected,
        found=found,
        where=str(where),
        next=next or "copy the file again or repair it; --skip-bad-episodes leaves such episodes out",
    )


# Pictures -----------------------------------------------------------------------------------------------------------

_LEAST_SIDE = 16
"""Pixels: a matrix with a shorter side is no picture."""
_LEAVE_OUT = "record them so, or leave them out: --exclude NAME"


def kind_of(name: str, shape: tuple[int, ...], dtype: np.dtype) -> Literal["picture", "depth", "vector"]:
    """What an array holds, by the shape of its frames, its numbers and its name.

    frames                     numbers                            are
    h w 3, 3 h w               any                                pictures
    h w 1, 1 h w, h w          16 bits; "depth" in the name       depth
                               8 bits; floats with three axes     pictures in grey
    any other with two sides   8 bits or truth values             pictures that `Blocks` refuses to read
    of 16 pixels or more       other                              vectors
    smaller ones               any                                vectors
    """
    channels = 1 if len(shape) == 2 else _channels(shape)
    if len(shape) < 2 or sorted(shape)[-2] < _LEAST_SIDE:
        return "vector"
    if channels == 1 and ("depth" in name.lower() or dtype == np.uint16):
        return "depth"
    shown = channels == 3 or (channels == 1 and dtype.kind == "f" and len(shape) == 3)
    return "picture" if shown or dtype.kind == "b" or dtype == np.uint8 else "vector"


def _channels(shape: tuple[int, ...]) -> int:
    """3 or 1 where one end of [h, w, c] or [c, h, w] is that; 0 for anything else."""
    ends = (shape[-1], shape[0]) if len(shape) == 3 else ()
    return next((size for size in (3, 1) if size in ends), 0)


def remark(kind: str, shape: tuple[int, ...], dtype: np.dtype) -> str:
    """What to know of pictures that are not uint8 [h, w, 3], and of depth."""
    if kind == "depth":
        return "records depth, not colours: left out"
    stored = "" if kind == "vector" or shape[-1:] == (3,) else f"stored as {list(shape)}"
    numbers = "" if kind == "vector" or dtype == np.uint8 else f"{dtype}: 0 to 1 become 0 to 255, whole numbers stay"
    return ", ".join(filter(None, (stored, numbers)))


@dataclass(frozen=True)
class Blocks:
    """The pictures start…stop of a camera out of `read(start, stop)`, block by block, as uint8 [n, h, w, 3].

    Floats are from 0 to 1 in all pictures of an episode, and become 255 times as much, rounded; or they are whole
    numbers from 0 to 255, which stay. The first picture that is not black decides, and any other number is refused.

    Raises:
        DatasetFormatError: numbers of any other range, truth values, or another number of axes or channels.
    """

    read: Callable[[int, int], np.ndarray]
    start: int
    stop: int
    where: str = ""

    def __iter__(self) -> Iterator[np.ndarray]:
        scale = 0
        """By what numbers other than bytes are multiplied; 0: not known yet."""
        for start in range(self.start, self.stop, BLOCK):
            block = self.read(start, min(start + BLOCK, self.stop))
            block = block[..., None] if block.ndim == 3 else block
            channels = _channels(block.shape[1:])
            if block.dtype.kind == "b" or not channels:
                expected = "pictures [h, w, 3], [3, h, w], or in grey [h, w, 1] or [h, w], of 8 bits"
                found = f"{block.dtype} of shape {block.shape[1:]} in every frame"
                broken(expected, found, self.where, _LEAVE_OUT)
            block = block if block.shape[3] == channels else np.moveaxis(block, 1, 3)
            if block.dtype != np.uint8:
                low, high = block.min(), block.max()
                scale = scale or (0 if high == 0 else 255 if high <= 1 and block.dtype.kind == "f" else 1)
                scaled = block.astype(np.float32) * max(scale, 1)
                whole = np.rint(scaled)
                fits = low >= 0 and scaled.max() <= 255 and (scale == 255 or np.array_equal(whole, scaled))
                if not fits or block.dtype.kind not in "fi":
                    broken(
                        "pictures of 8 bits, whole numbers from 0 to 255, or floats from 0 to 1; one of them in all of"
                        " an episode",
                        f"{block.dtype} from {low:g} to {high:g}",
                        f"{self.where}, from frame {start - self.start} on",
                        _LEAVE_OUT,
                    )
                block = whole.astype(np.uint8)
            yield block if channels == 3 else np.repeat(block, 3, axis=3)


# Formats ------------------------------------------------------------------------------------------------------------


FORMATS = {
    "aloha": "manipi.convert.recordings:AlohaReader",
    "libero": "manipi.convert.recordings:LiberoReader",
    "robomimic": "manipi.convert.recordings:RobomimicReader",
    "droid": "manipi.convert.recordings:DroidReader",
    "rlds": "manipi.convert.recordings:RldsReader",
    "lerobot": "manipi.convert.recordings:LeRobotReader",
    "zarr": "manipi.convert.recordings:ZarrReader",
}
"""Per name the module and class of its reader, imported when it is needed; it may be added to. Readers are asked from
the last to the first what a folder holds, so that added ones come before ours."""


def _load(format: str) -> type[EpisodeReader]:
    return pkgutil.resolve_name(FORMATS[format])


def open_reader(root: Path, format: str | None = None, *, drop_skipped: bool = False) -> EpisodeReader:
    """The reader of a folder or file, whose format is recognised by its files unless it is named.

    Raises:
        UnknownNameError: no such format.
        ConfigError: the format does not mark skipped frames, and they are to be dropped.
        DatasetNotFoundError, DatasetFormatError: nothing there, or in no known format.
    """
    root = root.expanduser().absolute()
    if format is not None and format not in FORMATS:
        raise unknown_name("format", format, FORMATS, next="leave --format out; it is recognised by the files")
    if not root.exists():
        raise DatasetNotFoundError(
            expected="a recording",
            found="nothing",
            where=str(root),
            next=f"ls {quoted(root.parent)}  # then give the path",
        )
    format = format or next((name for name in reversed(FORMATS) if _load(name).recognises(root)), None)
    if format is None:
        known = "; ".join(f"{name}: {_load(name).layout}" for name in FORMATS)
        found = sorted(path.name for path in root.iterdir())[:5] if root.is_dir() else [root.name]
        raise DatasetFormatError(
            expected=f"one of the formats {known}",
            found=", ".join(found) or "an empty folder",
            where=str(root),
            next="give the folder that holds these files, or name the format with --format",
        )
    reader = _load(format)(root)
    if not reader.names:
        raise DatasetNotFoundError(
            expected=f"at least one episode: {reader.layout}",
            found="none",
            where=str(root),
            next="give another folder, or another --format",
        )
    if drop_skipped and not reader.marks_skipped:
        raise ConfigError(
            expected="a format that marks skipped frames: droid",
            found=format,
            where="--drop-skipped",
            next="leave the flag out",
        )
    reader.drop_skipped = drop_skipped
    return reader
