"""Which features of an RLDS dataset become which keys, as data; and the maps of known datasets.

RLDS gives no rate, no camera names and no order of the numbers in a command, so each dataset needs a map. One that is
not here is a few lines, in Python for `open_rlds(folder, fields=…)`, or as `rlds_fields.json` beside `features.json`,
where every command of manipi finds it (docs/rlds.md); what it leaves out has its default:

    {"fps": 3, "vectors": {"state": ["observation/state"], "actions": ["action/world_vector", "action/rotation_delta"]}}

`manipi inspect` of a folder with only the rate in that file lists the features to choose from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from manipi.data.rlds.tfrecord import read_json
from manipi.errors import ConfigError, unknown_name
from manipi.records import from_json, to_json

FIELDS_FILE = "rlds_fields.json"


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
    """DROID 1.0.1, and sets made like it, with the keys of `robots.droid`; of the episodes, the successful ones.

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
        return from_json(defaults | read_json(path), (RldsFields,), str(path))
    if name in KNOWN:
        return KNOWN[name]
    raise ConfigError(
        expected=f"a map from its features to keys, as there is for {', '.join(KNOWN)}",
        found=f"a dataset of the name {name}",
        where=str(root),
        next=f"""echo '{{"fps": 10}}' > {path}  # its real rate; more fields: manipi.data.rlds.fields""",
    )
