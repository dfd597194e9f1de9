"""The readers: ALOHA, robomimic, LIBERO, DROID, ReplayBuffer, LeRobot and RLDS."""

import json
import zipfile
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.error import FFmpegError

from manipi.convert.formats import (
    BLOCK,
    OTHER_LAYOUT,
    Blocks,
    EpisodeReader,
    RecordedEpisode,
    broken,
    by_number,
    find_files,
    kind_of,
    optional_module,
    remark,
    vector,
)
from manipi.data.dataset import Episode
from manipi.data.lerobot.language import EVENTS, PERSISTENT
from manipi.data.lerobot.video import DeepPicture, decode_picture
from manipi.data.open import open_dataset
from manipi.data.review.values import uneven_timestamps
from manipi.errors import ConfigError, DatasetFormatError, shown

if TYPE_CHECKING:
    import h5py
    import zarr

_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
_ARMS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _ARM)


class AlohaReader(EpisodeReader):
    """ALOHA and its descendants: a file per episode, 50 frames per second, no instruction.

    observations/qpos, qvel, effort   observation.state, observation.velocity, observation.effort
    observations/images/CAMERA        observation.images.CAMERA: raw [T, h, w, 3], or a JPEG per row
    action, base_action               action, action.base

    `effort`, `qvel` and `base_action` may be missing. Layout: github.com/tonyzhaozh/act, record_sim_episodes.py.
    """

    layout = "episode_N.hdf5 with observations/qpos, observations/images/CAMERA, action"
    robot_type = "aloha"
    fps = 50.0
    columns = (
        ("observations/qpos", "observation.state", True),
        ("observations/qvel", "observation.velocity", False),
        ("observations/effort", "observation.effort", False),
        ("action", "action", True),
        ("base_action", "action.base", False),
    )
    """Where, what it becomes, and whether it must be there."""
    dimension_names = dict.fromkeys([new for _, new, _ in columns], _ARMS)

    def __init__(self, root: Path):
        super().__init__(root)
        self._files = find_files(root, *_HDF5)
        self.names = list(self._files)

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return _hdf5_layout(root) == "aloha"

    @contextmanager
    def open(self, name: str) -> Iterator[RecordedEpisode]:
        path = self._files[name]
        with open_hdf5(path) as file:
            columns = _vectors(file, self.columns, path)
            cameras = get(file, "observations/images", path)
            # Whatever else is there shows when it is read, unless it is left out.
            kinds = {key: "depth" if _kind(cameras, key, "picture") == "depth" else "picture" for key in cameras}
            yield RecordedEpisode(columns=columns, **_cameras(cameras, kinds, path))


class RobomimicReader(EpisodeReader):
    """robomimic and LIBERO: many episodes per file; LIBERO has one file per task.

    data/demo_N/obs/NAME                  observation.images.NAME where it holds pictures, else observation.NAME
    data/demo_N/actions, rewards, dones   action, next.reward, next.done
    data attribute problem_info           LIBERO's instruction; RoboCasa's is in the episode's ep_meta
    data attribute env_args               control_freq, else 20 frames per second

    Simulator states, and the observations after each step (next_obs), are not read. LIBERO's pictures are upside down.
    Layout: robomimic.github.io/docs/datasets/overview.html.
    """

    layout = "one .hdf5 file with data/demo_N/obs and actions"
    robot_type = "panda"
    columns = (("actions", "action", True), ("rewards", "next.reward", False), ("dones", "next.done", False))
    joins = (
        ("observation.state", ("observation.ee_states", "observation.gripper_states")),
        (
            "observation.state",
            ("observation.robot0_eef_pos", "observation.robot0_eef_quat", "observation.robot0_gripper_qpos"),
        ),
    )

    def __init__(self, root: Path):
        super().__init__(root)
        self._episodes: dict[str, tuple[Path, str]] = {}
        for stem, path in find_files(root, *_HDF5).items():
            try:
                with open_hdf5(path) as file:
                    data = get(file, "data", path)
                    settings = _attribute(data, "env_args", path).get("env_kwargs", {})
                    self.fps = self.fps or float(settings.get("control_freq", 20))
                    self._episodes |= {f"{stem}:{demo}": (path, demo) for demo in sorted(data, key=by_number)}
            except DatasetFormatError:
                self._episodes[stem] = path, ""  # opening the episode says what is wrong, and may be skipped
        self.names = list(self._episodes)

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return _hdf5_layout(root) == "robomimic"

    @contextmanager
    def open(self, name: str) -> Iterator[RecordedEpisode]:
        path, demo = self._episodes[name]
        with open_hdf5(path) as file:
            data = get(file, "data", path)
            episode, where = get(data, demo, path), f"{path}, {demo}"
            columns = _vectors(episode, self.columns, where)
            observations = get(episode, "obs", where)
            kinds = {key: _kind(observations, key, "vector") for key in observations}
            vectors = {k: read_vector(observations, k, where) for k, kind in kinds.items() if kind == "vector"}
            text = _attribute(data, "problem_info", where).get("language_instruction", "")
            text = text if isinstance(text, str) else " ".join(text)
            yield RecordedEpisode(
                columns={f"observation.{key}": values for key, values in vectors.items()} | columns,
                task=text.strip() or _attribute(episode, "ep_meta", where).get("lang", ""),
                **_cameras(observations, kinds, where),
            )


class LiberoReader(RobomimicReader):
    """LIBERO by its own name, whose files robomimic's reader recognises too."""

    layout = "TASK_demo.hdf5 files with data/demo_N/obs and actions"

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return False


def _attribute(group: "h5py.Group", name: str, where: str | Path) -> dict[str, Any]:
    """The JSON in an attribute; nothing where there is none."""
    try:
        return json.loads(str(group.attrs.get(name, "{}")))
    except json.JSONDecodeError as error:
        broken(f"JSON in the attribute {name!r} of {group.name}", str(error), where, OTHER_LAYOUT)


# HDF5 ---------------------------------------------------------------------------------------------------------------

_HDF5 = ("*.hdf5", "*.h5")


def _hdf5_layout(root: Path) -> str:
    """`aloha` or `robomimic`, by the first file that can be read; empty where there is no file."""
    errors = list[DatasetFormatError]()
    for path in find_files(root, *_HDF5).values():
        try:
            with open_hdf5(path) as file:
                for member, layout in (("observations/qpos", "aloha"), ("data", "robomimic")):
                    if member in file:
                        return layout
                expected = "observations/qpos (ALOHA) or data/demo_N (robomimic, LIBERO)"
                broken(expected, ", ".join(file) or "none", path, OTHER_LAYOUT)
        except DatasetFormatError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return ""


@contextmanager
def reading(where: str | Path, what: str = "HDF5 file") -> Iterator[None]:
    """What h5py or zarr says about damaged data, as a DatasetFormatError; a missing decoder by its name."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, zipfile.BadZipFile) as error:
        if "imagecodecs" not in str(error):
            broken(f"a readable {what}", str(error) or type(error).__name__, where)
        raise ConfigError(
            expected="the library imagecodecs, which decodes JPEG-XL",
            found=str(error),
            where=str(where),
            next="pip install imagecodecs",
        ) from error


@contextmanager
def open_hdf5(path: Path) -> "Iterator[h5py.File]":
    """The file, to read."""
    h5py = optional_module("h5py")
    with reading(path):
        file = h5py.File(path, "r")
    with file:
        yield file


def get(group: "h5py.Group", name: str, where: str | Path) -> Any:
    """A member of a group; DatasetFormatError where there is none."""
    if not name or name not in group:
        broken(f"{name!r} in {group.name}", ", ".join(group) or "nothing", where, OTHER_LAYOUT)
    return group[name]


def read_vector(group: "h5py.Group", name: str, where: str | Path) -> np.ndarray:
    """A dataset in full, [T, d]."""
    dataset = get(group, name, where)
    if not getattr(dataset, "shape", ()) or dataset.dtype.kind not in "biuf":
        broken(f"numbers of every frame in {name!r}", str(dataset), where, OTHER_LAYOUT)
    with reading(f"{where}, {name}"):
        return vector(dataset[()])


def _vectors(group: "h5py.Group", columns: Iterable[tuple[str, str, bool]], where: str | Path) -> dict[str, np.ndarray]:
    """The columns of a reader's table that are there; DatasetFormatError where one is missing that must be."""
    return {new: read_vector(group, old, where) for old, new, required in columns if required or old in group}


def _kind(group: "h5py.Group", name: str, encoded: str) -> str:
    """As `kind_of`; `encoded`: what rows of bytes are."""
    rows: Any = group[name]
    return encoded if _is_encoded(rows) else kind_of(name, rows.shape[1:], rows.dtype)


def _is_encoded(rows: Any) -> bool:
    """Whether the rows are bytes, of one length or of any; so is a group, which reading it refuses."""
    return len(getattr(rows, "shape", ())) < 3 and getattr(rows, "dtype", np.dtype("O")) in (np.uint8, np.dtype("O"))


def _cameras(group: "h5py.Group", kinds: Mapping[str, str], where: str | Path) -> dict[str, Any]:
    """The pictures of a group, raw or encoded with padding behind, and what to know of them."""
    pictures, remarks = {}, {}
    for name, kind in kinds.items():
        if kind != "vector":
            rows: Any = group[name]
            key, place = f"observation.images.{name}", f"{where}, {name}"
            raw = not _is_encoded(rows)
            remarks[key] = remark(kind, rows.shape[1:], rows.dtype) if raw else ""
            if kind == "picture":
                pictures[key] = Blocks(partial(_read_pictures, rows, not raw, place), 0, len(rows), place)
    return {"pictures": pictures, "remarks": remarks}


def _read_pictures(rows: "h5py.Dataset", encoded: bool, where: str, start: int, stop: int) -> np.ndarray:
    if not hasattr(rows, "shape"):
        broken("pictures, raw or encoded", str(rows), where, "leave it out: --exclude NAME")
    with reading(where):
        block = rows[start:stop]
    if not encoded:
        return block
    images = []
    for frame, row in enumerate(block, start):
        try:
            images.append(decode_picture(row.tobytes()))
        except DeepPicture as error:
            next = "leave the camera out: --exclude NAME"
            broken("pictures of 8 bits per channel", str(error), f"{where}, frame {frame}", next)
        except ValueError as error:
            broken("a JPEG or PNG picture", str(error), f"{where}, frame {frame}")
    return np.stack(images)


# DROID --------------------------------------------------------------------------------------------------------------

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


class DroidReader(EpisodeReader):
    """Raw DROID, at 15 frames per second, with the feature names of openpi's converter.

    trajectory.h5 of every episode's folder:
    observation/robot_state/…         joint_position, gripper_position, cartesian_position
    action/NAME                       action.NAME; actions = joint velocity and gripper position
    recordings/MP4/SERIAL.mp4         wrist_image_left, exterior_image_1_left, exterior_image_2_left

    Which camera is which is told by metadata_*.json, or else by observation/camera_type (0: wrist; the others in the
    order of their serial numbers). The instruction is `language_instruction1` of aggregated-annotations-*.json beside
    the episodes, or else `current_task` of the metadata. A recording may go on after the numbers end. All frames are
    kept, as openpi does, unless `drop_skipped`. Layout: github.com/droid-dataset/droid, trajectory_utils.
    """

    layout = "folders with trajectory.h5 and recordings/MP4/SERIAL.mp4"
    robot_type = "droid"
    fps = 15.0
    joins = (("actions", ("action.joint_velocity", "action.gripper_position")),)
    marks_skipped = True

    def __init__(self, root: Path):
        super().__init__(root.parent if root.is_file() else root)
        self.names = [str(Path(name).parent) for name in find_files(self.root, "trajectory.h5")]

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return any(root.rglob("trajectory.h5"))

    @cached_property
    def _annotations(self) -> Mapping[str, Mapping[str, str]]:
        path = max(self.root.glob("aggregated-annotations*.json"), default=None)
        return _read_json(path) if path else {}

    @contextmanager
    def open(self, name: str) -> Iterator[RecordedEpisode]:
        folder = self.root / name
        path = folder / "trajectory.h5"
        described = min(folder.glob("metadata_*.json"), default=None)
        metadata = _read_json(described) if described else {}
        with open_hdf5(path) as file:
            columns = {new: read_vector(file, f"observation/robot_state/{old}", path) for new, old in _STATE.items()}
            actions = get(file, "action", path)
            columns |= {f"action.{k}": read_vector(actions, k, path) for k in actions if hasattr(actions[k], "shape")}
            keep_T = np.ones(len(columns["joint_position"]), bool)
            for key, value in _SKIPS if self.drop_skipped else ():
                if key in file:
                    keep_T &= read_vector(file, key, path)[:, 0] != value
            serials = _serial_numbers(file, metadata, path)
        annotated = self._annotations.get(described.stem.rpartition("_")[2], {}) if described else {}
        yield RecordedEpisode(
            columns={key: values[keep_T] if len(values) == len(keep_T) else values for key, values in columns.items()},
            pictures={c: _Mp4(folder / f"recordings/MP4/{serial}.mp4", keep_T) for c, serial in serials.items()},
            task=annotated.get("language_instruction1") or metadata.get("current_task", ""),
        )


def _serial_numbers(file: "h5py.File", metadata: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Per camera."""
    if all(entry in metadata for entry in _CAMERAS.values()):
        return {camera: str(metadata[entry]) for camera, entry in _CAMERAS.items()}
    kinds = get(file, "observation/camera_type", path)
    outside = {serial: read_vector(kinds, serial, path).any() for serial in sorted(kinds)}
    ordered = [s for s, is_outside in outside.items() if is_outside][:2]
    ordered += [s for s, is_outside in outside.items() if not is_outside]
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
class _Mp4:
    """The pictures of an MP4 file at the frames to keep."""

    path: Path
    keep_T: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        count, block = 0, list[np.ndarray]()
        try:
            with av.open(str(self.path)) as container:
                for frame in container.decode(video=0):
                    if count == len(self.keep_T):
                        break
                    block += [frame.to_ndarray(format="rgb24")] if self.keep_T[count] else []
                    count += 1
                    if len(block) == BLOCK:
                        yield np.stack(block)
                        block = []
        except (FFmpegError, IndexError) as error:
            broken("a readable video", f"{error} after {count} frames", self.path)
        if count < len(self.keep_T):
            broken(f"{len(self.keep_T)} frames, as trajectory.h5 has", f"{count}", self.path)
        if block:
            yield np.stack(block)


# Zarr ---------------------------------------------------------------------------------------------------------------

_STORE = "Zarr store"
_NAMES = {"action": "action", "state": "observation.state"}
_UMI_POSE = tuple(f"observation.robot0_{part}" for part in ("eef_pos", "eef_rot_axis_angle", "gripper_width"))


class ZarrReader(EpisodeReader):
    """diffusion_policy's ReplayBuffer, a .zarr folder or .zarr.zip file of all episodes: neither rate nor instruction.

    data/action, data/state   action, observation.state
    data/NAME                 observation.images.NAME where it holds pictures (`kind_of`), else observation.NAME
    meta/episode_ends         the row after the last of each episode

    UMI records no action: the pose of the gripper is what it was made to follow, so it becomes both state and action.
    Layout: github.com/real-stanford/diffusion_policy, common/replay_buffer.py.
    """

    layout = "a .zarr folder or .zarr.zip with data/NAME, meta/episode_ends"
    joins = (("observation.state", _UMI_POSE), ("action", _UMI_POSE))

    def __init__(self, root: Path):
        super().__init__(root)
        with self._open_store() as (rows, arrays), reading(root, _STORE):
            ends = np.asarray(rows[:])
        self._bounds = np.concatenate([[0], ends]).astype(int)
        if (np.diff(self._bounds) <= 0).any():
            where = f"{root}, meta/episode_ends"
            broken("ends of episodes that ascend", f"{ends.tolist()[:10]}", where, "correct meta/episode_ends")
        self.names = [str(number) for number in range(len(ends))]
        self.robot_type = "umi" if any("robot0_eef_pos" in key for key in arrays) else "unknown"

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return root.name.endswith((".zarr", ".zarr.zip")) or (root / "meta/episode_ends").is_dir()

    def files(self) -> Iterable[Path]:
        # The pictures' chunks are a file each, too many to look at.
        if self.root.is_file():
            return [self.root]
        return [path for name in (".zarray", "zarr.json") for path in self.root.glob(f"*/*/{name}")]

    def remarks(self, fps: float) -> Mapping[str, str]:
        """Which arrays lack chunks: a store leaves out those of fill values alone, and a broken copy any."""
        remarks = {}
        with self._open_store() as (_, arrays):
            for key, array in arrays.items():
                with reading(f"{self.root}, data/{key}", _STORE):
                    lacking, count = array.nchunks - array.nchunks_initialized, array.nchunks
                if lacking > 0:
                    found = f"{lacking} of {count} chunks are not in the store, and read as {array.fill_value}"
                    remarks[self._named(key, array)[1]] = f"{found}: right where all is so, else copy the store again"
        return remarks

    @contextmanager
    def open(self, name: str) -> Iterator[RecordedEpisode]:
        start, stop = self._bounds[int(name) : int(name) + 2].tolist()

        def read(array: "zarr.Array", where: str, start: int, stop: int) -> np.ndarray:
            with reading(where, _STORE):
                return np.asarray(array[start:stop])

        with self._open_store() as (_, arrays):
            columns, pictures, remarks = {}, {}, {}
            for key, array in arrays.items():
                where = f"{self.root}, data/{key}, episode {name}"
                if array.shape[0] != self._bounds[-1]:
                    expected = f"{self._bounds[-1]} rows, as meta/episode_ends says"
                    broken(expected, f"{array.shape[0]}", where, "correct meta/episode_ends, or record it again")
                kind, feature = self._named(key, array)
                if kind == "vector":
                    columns[feature] = vector(read(array, where, start, stop))
                    continue
                remarks[feature] = remark(kind, array.shape[1:], array.dtype)
                if kind == "picture":
                    pictures[feature] = Blocks(partial(read, array, where), start, stop, where)
            yield RecordedEpisode(columns=columns, pictures=pictures, remarks=remarks)

    @contextmanager
    def _open_store(self) -> "Iterator[tuple[zarr.Array, dict[str, zarr.Array]]]":
        """The ends of the episodes, and what is below data/, by name."""
        zarr: Any = optional_module("zarr")
        with reading(self.root, _STORE):
            is_zip = self.root.is_file()
            store = zarr.storage.ZipStore(self.root, mode="r") if is_zip else zarr.storage.LocalStore(self.root)
            group = zarr.open_group(store, mode="r")
        with closing(store):
            with reading(self.root, _STORE):
                for name in ("meta/episode_ends", "data"):
                    if name not in group:
                        found = ", ".join(sorted(group.keys())) or "nothing"
                        broken(f"{name!r} in the Zarr store", found, self.root, OTHER_LAYOUT)
                data, ends = group["data"], group["meta/episode_ends"]
                arrays = {key: data[key] for key in sorted(data.array_keys())}
            yield ends, arrays

    def _named(self, key: str, array: "zarr.Array") -> tuple[str, str]:
        """What an array holds, and the feature that it becomes."""
        kind = kind_of(key, array.shape[1:], array.dtype)
        return kind, _NAMES.get(key, f"observation.{key}") if kind == "vector" else f"observation.images.{key}"


# Datasets: whatever `open_dataset` opens -----------------------------------------------------------------------------

_NUMBERING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""What the writer numbers anew."""


class DatasetReader(EpisodeReader):
    """The episodes of a `Dataset`, with their vectors, pictures and, frame by frame, tasks; of texts beside these, what
    LeRobot's language columns say is kept."""

    def __init__(self, root: Path):
        super().__init__(root)
        self._dataset = dataset = open_dataset(root)
        self.fps = dataset.fps
        self._episodes = {str(episode.index): episode for episode in dataset.episodes}
        self.names = list(self._episodes)
        self._vectors = [k for k, f in dataset.features.items() if f.kind == "vector" and k not in _NUMBERING]
        self.dimension_names = {key: dataset.features[key].names for key in self._vectors}

    def remarks(self, fps: float) -> Mapping[str, str]:
        """That gaps and another rate are no longer seen afterwards."""
        if "timestamp" not in self._dataset.features:
            return {}
        seconds = self._dataset.column("timestamp")[:, 0]
        uneven = [
            e.index
            for e in self._dataset.episodes
            if any(uneven_timestamps(e.index, seconds[e.start : e.start + e.length], fps))
        ]
        found = f"not 1/{fps:g} s apart in episodes {shown(uneven, 80)}, and written as if they were: gaps close up"
        return {"timestamp": f"{found}; if their rate is another one, give it with --fps"} if uneven else {}

    @contextmanager
    def open(self, name: str) -> Iterator[RecordedEpisode]:
        dataset, episode = self._dataset, self._episodes[name]
        rows = range(episode.start, episode.start + episode.length)

        def read(camera: str, start: int, stop: int) -> np.ndarray:
            return dataset.images(camera, np.arange(start, stop))

        def column(key: str) -> np.ndarray:
            return vector(dataset.column(key)[rows.start : rows.stop])

        yield RecordedEpisode(
            columns=_Columns({key: partial(column, key) for key in self._vectors}),
            pictures={c: Blocks(partial(read, c), rows.start, rows.stop) for c in dataset.cameras},
            task=[dataset.prompt(row) for row in rows],
            **self._language(episode),
            remarks={k: remark(f.kind, (), np.dtype("u1")) for k, f in dataset.features.items() if f.kind == "depth"},
        )

    def _language(self, episode: Episode) -> dict[str, Any]:
        if not (columns := {PERSISTENT, EVENTS} & self._dataset.features.keys()):
            return {}
        persistent, events = self._dataset.said(self._dataset.episodes.index(episode))
        texts = {PERSISTENT: [(0, one) for one in persistent]}
        texts[EVENTS] = [(frame, one) for frame, items in events.items() for one in items]
        seconds = self._dataset.column("timestamp")[episode.start : episode.start + episode.length, 0]
        return {"language": {key: texts[key] for key in sorted(columns)}, "seconds": seconds}


class LeRobotReader(DatasetReader):
    """LeRobot v2.0, v2.1 and v3.0."""

    layout = "meta/info.json, tables and videos of LeRobot v2 or v3"

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return (root / "meta/info.json").is_file()

    def kept_files(self) -> Mapping[str, bytes]:
        """The words of `subtask_index`."""
        path = self.root / "meta/subtasks.parquet"
        return {"meta/subtasks.parquet": path.read_bytes()} if path.exists() else {}


class RldsReader(DatasetReader):
    """RLDS, with the map of fields beside its files or that of its name (`find_fields`)."""

    layout = "features.json and record files of TFDS"

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return any(root.glob("features.json")) or any(root.glob("*/features.json"))


class _Columns(UserDict[str, Any]):
    """Vectors, each read when it is asked for: one that is left out may be missing. Holds what reads them, by name."""

    def __getitem__(self, key: str) -> np.ndarray:
        return self.data[key]()
