"""Episodes in HDF5 files: ALOHA's, and those of robomimic and LIBERO."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from manipi.convert.source import (
    OTHER_LAYOUT,
    Blocks,
    EpisodeSource,
    SourceEpisode,
    broken,
    by_number,
    find_files,
    kind_of,
    optional_module,
    remark,
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
            # Whatever else is there shows when it is read, unless it is left out.
            kinds = {key: "depth" if _kind(cameras, key, "picture") == "depth" else "picture" for key in cameras}
            yield SourceEpisode(columns=columns, **_cameras(cameras, kinds, path))


class RobomimicSource(EpisodeSource):
    """robomimic and LIBERO: many episodes per file; LIBERO has one file per task.

    data/demo_N/obs/NAME                  observation.images.NAME where it holds pictures, else observation.NAME
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
            kinds = {key: _kind(observations, key, "vector") for key in observations}
            vectors = {k: read_vector(observations, k, where) for k, kind in kinds.items() if kind == "vector"}
            yield SourceEpisode(
                columns={f"observation.{key}": values for key, values in vectors.items()} | columns,
                task=_instruction(data, episode, where),
                **_cameras(observations, kinds, where),
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
        broken(f"JSON in the attribute {name!r} of {group.name}", str(error), where, OTHER_LAYOUT)


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
                expected = "observations/qpos (ALOHA) or data/demo_N (robomimic, LIBERO)"
                broken(expected, ", ".join(file) or "none", path, OTHER_LAYOUT)
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
        broken(f"{name!r} in {group.name}", ", ".join(group) or "nothing", where, OTHER_LAYOUT)
    return group[name]


def read_vector(group: "h5py.Group", name: str, where: str | Path) -> np.ndarray:
    """A dataset in full, [T, d]."""
    dataset = get(group, name, where)
    if not getattr(dataset, "shape", ()) or dataset.dtype.kind not in "biuf":
        broken(f"numbers of every frame in {name!r}", str(dataset), where, OTHER_LAYOUT)
    with reading(f"{where}, {name}"):
        return vector(dataset[()])


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
                pictures[key] = Blocks(partial(_pictures if raw else _encoded, rows, place), 0, len(rows), place)
    return {"pictures": pictures, "remarks": remarks}


def _pictures(rows: "h5py.Dataset", where: str, start: int, stop: int) -> np.ndarray:
    if not hasattr(rows, "shape"):
        broken("pictures, raw or encoded", str(rows), where, "leave it out: --exclude NAME")
    with reading(where):
        return rows[start:stop]


def _encoded(rows: "h5py.Dataset", where: str, start: int, stop: int) -> np.ndarray:
    block = _pictures(rows, where, start, stop)
    return np.stack([_decode(row, f"{where}, frame {start + i}") for i, row in enumerate(block)])


def _decode(row: np.ndarray, where: str) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(row.tobytes()))
        if image.mode.startswith(("I", "F")):  # which would come out white
            found = f"{image.format} of the mode {image.mode}, as depth is stored"
            broken("pictures of 8 bits per channel", found, where, "leave the camera out: --exclude NAME")
        return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        broken("a JPEG or PNG picture", str(error), where)
