"""What an RLDS dataset says of itself, and which features become which keys.

RLDS gives no rate, no camera names and no order of the numbers in a command, so each dataset needs a map. One that is
not here is a few lines, in Python for `open_rlds(folder, fields=…)`, or as `rlds_fields.json` beside `features.json`,
where every command of manipi finds it (docs/rlds.md); what it leaves out has its default:

    {"fps": 3, "vectors": {"state": ["observation/state"], "actions": ["action/world_vector", "action/rotation_delta"]}}

`manipi inspect` of a folder with only the rate in that file lists the features to choose from.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from manipi.data.dataset import Feature
from manipi.data.rlds.tfrecord import broken, read_json
from manipi.errors import ConfigError, DatasetFormatError, FetchError, MissingFeatureError, unknown_name
from manipi.records import fingerprint, from_json, read_object, to_json
from manipi.remote.fetch import fetch, fetch_error, is_here, origin

FIELDS_FILE = "rlds_fields.json"
_INFO = "dataset_info.json"
_INSTRUCTIONS = ("language_instruction", "natural_language_instruction")
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True, kw_only=True)
class RldsFields:
    """A map from features to dataset keys. Features of a step are written `observation/state`, as in features.json."""

    fps: float
    """Steps per second, which RLDS does not record."""
    images: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Camera -> picture features, of which every row shows one (`RldsDataset`); empty: all, under their own names."""
    vectors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Key -> the features whose numbers, one after the other, are its vector; empty: all, under their own names."""
    prompts: tuple[str, ...] = ()
    """Texts of which every row shows one; empty: those named (natural_)language_instruction."""
    episode_key: tuple[str, ...] = ()
    """Features of an episode that, with -- between them, are its key."""
    only: Mapping[str, str] = field(default_factory=dict)
    """Feature of an episode -> what it has to contain; other episodes are left out."""

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ConfigError(
                expected="a positive rate in Hz",
                found=f"{self.fps}",
                where="RldsFields.fps",
                next="look it up where the dataset is published: RLDS does not record it",
            )


def droid_fields(
    action_space: Literal["joint_position", "joint_velocity"], *, exterior: Literal["either", "both"] = "either"
) -> RldsFields:
    """DROID 1.0.1, and sets made like it, with the keys of `robots.franka.droid`; of the episodes, the successful ones.

    Args:
        action_space: which of the recorded commands are the actions; the gripper's position follows them.
        exterior: `either` of the outside cameras in every row, as the reference trains; or `both`, each by its name.
    """
    if action_space not in ("joint_position", "joint_velocity"):
        raise unknown_name("action space", action_space, ("joint_position", "joint_velocity"), next="name one of them")
    first, second, wrist = "exterior_image_1_left", "exterior_image_2_left", "wrist_image_left"
    cameras = (
        {first: (first, second), wrist: (wrist,)} if exterior == "either" else {c: (c,) for c in (first, second, wrist)}
    )
    states = ("joint_position", "gripper_position")
    return RldsFields(
        fps=15.0,
        images={key: tuple(f"observation/{name}" for name in names) for key, names in cameras.items()},
        vectors={name: (f"observation/{name}",) for name in states}
        | {"actions": (f"action_dict/{action_space}", "action_dict/gripper_position")},
        prompts=("language_instruction", "language_instruction_2", "language_instruction_3"),
        episode_key=("episode_metadata/recording_folderpath", "episode_metadata/file_path"),
        only={"episode_metadata/file_path": "success"},
    )


BRIDGE = RldsFields(
    fps=5.0,
    vectors={"state": ("observation/state",), "actions": ("action",)},
    prompts=("language_instruction",),
    episode_key=("episode_metadata/file_path",),
)
"""BridgeData V2 (WidowX, 5 Hz: Walke et al., CoRL 2023) in the layout of Open X-Embodiment, all its cameras."""

_DROID = droid_fields("joint_position", exterior="both")
KNOWN = {"droid": _DROID, "polaris_droid_cotrain_dataset": _DROID, "bridge_dataset": BRIDGE}
"""By the name in dataset_info.json, for commands that are given no map."""


BY_NAME = {f"droid_{space}": droid_fields(space) for space in ("joint_position", "joint_velocity")}
"""For recipes, which name the map that they were made for."""


def find_fields(root: Path, name: str) -> RldsFields:
    """The map beside the dataset's files, or the one of its name. Raises ConfigError where there is neither."""
    path = root / FIELDS_FILE
    if path.is_file():
        defaults = to_json(RldsFields(fps=1.0))
        del defaults["fps"]
        return from_json(defaults | read_object(path, DatasetFormatError), (RldsFields,), str(path))
    if name in KNOWN:
        return KNOWN[name]
    raise ConfigError(
        expected=f"a map from its features to keys, as there is for {', '.join(KNOWN)}",
        found=f"a dataset of the name {name}",
        where=str(root),
        next=f"""echo '{{"fps": 10}}' > {path}  # its real rate; more fields: manipi.data.rlds.fields""",
    )


# Metadata -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RldsSplit:
    """One split of a dataset in a version's folder, and what of it is read."""

    root: Path
    origin: str
    """The address that record files are fetched from; empty where they are in `root`."""
    name: str
    files: tuple[Path, ...]
    num_records: tuple[int, ...]
    """Per file, as dataset_info.json says."""
    metadata: str
    """Digest of the two JSON files."""
    steps: Mapping[str, Feature]
    """All features of a step that can be read."""
    fields: RldsFields
    """The map, with the features themselves where it says to take all."""

    @property
    def pictures(self) -> list[str]:
        """The picture features that some camera shows, in an order that does not depend on the cameras."""
        return sorted({feature for features in self.fields.images.values() for feature in features})

    def vector(self, key: str) -> Feature:
        parts = [self.steps[feature] for feature in self.fields.vectors[key]]
        dtype = "int64" if all("float" not in part.dtype for part in parts) else "float32"
        shape = parts[0].shape if len(parts) == 1 else (sum(math.prod(part.shape) for part in parts),)
        return Feature(kind="vector", shape=shape, dtype=dtype)


def find_version(folder: Path) -> Path | None:
    """The folder of a version, given that or its parent; None where neither holds record files or their metadata.

    Raises:
        ConfigError: the parent of several versions; names them.
    """

    def is_version(path: Path) -> bool:
        return any(name in ("features.json", _INFO) or ".tfrecord" in name for name in os.listdir(path))

    if is_version(folder):
        return folder
    versions = [path for path in sorted(folder.iterdir()) if path.is_dir() and is_version(path)]
    if len(versions) > 1:
        raise ConfigError(
            expected="the folder of one version",
            found=f"{len(versions)}: {', '.join(path.name for path in versions)}",
            where=str(folder),
            next=f"name one of them, such as {versions[-1]}",
        )
    return versions[0] if versions else None


def fetch_metadata(url: str) -> Path:
    """The folder that a version's metadata are in, and its record files later. FetchError where there is no version."""
    optional = [] if is_here(f"{url}/{_INFO}") else [FIELDS_FILE]
    # What comes last tells that all that there is came.
    for name in (*optional, "features.json", _INFO):
        try:
            path = fetch(f"{url}/{name}", show=False)
        except FetchError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            if name not in optional:
                next = f"give the address of the dataset itself; of RLDS that of a version, such as {url}/1.0.0"
                found = f"no {name}"
                raise fetch_error("LeRobot's meta/info.json, or an RLDS version", found, url, next) from error
    return path.parent  # pyright: ignore[reportPossiblyUnboundVariable]


def read_info(root: Path) -> dict[str, Any]:
    """dataset_info.json, which has a name and splits; else DatasetFormatError."""
    info = read_json(root / _INFO)
    with _malformed(root / _INFO):
        return info | {"name": str(info["name"]), "splits": list(info["splits"])}


def read_split(root: Path, fields: RldsFields, split: str) -> RldsSplit:
    """Read the metadata of a version's folder.

    Raises:
        DatasetFormatError: metadata that are missing or broken, or record files of another format than TFRecord.
        MissingFeatureError: the map names a feature that is not there, or of another kind.
        UnknownNameError: no such split; names those that are there.
    """
    info, features = read_info(root), read_json(root / "features.json")
    with _malformed(root / _INFO):
        splits = {entry["name"]: entry for entry in info["splits"]}
    with _malformed(root / "features.json"):
        leaves = dict(_leaves(features, ""))
    if split not in splits:
        raise unknown_name("split", split, splits, next=f"name one of those in {root / _INFO}")
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        broken("record files in the format tfrecord", repr(info["fileFormat"]), root / _INFO)
    with _malformed(root / _INFO):
        entry = splits[split]
        num_records = tuple(int(number) for number in entry["shardLengths"])
        template, total = entry.get("filepathTemplate") or _TEMPLATE, f"{len(num_records):05d}"
        names = {"DATASET": info["name"], "SPLIT": split, "FILEFORMAT": "tfrecord", "NUM_SHARDS": total}
        indices = [f"{i:05d}" for i in range(len(num_records))]
        files = [template.format(**names, SHARD_INDEX=i, SHARD_X_OF_Y=f"{i}-of-{total}") for i in indices]
    steps = {name.removeprefix("steps/"): leaf for name, leaf in leaves.items() if name.startswith("steps/")}
    needed = [(name, "text", leaves) for name in (*fields.only, *fields.episode_key)]
    needed += [(name, "text", steps) for name in fields.prompts]
    for kind, groups in (("image", fields.images), ("vector", fields.vectors)):
        needed += [(name, kind, steps) for names in groups.values() for name in names]
    for name, kind, there in needed:
        if name not in there or there[name].kind != kind:
            known = sorted(n for n, leaf in there.items() if leaf.kind == kind)
            raise MissingFeatureError(
                expected=f"{kind} {name!r}",
                found=f"{there[name].kind} {name!r}" if name in there else f"only {', '.join(known) or 'none'}",
                where=str(root / "features.json"),
                next="name one of those in the RldsFields",
            )
    every = {
        kind: {n: (n,) for n in sorted(steps) if steps[n].kind == kind and not is_depth(n, steps[n])}
        for kind in ("image", "vector", "text")
    }
    return RldsSplit(
        root=root,
        origin=origin(root / _INFO).removesuffix(f"/{_INFO}"),
        name=info["name"],
        files=tuple(root / file for file in files),
        num_records=num_records,
        metadata=fingerprint([info, features]),
        steps=steps,
        fields=replace(
            fields,
            images=fields.images or every["image"],
            vectors=fields.vectors or every["vector"],
            prompts=fields.prompts or tuple(n for n in every["text"] if n.split("/")[-1] in _INSTRUCTIONS),
        ),
    )


def is_depth(name: str, feature: Feature) -> bool:
    """Whether a matrix of numbers is a depth map, which is no vector unless a map of fields says so."""
    return feature.kind == "vector" and len(feature.shape) == 2 and "depth" in name.lower() and min(feature.shape) >= 16


@contextmanager
def _malformed(where: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        broken("the entries that tensorflow_datasets writes", f"{type(error).__name__}: {error}", where)


def _leaves(node: Mapping[str, Any], name: str) -> Iterator[tuple[str, Feature]]:
    """Features by their path, `steps/observation/state`; those that no key can show are left out.

    These are inner sequences, tensors of three and more or unknown dimensions or in an encoding of their own, and
    pictures in anything but 8-bit RGB.
    """
    if "featuresDict" in node:
        for part, child in node["featuresDict"]["features"].items():
            yield from _leaves(child, f"{name}/{part}" if name else part)
    elif name == "steps" and "sequence" in node:
        yield from _leaves(node["sequence"]["feature"], name)
    elif "text" in node:
        yield name, Feature(kind="text", shape=(1,), dtype="string")
    elif "classLabel" in node:
        yield name, Feature(kind="vector", shape=(1,), dtype="int64")
    elif "image" in node or "tensor" in node:
        entry = node.get("image") or node["tensor"]
        shape = tuple(int(size) for size in entry["shape"].get("dimensions", ()))
        dtype = entry.get("dtype", "uint8")
        if "image" in node:
            if dtype == "uint8" and shape[2:] == (3,):
                yield name, Feature(kind="image", shape=shape, dtype="image")
        elif dtype in ("string", "object", "bytes") and not shape:
            yield name, Feature(kind="text", shape=(1,), dtype="string")
        elif len(shape) < 3 and min(shape, default=1) > 0 and entry.get("encoding", "none") == "none":
            yield name, Feature(kind="vector", shape=shape or (1,), dtype=dtype)
