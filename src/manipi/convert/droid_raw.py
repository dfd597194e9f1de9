"""DROID as it was recorded: a folder per episode, numbers in HDF5 and one MP4 file per camera."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.error import FFmpegError

from manipi.convert.hdf5 import get, open_hdf5, read_vector
from manipi.convert.source import BLOCK, OTHER_LAYOUT, EpisodeSource, SourceEpisode, broken, find_files

if TYPE_CHECKING:
    import h5py

_STATE = {
    "joint_position": "joint_positions",
    "gripper_position": "gripper_position",
    "cartesian_position": "cartesian_position",
}
_CAMERAS = {
    "exterior_image_1_left": "ext1_cam_serial",
    "exterior_image_2_left": "ext2_cam_serial",
    "wrist_image_left": "wrist_cam_serial",
}
"""Our feature, and the entry of metadata_*.json that has its camera's serial number."""
_SKIPS = (("observation/controller_info/movement_enabled", False), ("observation/timestamp/skip_action", True))
"""What marks a frame without a command, and by which value."""


class DroidSource(EpisodeSource):
    """Raw DROID, at 15 frames per second, with the feature names of openpi's converter.

    observation/robot_state/…         joint_position, gripper_position, cartesian_position
    action/NAME                       action.NAME; actions = joint velocity and gripper position
    recordings/MP4/SERIAL.mp4         wrist_image_left, exterior_image_1_left, exterior_image_2_left

    Which camera is which is told by metadata_*.json, or else by observation/camera_type (0: wrist; the others in the
    order of their serial numbers). The instruction is `language_instruction1` of aggregated-annotations-*.json beside
    the episodes, or else `current_task` of the metadata. A recording may go on after the numbers end. All frames are
    kept, as openpi does, unless `drop_skipped`. Layout: github.com/droid-dataset/droid, trajectory_utils.
    """

    robot_type = "droid"
    fps = 15.0
    joins = (("actions", ("action.joint_velocity", "action.gripper_position")),)
    marks_skipped = True

    def __init__(self, root: Path):
        super().__init__(root.parent if root.is_file() else root)
        self.names = [str(path.parent.relative_to(self.root)) for path in find_files(self.root, "trajectory.h5")]

    @cached_property
    def _annotations(self) -> Mapping[str, Mapping[str, str]]:
        files = sorted(self.root.glob("aggregated-annotations*.json"))
        return _read_json(files[-1]) if files else {}

    @contextmanager
    def open(self, name: str) -> Iterator[SourceEpisode]:
        folder = self.root / name
        path = folder / "trajectory.h5"
        metadata_files = sorted(folder.glob("metadata_*.json"))
        metadata = _read_json(metadata_files[0]) if metadata_files else {}
        with open_hdf5(path) as file:
            columns = _columns(file, path)
            keep_T = np.ones(len(columns["joint_position"]), bool)
            for key, value in _SKIPS if self.drop_skipped else ():
                if key in file:
                    keep_T &= read_vector(file, key, path)[:, 0] != value
            serials = _serials(file, metadata, path)
        recordings = folder / "recordings/MP4"
        yield SourceEpisode(
            columns={key: values[keep_T] if len(values) == len(keep_T) else values for key, values in columns.items()},
            pictures={camera: _Recording(recordings / f"{serial}.mp4", keep_T) for camera, serial in serials.items()},
            task=self._task(metadata_files[0].stem if metadata_files else "", metadata),
        )

    def _task(self, stem: str, metadata: Mapping[str, Any]) -> str:
        annotated = self._annotations.get(stem.rpartition("_")[2], {})
        return annotated.get("language_instruction1") or metadata.get("current_task", "")


def _columns(file: "h5py.File", path: Path) -> dict[str, np.ndarray]:
    columns = {new: read_vector(file, f"observation/robot_state/{old}", path) for new, old in _STATE.items()}
    actions = get(file, "action", path)
    names = [name for name in actions if hasattr(actions[name], "shape")]
    return columns | {f"action.{name}": read_vector(actions, name, path) for name in names}


def _serials(file: "h5py.File", metadata: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Serial number per camera."""
    if all(entry in metadata for entry in _CAMERAS.values()):
        return {camera: str(metadata[entry]) for camera, entry in _CAMERAS.items()}
    kinds = get(file, "observation/camera_type", path)
    wrist = {serial: not read_vector(kinds, serial, path).any() for serial in sorted(kinds)}
    ordered = [s for s, is_wrist in wrist.items() if not is_wrist][:2] + [
        s for s, is_wrist in wrist.items() if is_wrist
    ]
    if len(ordered) != len(_CAMERAS):
        where = f"{path}, observation/camera_type"
        broken("two outside cameras and one wrist camera", f"{len(ordered)}", where, OTHER_LAYOUT)
    return dict(zip(_CAMERAS, ordered, strict=True))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        broken("a readable JSON file", str(error), path)


@dataclass(frozen=True)
class _Recording:
    """The pictures of an MP4 file at the frames to keep."""

    path: Path
    keep_T: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        block: list[np.ndarray] = []
        for keep, image in zip(self.keep_T, self._decode(), strict=False):
            block += [image] if keep else []
            if len(block) == BLOCK:
                yield np.stack(block)
                block = []
        if block:
            yield np.stack(block)

    def _decode(self) -> Iterator[np.ndarray]:
        count = 0
        try:
            with av.open(str(self.path)) as container:
                for frame in container.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")
                    count += 1
        except (FFmpegError, IndexError) as error:
            broken("a readable video", f"{error} after {count} frames", self.path)
        if count < len(self.keep_T):
            broken(f"{len(self.keep_T)} frames, as trajectory.h5 has", f"{count}", self.path)
