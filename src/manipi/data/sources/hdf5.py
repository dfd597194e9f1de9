"""Episodes in HDF5 files: ALOHA's, and those of robomimic and LIBERO."""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from manipi.data.sources.source import (
    Blocks,
    EpisodeSource,
    SourceEpisode,
    broken,
    by_number,
    find_files,
    optional_module,
    vector,
)
from manipi.errors import DatasetFormatError

if TYPE_CHECKING:
    import h5py

_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
_ALOHA_NAMES = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _ARM)


class AlohaSource(EpisodeSource):
    """ALOHA and its descendants: a file per episode, 50 frames per second, no instruction.

    observations/qpos, qvel, effort   observation.state, observation.velocity, observation.effort
    observations/images/CAMERA        observation.images.CAMERA: raw [T, h, w, 3], or a JPEG per row
    action, base_action               action, action.base

    `effort`, `qvel` and `base_action` may be missing. Layout: github.com/tonyzhaozh/act, record_sim_episodes.py.
    """

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

    def __init__(self, root: Path):
        super().__init__(root)
        self._files = {path.name if root.is_file() else str(path.relative_to(root)): path for path in _files(root)}
        self.names = list(self._files)
        self.dimension_names = dict.fromkeys((new for _, new, _ in self.columns), _ALOHA_NAMES)

    @contextmanager
    def open(self, name: str) -> Iterator[SourceEpisode]:
        path = self._files[name]
        with open_hdf5(path) as file:
            wanted = {new: old for old, new, required in self.columns if required or old in file}
            columns = {new: read_vector(file, old, path) for new, old in wanted.items()}
            cameras = get(file, "observations/images", path)
            pictures = {f"observation.images.{key}": blocks(cameras, key, path) for key in cameras}
            yield SourceEpisode(columns=columns, pictures=pictures)


class RobomimicSource(EpisodeSource):
    """robomimic and LIBERO: many episodes per file; LIBERO has one file per task.

    data/demo_N/obs/NAME                  observation.images.NAME where uint8 [T, h, w, 3], else observation.NAME
    data/demo_N/actions, rewards, dones   action, next.reward, next.done
    data attribute problem_info           LIBERO's instruction; RoboCasa's is in the episode's ep_meta
    data attribute env_args               control_freq, else 20 frames per second

    Simulator states, and the observations after each step (next_obs), are not read. LIBERO's pictures are upside down.
    Layout: robomimic.github.io/docs/datasets/overview.html.
    """

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
        for path in _files(root):
            stem = path.name if root.is_file() else str(path.relative_to(root))
            try:
                with open_hdf5(path) as file:
                    self.fps = self.fps or _control_freq(get(file, "data", path), path)
                    demos = sorted(get(file, "data", path), key=by_number)
                self._episodes |= {f"{stem}:{demo}": (path, demo) for demo in demos}
            except DatasetFormatError:
                self._episodes[stem] = path, ""  # opening the episode says what is wrong, and may be skipped
        self.names = list(self._episodes)

    @contextmanager
    def open(self, name: str) -> Iterator[SourceEpisode]:
        path, demo = self._episodes[name]
        with open_hdf5(path) as file:
            data = get(file, "data", path)
            episode, where = get(data, demo, path), f"{path}, {demo}"
            wanted = {new: old for old, new, required in self.columns if required or old in episode}
            columns = {new: read_vector(episode, old, where) for new, old in wanted.items()}
            observations = get(episode, "obs", where)
            cameras = [key for key in observations if len(getattr(observations[key], "shape", ())) == 4]
            vectors = {key: read_vector(observations, key, where) for key in observations if key not in cameras}
            yield SourceEpisode(
                columns={f"observation.{key}": values for key, values in vectors.items()} | columns,
                pictures={f"observation.images.{key}": blocks(observations, key, where) for key in cameras},
                task=_instruction(data, episode, where),
            )


def _instruction(data: "h5py.Group", episode: "h5py.Group", where: str) -> str:
    text = _about(data, "problem_info", where).get("language_instruction", "")
    text = text if isinstance(text, str) else " ".join(text)
    return text.strip() or _about(episode, "ep_meta", where).get("lang", "")


def _control_freq(data: "h5py.Group", where: str | Path) -> float:
    return float(_about(data, "env_args", where).get("env_kwargs", {}).get("control_freq", 20))


def _about(group: "h5py.Group", name: str, where: str | Path) -> dict[str, Any]:
    """The JSON in an attribute; nothing where there is none."""
    try:
        return json.loads(str(group.attrs.get(name, "{}")))
    except json.JSONDecodeError as error:
        broken(f"JSON in the attribute {name!r} of {group.name}", str(error), where)


def recognise(files: Sequence[Path]) -> str:
    """`aloha` or `robomimic`, by the first file that can be read."""
    error: DatasetFormatError | None = None
    for path in files:
        try:
            with open_hdf5(path) as file:
                if "observations/qpos" in file:
                    return "aloha"
                if "data" in file:
                    return "robomimic"
                broken("observations/qpos (ALOHA) or data/demo_N (robomimic, LIBERO)", ", ".join(file) or "none", path)
        except DatasetFormatError as caught:
            error = error or caught
    assert error, "called with at least one file"
    raise error


# Files --------------------------------------------------------------------------------------------------------------


def _files(root: Path) -> list[Path]:
    return find_files(root, "*.hdf5", "*.h5")


@contextmanager
def reading(where: str | Path) -> Iterator[None]:
    """What h5py says about a damaged file, as a DatasetFormatError."""
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        broken("a readable HDF5 file", str(error), where)


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
        broken(f"{name!r} in {group.name}", ", ".join(group) or "nothing", where)
    return group[name]


def read_vector(group: "h5py.Group", name: str, where: str | Path) -> np.ndarray:
    """A dataset in full, [T, d]."""
    dataset = get(group, name, where)
    if not getattr(dataset, "shape", ()) or dataset.dtype.kind not in "biuf":
        broken(f"numbers of every frame in {name!r}", str(dataset), where)
    with reading(f"{where}, {name}"):
        return vector(dataset[()])


def blocks(group: "h5py.Group", name: str, where: str | Path) -> Blocks:
    """The pictures of a dataset: raw, or encoded with padding behind."""
    rows = get(group, name, where)
    return Blocks(partial(_pictures, rows, f"{where}, {name}"), 0, len(rows))


def _pictures(rows: "h5py.Dataset", where: str, start: int, stop: int) -> np.ndarray:
    with reading(where):
        block = rows[start:stop]
    return (
        block
        if block.ndim == 4
        else np.stack([_decode(row, f"{where}, frame {start + i}") for i, row in enumerate(block)])
    )


def _decode(row: np.ndarray, where: str) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(row.tobytes())).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        broken("a JPEG or PNG picture", str(error), where)
