"""Zarr in the layout of diffusion_policy's ReplayBuffer: all episodes one behind the other."""

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manipi.convert.source import (
    OTHER_LAYOUT,
    Blocks,
    EpisodeSource,
    SourceEpisode,
    broken,
    kind_of,
    optional_module,
    remark,
    vector,
)
from manipi.errors import ConfigError

if TYPE_CHECKING:
    import zarr

_NAMES = {"action": "action", "state": "observation.state"}
_UMI_POSE = tuple(f"observation.robot0_{part}" for part in ("eef_pos", "eef_rot_axis_angle", "gripper_width"))


class ReplayBufferSource(EpisodeSource):
    """A .zarr folder or .zarr.zip file: neither rate nor instruction.

    data/action, data/state   action, observation.state
    data/NAME                 observation.images.NAME where it holds pictures (`source.kind_of`), else observation.NAME
    meta/episode_ends         the row after the last of each episode

    UMI records no action: the pose of the gripper is what it was made to follow, so it becomes both state and action.
    Layout: github.com/real-stanford/diffusion_policy, common/replay_buffer.py.
    """

    joins = (("observation.state", _UMI_POSE), ("action", _UMI_POSE))

    def __init__(self, root: Path):
        super().__init__(root)
        with self._group() as group, _reading(root):
            ends = np.asarray(_get(group, "meta/episode_ends", root)[:])
        self._bounds = np.concatenate([[0], ends]).astype(int)
        if (np.diff(self._bounds) <= 0).any():
            where = f"{root}, meta/episode_ends"
            broken("ends of episodes that ascend", f"{ends.tolist()[:10]}", where, "correct meta/episode_ends")
        self.names = [str(number) for number in range(len(ends))]
        self.robot_type = "umi" if any("robot0_eef_pos" in path for path in self._arrays()) else "unknown"

    def files(self) -> Iterable[Path]:
        # The pictures' chunks are a file each, too many to look at.
        if self.root.is_file():
            return [self.root]
        return [path for name in (".zarray", "zarr.json") for path in self.root.glob(f"*/*/{name}")]

    def remarks(self, fps: float) -> Mapping[str, str]:
        """Which arrays lack chunks: a store leaves out those of fill values alone, and a broken copy any."""
        remarks = {}
        with self._group() as group:
            for key in self._arrays():
                array = _get(group, f"data/{key}", self.root)
                with _reading(f"{self.root}, data/{key}"):
                    lacking, count = array.nchunks - array.nchunks_initialized, array.nchunks
                if lacking > 0:
                    found = f"{lacking} of {count} chunks are not in the store, and read as {array.fill_value}"
                    remarks[_named(key, array)[1]] = f"{found}: right where all is so, else copy the store again"
        return remarks

    @contextmanager
    def open(self, name: str) -> Iterator[SourceEpisode]:
        start, stop = self._bounds[int(name) : int(name) + 2].tolist()
        with self._group() as group:
            columns, pictures, remarks = {}, {}, {}
            for key in self._arrays():
                array, where = _get(group, f"data/{key}", self.root), f"{self.root}, data/{key}, episode {name}"
                if array.shape[0] != self._bounds[-1]:
                    expected = f"{self._bounds[-1]} rows, as meta/episode_ends says"
                    broken(expected, f"{array.shape[0]}", where, "correct meta/episode_ends, or record it again")
                kind, feature = _named(key, array)
                if kind == "vector":
                    with _reading(where):
                        columns[feature] = vector(np.asarray(array[start:stop]))
                    continue
                remarks[feature] = remark(kind, array.shape[1:], array.dtype)
                if kind == "picture":
                    pictures[feature] = Blocks(partial(_pictures, array, where), start, stop, where)
            yield SourceEpisode(columns=columns, pictures=pictures, remarks=remarks)

    def _arrays(self) -> list[str]:
        with self._group() as group, _reading(self.root):
            return sorted(_get(group, "data", self.root).array_keys())

    @contextmanager
    def _group(self) -> "Iterator[zarr.Group]":
        zarr = optional_module("zarr")
        with _reading(self.root):
            store = (
                zarr.storage.ZipStore(self.root, mode="r")
                if self.root.is_file()
                else zarr.storage.LocalStore(self.root)
            )
            group = zarr.open_group(store, mode="r")
        try:
            yield group
        finally:
            store.close()


def _named(key: str, array: "zarr.Array") -> tuple[str, str]:
    """What an array holds, and the feature that it becomes."""
    kind = kind_of(key, array.shape[1:], array.dtype)
    return kind, _NAMES.get(key, f"observation.{key}") if kind == "vector" else f"observation.images.{key}"


def _get(group: "zarr.Group", name: str, root: Path) -> Any:
    with _reading(root):
        if name not in group:
            broken(f"{name!r} in the Zarr store", ", ".join(sorted(group.keys())) or "nothing", root, OTHER_LAYOUT)
        return group[name]


@contextmanager
def _reading(where: str | Path) -> Iterator[None]:
    """What zarr says about a damaged store, as a DatasetFormatError; a compression that needs a library by its name."""
    try:
        yield
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        if "imagecodecs" not in str(error):
            broken("a readable Zarr store", str(error) or type(error).__name__, where)
        raise ConfigError(
            expected="the library imagecodecs, which decodes JPEG-XL",
            found=str(error),
            where=str(where),
            next="pip install imagecodecs",
        ) from error


def _pictures(rows: "zarr.Array", where: str, start: int, stop: int) -> np.ndarray:
    with _reading(where):
        return np.asarray(rows[start:stop])
