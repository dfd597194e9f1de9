"""The files beside a policy's weights: LeRobot's, written and read, and openpi's.

openpi-torch   config.json                  action_horizon, action_dim
lerobot        config.json                  sizes, steps, normalisation, features, relative actions
               policy_preprocessor.json     what LeRobot does around the model, step by step; these count where they
               policy_postprocessor.json    say otherwise than config.json would
               policy_preprocessor_step_2_normalizer_processor.safetensors   observation.state.mean, action.q99, …

State and actions are the model's there: LeRobot knows none of our robots' conversions (6D rotations, gripper
directions, limits), so whoever calls it has to do them, as around openpi. Offsets from the state are the exception:
LeRobot has steps for those since 0.5.1, and they are written for a relative robot, so that it hands out positions.

What is read is held against recipe, robot and flags (`Stated`). Nothing that changes what the model sees or what its
actions mean is passed over: a step or a mode that has no place here is refused by its name.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from manipi.checkpoints.native import Checkpoint
from manipi.errors import CheckpointError, ConfigError, NormStatsError, shown
from manipi.model.config import ModelConfig, NormMode, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.records import write_json
from manipi.robots.robot import Robot
from manipi.tokenizers.text import PALIGEMMA_PIECES_SHA256, SentencePieceTokenizer
from manipi.transforms.actions import ActionSpace
from manipi.transforms.normalize import EPSILON, stats_from_fields
from manipi.types import NormStats
from manipi.weights.layouts import ForeignWeights
from manipi.weights.stores import Fields, SafetensorsStore, file_beside, unexpected

CONFIG = "config.json"
PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
DESCRIPTION = "manipi"
"""The folder beside weights that manipi exported, which says all that their layout cannot."""
KINDS: dict[str, type[ModelConfig]] = {"pi0": Pi0Config, "pi05": Pi05Config, "pi0_fast": Pi0FastConfig}
MODES: dict[NormMode, str] = {"zscore": "MEAN_STD", "quantile": "QUANTILES"}
ABSOLUTE = "(absolute)"
"""In the name of every dimension that is no offset; LeRobot excludes dimensions by a part of their name."""
_STATS = ("mean", "std", "q01", "q99", "min", "max")
_FEATURES = {"state": "observation.state", "actions": "action"}
_NEITHER = ("to_batch_processor", "device_processor", "rename_observations_processor", "tokenizer_processor")
_BEFORE = (*_NEITHER, "relative_actions_processor", "normalizer_processor", "action_tokenizer_processor")
_PROMPTS = {
    "pi0_new_line_processor": False,
    "pi05_prepare_state_tokenizer_processor_step": True,
    "pi0_fast_prepare_state_tokenizer_processor_step": True,
}
"""Whether the prompt spells out the state."""
_AFTER = ("unnormalizer_processor", "absolute_actions_processor", "device_processor")
_FIXED = {"n_obs_steps": 1, "min_period": 4e-3, "max_period": 4.0}
_WITHOUT = ("use_peft", "use_visual_memory", "use_proprioceptive_memory")
_SIZES = {"chunk_size": "action_horizon", "tokenizer_max_length": "max_token_len", "max_action_dim": "action_dim"}
_SIZES |= {"num_inference_steps": "num_steps"}
_NO_MATTER = re.compile(
    "type|paligemma_variant|action_expert_variant|input_features|output_features|normalization_mapping|"
    "n_action_steps|image_resolution|dtype|max_state_dim|empty_cameras|device|"
    "use_relative_actions|relative_exclude_joints|action_feature_names|use_amp|gradient_checkpointing|"
    "time_sampling_.*|optimizer_.*|scheduler_.*|compile_.*|freeze_vision_encoder|train_expert_only|"
    "memory_.*|push_to_hub|repo_id|private|tags|license|pretrained_path|pretrained_revision|rtc_config|"
    "max_action_tokens|text_tokenizer_name|action_tokenizer_name|temperature|max_decoding_steps|"
    "fast_skip_tokens|validate_action_token_prefix|use_kv_cache"
)
"""Fields that are read, or that belong to training, to the hub, or to how LeRobot runs a policy."""
_FLAGS = {"action_horizon": "--action-horizon", "max_token_len": "--max-token-len"}
_CALLED = {"norm_mode": "the normalisation", "relative": "relative actions"}


# ---- written


def policy_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of LeRobot's policy configs that the checkpoint settles."""
    model, robot = checkpoint.config.model, checkpoint.robot
    kind = next(name for name, kind in KINDS.items() if type(model) is kind)
    mode = MODES[checkpoint.config.norm_mode]
    size = model.vision.image_size
    images = {f"observation.images.{slot}": {"type": "VISUAL", "shape": [3, size, size]} for slot in robot.cameras}
    state = {"observation.state": {"type": "STATE", "shape": [robot.state_size]}}
    return {
        "type": kind,
        "dtype": model.dtype,
        "chunk_size": model.action_horizon,
        "n_action_steps": model.action_horizon,
        "max_state_dim": model.action_dim,
        "max_action_dim": model.action_dim,
        "tokenizer_max_length": model.max_token_len,
        "image_resolution": [size, size],
        "input_features": images | state,
        "output_features": {"action": {"type": "ACTION", "shape": [robot.model_action_size]}},
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        **({} if kind == "pi0_fast" else {"num_inference_steps": checkpoint.config.num_steps}),
        **relative_settings(robot),
    }


def write_processors(folder: Path, checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Write both pipelines into an existing folder.

    None for π0-FAST, whose actions LeRobot would decode with its own tokenizer and not with the policy's.

    Args:
        config: the policy's `config.json` there.
    """
    model, text = checkpoint.config.model, checkpoint.tokenizers.text
    if isinstance(model, Pi0FastConfig):
        return
    prompt = ("pi0_new_line_processor", {})
    if isinstance(model, Pi05Config) and model.state_in_prompt:
        prompt = ("pi05_prepare_state_tokenizer_processor_step", {"max_state_dim": model.action_dim})
    known = isinstance(text, SentencePieceTokenizer) and text.pieces_sha256 == PALIGEMMA_PIECES_SHA256
    tokenizer = {
        # Without a name, LeRobot refuses the policy until it is given a tokenizer.
        "tokenizer_name": "google/paligemma-3b-pt-224" if known else None,
        "max_length": model.max_token_len,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
    }
    norm = {"eps": EPSILON, "norm_map": config["normalization_mapping"]}
    device = ("device_processor", {"device": "cpu", "float_dtype": None})
    before = [
        ("rename_observations_processor", {"rename_map": {}}),
        ("to_batch_processor", {}),
        ("normalizer_processor", {"features": config["input_features"] | config["output_features"], **norm}),
        prompt,
        ("tokenizer_processor", tokenizer),
        device,
    ]
    after = [("unnormalizer_processor", {"features": config["output_features"], **norm}), device]
    if relative := relative_settings(checkpoint.robot):
        excluded, names = relative["relative_exclude_joints"], relative["action_feature_names"]
        step = {"enabled": True, "exclude_joints": excluded, "action_names": names}
        before.insert(2, ("relative_actions_processor", step))
        after.insert(1, ("absolute_actions_processor", {"enabled": True}))
    stats = {
        f"{feature}.{name}": torch.tensor(values, dtype=torch.float32)
        for ours, feature in _FEATURES.items()
        for name in _STATS
        if np.isfinite(values := getattr(getattr(checkpoint.norm_stats, ours), name)).all()
    }
    for name, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
        entries: list[dict[str, Any]] = []
        for number, (step, settings) in enumerate(steps):
            entries.append({"registry_name": step, "config": settings})
            if "norm_map" in settings:
                entries[-1]["state_file"] = f"{name}_step_{number}_{step}.safetensors"
                save_file(stats, folder / entries[-1]["state_file"])
        write_json(folder / f"{name}.json", {"name": name, "steps": entries})


def relative_dims(robot: Robot) -> tuple[bool, ...]:
    """Which dimensions of an action, as the model sees it, are offsets from the same dimension of the state.

    Raises:
        ConfigError: the robot's offsets are others than LeRobot's, whose steps subtract numbers at equal places.
    """
    dims = tuple(group.relative for group in robot.actions for _ in range(group.model_size))
    if not any(dims):
        return dims
    rng = np.random.default_rng(0)
    state, command = rng.uniform(0.1, 0.9, (8, robot.state_size)), rng.uniform(0.1, 0.9, (8, 2, robot.action_size))
    absolute = replace(robot, actions=tuple(replace(group, relative=False) for group in robot.actions))
    seen, base = ActionSpace(robot), ActionSpace(absolute)
    states = seen.state_to_model(state)[:, None, : len(dims)]
    offsets = base.to_model(command, state)
    if states.shape[-1] == len(dims):
        offsets = offsets - states * np.array(dims)
    if not np.allclose(offsets, seen.to_model(command, state)):
        kinds = ", ".join(dict.fromkeys(type(group).__name__ for group in robot.actions if group.relative))
        short = f"a state of {states.shape[-1]} dimensions, which is shorter than the {len(dims)} of an action"
        raise ConfigError(
            expected="offsets as LeRobot has them: an action's number less the one at the same place of the state",
            found=short if states.shape[-1] < len(dims) else f"other ones of the relative groups ({kinds})",
            where=f"robot {robot.name!r}",
            next="LeRobot cannot say them: take openpi's layout, or train with absolute actions",
        )
    return dims


def relative_settings(robot: Robot) -> dict[str, Any]:
    """The fields of LeRobot's config that say what is relative; empty where nothing is, which older versions read too.

    Raises:
        ConfigError: as `relative_dims`.
    """
    dims = relative_dims(robot)
    if not any(dims):
        return {}
    names = [f"action {number} {'(relative)' if relative else ABSOLUTE}" for number, relative in enumerate(dims)]
    return {"use_relative_actions": True, "relative_exclude_joints": [ABSOLUTE], "action_feature_names": names}


# ---- read


class Said(NamedTuple):
    """One thing that a file says."""

    value: Any
    where: str
    """File and field."""


@dataclass(kw_only=True)
class Stated:
    """All that the files say; what they leave open is absent."""

    folder: Path
    kind: type[ModelConfig] | None = None
    said: dict[str, Said] = field(default_factory=dict)
    """Fields of the model config, and of the policy (`_POLICY`) `num_steps`, `norm_mode`, `state_size`, `action_size`;
    `pictures`: their names in the order in which the model sees them; `relative`: which action dimensions are offsets
    from the state, [A]; True alone: all, however many there are."""
    padded: dict[str, int] = field(default_factory=dict)
    """State and action sizes that say nothing of a robot, but are those that vectors are padded to."""
    renamed: dict[str, str] = field(default_factory=dict)
    """A dataset's name of a feature -> the policy's."""
    notes: list[str] = field(default_factory=list)

    def say(self, name: str, value: Any, where: str) -> None:
        """Take over what a file says of the policy (`_POLICY`) or of its model (any other name).

        Raises:
            CheckpointError: an earlier one says otherwise.
        """
        earlier = self.said.setdefault(name, Said(value, where))
        # Of the dimensions that are excluded the processors alone are sure: config.json may lack their names.
        if earlier.value != value and (name != "relative" or bool(earlier.value) != bool(value)):
            raise CheckpointError(
                expected=f"files that agree on {_CALLED.get(name, name)}: {shown(earlier.value)} in {earlier.where}",
                found=f"{shown(value)} in {where}",
                where=str(self.folder),
                next="ask whoever trained it, and correct the file that is wrong",
            )
        if name in _POLICY:
            self.said[name] = Said(value, where)

    def get(self, name: str) -> Any:
        """What is said; None where nothing is."""
        return self.said[name].value if name in self.said else None

    def rows(self) -> tuple[str, ...]:
        """What was taken over, and from where, for the certificate."""
        rows = [f"{name} {one.value} ({one.where})" for name, one in self.said.items() if name not in _POLICY]
        for name, text in (
            ("norm_mode", "normalisation {} ({})"),
            ("relative", "actions: {} ({})"),
            ("num_steps", "{} flow steps ({})"),
            ("pictures", "pictures, in this order: {}"),
        ):
            if name in self.said:
                value, where = self.said[name]
                if name == "relative":
                    value = ("offsets" if value else "absolute") if isinstance(value, bool) else _relative(value)
                rows.append(text.format(", ".join(value) if name == "pictures" else value, where))
        return (*rows, *self.notes)

    def require_model(self, model: ModelConfig, chosen: frozenset[str]) -> None:
        """Raises ConfigError where the model is another one.

        Args:
            chosen: fields that the user named. Of those only the longest prompt may be another: the weights do not
                depend on it.
        """
        for name, said in self.said.items():
            ours = model.vision.image_size if name == "image_size" else getattr(model, name, said.value)
            if name == "dtype" or ours == said.value or (name == "max_token_len" and name in chosen):
                continue
            flag = f"{_FLAGS[name]} {said.value}" if name in _FLAGS and name not in chosen else ""
            raise ConfigError(
                expected=f"{name} {said.value}, as {said.where} says",
                found=f"{ours} of {'the flag' if name in chosen else 'the recipe, or of the weights'}",
                where=str(self.folder),
                next=flag or "name the recipe or flags that this checkpoint was trained with",
            )

    def normalization(self, recipe: NormMode | None, flag: NormMode | None, kind: type[ModelConfig]) -> NormMode:
        """The mode of the policy: what the files say, or the flag, or the recipe.

        Raises:
            ConfigError: they contradict each other.
        """
        said = self.get("norm_mode")
        ours, whose, next = flag, "--normalization", "leave --normalization out"
        if flag is None:
            ours, whose, next = recipe, "the recipe", f"--normalization {said}"
        if said is not None and ours not in (None, said):
            raise ConfigError(
                expected=f"{said} normalisation, as {self.said['norm_mode'].where} says",
                found=f"{ours} of {whose}",
                where=str(self.folder),
                next=next,
            )
        return ours or said or ("zscore" if kind is Pi0Config else "quantile")

    def require_robot(self, robot: Robot, slots: Sequence[str]) -> None:
        """Raises ConfigError where the robot has other sizes, other relative dimensions or other pictures.

        Args:
            slots: the model's camera slots in order.
        """
        for name, ours in (("state", robot.state_size), ("action", robot.model_action_size)):
            said, where = self.said.get(f"{name}_size", (ours, ""))
            if ours != said and not (said == self.padded.get(name) and ours < said):
                expected = f"{said} {name} dimensions, as {where} says"
                raise self._other_robot(expected, f"{ours} of robot {robot.name!r}")
        if "relative" in self.said:
            dims, (value, where) = relative_dims(robot), self.said["relative"]
            theirs = (value,) * len(dims) if isinstance(value, bool) else (*value, *(True,) * len(dims))
            if dims != theirs[: len(dims)]:
                expected = f"{_relative(theirs[: len(dims)])}, as {where} says"
                raise self._other_robot(expected, f"{_relative(dims)} of robot {robot.name!r}")
        theirs = self.get("pictures")
        if theirs is None:
            return
        if len(robot.cameras) > len(theirs):
            expected = f"at most the {len(theirs)} pictures that {CONFIG} names: {', '.join(theirs)}"
            raise self._other_robot(expected, f"{len(robot.cameras)} of robot {robot.name!r}")
        slots = [slot for slot in slots if slot in robot.cameras]
        known: list[int] = []
        for slot in slots:
            keys = (robot.cameras[slot], robot.dataset_key(robot.cameras[slot]))
            names = {name.rpartition(".")[2] for key in keys for name in (slot, key, self.renamed.get(key, key))}
            found = [place for place, name in enumerate(theirs) if name.rpartition(".")[2] in names]
            known += found if len(found) == 1 else []
        if known != sorted(known):
            names = [robot.dataset_key(robot.cameras[slot]) for slot in slots]
            expected = f"pictures in the order in which {CONFIG} names them: {', '.join(theirs)}"
            raise self._other_robot(expected, f"{', '.join(names)} of robot {robot.name!r}")

    def _other_robot(self, expected: str, found: str) -> ConfigError:
        next = "name the robot that the checkpoint was trained for: --robot FILE.py:NAME, or another --recipe"
        if (self.folder / DESCRIPTION).is_dir():
            next = f"leave --robot and --recipe out: manipi exported it, and {DESCRIPTION}/ beside the weights says all"
        return ConfigError(expected=expected, found=found, where=str(self.folder), next=next)


_POLICY = ("num_steps", "norm_mode", "relative", "state_size", "action_size", "pictures")


def _relative(dims: Sequence[bool]) -> str:
    named = [str(number) for number, relative in enumerate(dims) if relative]
    if not named or all(dims):
        return "actions that are offsets from the state" if named else "absolute actions"
    return f"offsets from the state in action dimensions {', '.join(named)} alone"


def read_stated(foreign: ForeignWeights) -> Stated:
    """What the files beside the weights say; nothing where there are none.

    Raises:
        CheckpointError: a file that is not as its project writes it, files that contradict each other, or a policy
            that there is no place for here.
    """
    folder = foreign.path if foreign.path.is_dir() else foreign.path.parent
    stated, layout = Stated(folder=folder), foreign.layout.name
    if layout in ("openpi-torch", "lerobot") and (folder / CONFIG).is_file():
        config = Fields.read(folder / CONFIG)
        sizes = _SIZES if layout == "lerobot" else {name: name for name in ("action_horizon", "action_dim")}
        for theirs, ours in sizes.items():
            if config.has(theirs):
                stated.say(ours, config.size(theirs), f"{CONFIG}, {theirs}")
        if layout == "lerobot":
            _read_config(stated, config)
    if layout == "lerobot" and (folder / PREPROCESSOR).is_file():
        _read_processors(stated)
    return stated


def _read_config(stated: Stated, config: Fields) -> None:
    """All of LeRobot's `config.json` but the sizes of the model."""
    kind = config.get("type", str)
    if kind not in KINDS:
        raise unexpected(f"a policy of type {', '.join(KINDS)}", kind, f"{config.where}, type")
    stated.kind = KINDS[kind]
    for name in _WITHOUT:
        if config.get(name, bool, False):
            raise _no_place(f"{name} of {CONFIG}", config.where)
    for name, value in _FIXED.items():
        if config.has(name) and config.get(name, float) != value:
            raise _no_place(f"{name} other than {value:g}", config.where)
    if config.has("image_resolution"):
        edges = config.get("image_resolution", list)
        if len(edges) != 2 or edges[0] != edges[1] or not isinstance(edges[0], int):
            raise _no_place(f"pictures of {shown(edges)}, which are not square", config.where)
        stated.say("image_size", edges[0], f"{CONFIG}, image_resolution")
    if (dtype := config.get("dtype", str, "")) in ("float32", "bfloat16"):
        stated.say("dtype", dtype, f"{CONFIG}, dtype")
    if config.has("normalization_mapping"):
        where = f"{CONFIG}, normalization_mapping"
        stated.say("norm_mode", _mode(config.inner("normalization_mapping")), where)
    if config.has("use_relative_actions"):
        relative = config.get("use_relative_actions", bool)
        mask = _mask(config.texts("relative_exclude_joints"), config.texts("action_feature_names"))
        stated.say("relative", relative and mask, f"{CONFIG}, use_relative_actions")
    for name, inputs, feature in (
        ("state", "input_features", "observation.state"),
        ("action", "output_features", "action"),
    ):
        if config.has(f"max_{name}_dim"):
            stated.padded[name] = config.size(f"max_{name}_dim")
        if config.has(inputs) and config.inner(inputs).has(feature):
            shape = config.inner(inputs).inner(feature).get("shape", list)
            if len(shape) != 1 or not isinstance(shape[0], int):
                raise unexpected("the length of a vector", shape, f"{config.where}, {inputs}, {feature}")
            stated.say(f"{name}_size", shape[0], f"{CONFIG}, {inputs}")
    if config.has("input_features"):
        inner = config.inner("input_features")
        found = [name for name in inner if inner.inner(name).get("type", str) == "VISUAL"]
        # Pictures that never come are last there, and masked as an absent camera is here.
        if cameras := tuple(name for name in found if "empty_camera" not in name):
            stated.say("pictures", cameras, f"{CONFIG}, input_features")
    known = (*_SIZES, *_FIXED, *_WITHOUT)
    strange = [n for n in config if n not in known and not _NO_MATTER.fullmatch(n) and config.has(n)]
    if strange:
        stated.notes.append(f"{CONFIG} also says {shown(strange)}, which has no place here")
    if config.has("n_action_steps") and config.has("chunk_size"):
        steps, chunk = config.size("n_action_steps"), config.size("chunk_size")
        if steps != chunk:
            stated.notes.append(f"LeRobot executes {steps} of its {chunk} steps; a client of ours chooses")


def _read_processors(stated: Stated) -> None:
    """Both pipelines."""
    folder = stated.folder
    before = _steps(folder / PREPROCESSOR, (*_BEFORE, *_PROMPTS), "relative_actions_processor", "normalizer_processor")
    after = _steps(folder / POSTPROCESSOR, _AFTER, "unnormalizer_processor", "absolute_actions_processor")
    prompts = [name for name in before if name in _PROMPTS]
    if len(prompts) > 1:
        raise unexpected("one step that writes the prompt", prompts, str(folder / PREPROCESSOR))
    for name in prompts:
        if not before[name].get("include_state_in_prompt", bool, True):
            raise _no_place("a prompt of π0.5's format without the state", before[name].where)
        if stated.kind is Pi05Config:
            stated.say("state_in_prompt", _PROMPTS[name], f"{PREPROCESSOR}, {name}")
            if _PROMPTS[name] and "relative_actions_processor" not in before:
                stated.notes.append(
                    "if LeRobot 0.4 trained it, its prompts spelled out the state padded to max_state_dim; ours do not"
                )
    if (tokenizer := before.get("tokenizer_processor")) is not None and tokenizer.has("max_length"):
        stated.say("max_token_len", tokenizer.size("max_length"), f"{PREPROCESSOR}, tokenizer_processor")
    if (rename := before.get("rename_observations_processor")) is not None and rename.has("rename_map"):
        mapping = rename.inner("rename_map")
        stated.renamed = {name: mapping.get(name, str) for name in mapping}
    for file, steps, name in (
        (PREPROCESSOR, before, "normalizer_processor"),
        (POSTPROCESSOR, after, "unnormalizer_processor"),
    ):
        if name not in steps:
            raise unexpected(f"a {name}", "no such step", file)
        step = steps[name]
        keys = step.texts("normalize_observation_keys")
        if step.has("normalize_observation_keys") and "observation.state" not in keys:
            raise _no_place("a state that is not normalised", step.where)
        mapping = step.inner("norm_map")
        if file == POSTPROCESSOR and not mapping.has("STATE"):
            mapping = Fields(dict.fromkeys(("STATE", "ACTION"), mapping.get("ACTION", str)), mapping.where)
        stated.say("norm_mode", _mode(mapping), f"{file}, {name}")
    relative, back = before.get("relative_actions_processor"), after.get("absolute_actions_processor")
    on = relative is not None and relative.get("enabled", bool, False)
    if on != (back is not None and back.get("enabled", bool, False)):
        raise CheckpointError(
            expected="relative actions in both processors or in neither",
            found=f"{PREPROCESSOR} {'with' if on else 'without'} them, and {POSTPROCESSOR} the other way round",
            where=str(folder),
            next="copy or fetch the folder again; its files do not belong together",
        )
    if relative is not None and on:
        mask = _mask(relative.texts("exclude_joints"), relative.texts("action_names"))
        stated.say("relative", mask, f"{PREPROCESSOR}, relative_actions_processor")
    else:
        without = "without" if relative is None else "disabled"
        stated.say("relative", False, f"{PREPROCESSOR}, {without} relative actions")


def _steps(path: Path, known: Sequence[str], first: str, second: str) -> dict[str, Fields]:
    """The config of each step by its name, in order; `first` stands before `second`."""
    steps: dict[str, Fields] = {}
    for step in Fields.read(path).objects("steps"):
        name = step.get("registry_name", str, "") or step.get("class", str, "")
        if name not in known or (name in steps and name != "device_processor"):
            raise CheckpointError(
                expected=f"LeRobot's steps of a π policy, each once: {', '.join(known)}",
                found=f"{'a second' if name in steps else 'the step'} {shown(name)}",
                where=step.where,
                next="what it does to states, pictures or actions would be lost; train such a policy with manipi",
            )
        steps[name] = step.inner("config") if step.has("config") else Fields({}, step.where)
    if [name for name in steps if name in (first, second)] == [second, first]:
        raise CheckpointError(
            expected=f"{first} before {second}, as LeRobot has it",
            found="the other way round",
            where=path.name,
            next="what the model learned from cannot be told; train such a policy with manipi",
        )
    return steps


def _mode(mapping: Fields) -> NormMode:
    """The normalisation that LeRobot's modes mean."""
    modes = {kind: mapping.get(kind, str, "IDENTITY") for kind in ("STATE", "ACTION", "VISUAL")}
    ours: dict[str, NormMode] = {theirs: mode for mode, theirs in MODES.items()}
    if modes["STATE"] != modes["ACTION"] or modes["STATE"] not in ours or modes["VISUAL"] != "IDENTITY":
        raise CheckpointError(
            expected=f"{' or '.join(ours)} for state and actions alike, and IDENTITY for pictures",
            found=", ".join(f"{kind} {shown(mode)}" for kind, mode in modes.items()),
            where=mapping.where,
            next="manipi has no other normalisation: train such a policy again with one of them",
        )
    return ours[modes["STATE"]]


def _mask(excluded: Sequence[str], names: Sequence[str]) -> bool | tuple[bool, ...]:
    """LeRobot's rule: without names of the dimensions there are no exclusions, whatever is excluded."""
    tokens = [token.lower() for token in excluded if token]
    if not tokens or not names:
        return True
    return tuple(not any(token in name.lower() for token in tokens) for name in names)


def _no_place(what: str, where: str) -> CheckpointError:
    return CheckpointError(
        expected="a π policy as openpi defines it",
        found=what,
        where=where,
        next="manipi has no place for it: run it with LeRobot, or train such a policy with manipi",
    )


def read_processor_stats(folder: Path, robot: Robot, action_horizon: int) -> NormStats:
    """The statistics of a LeRobot policy, for this robot; see `stats_from_fields`.

    Raises:
        NormStatsError: the pipeline has no statistics, or they are not this robot's.
        CheckpointError: a file that is not as LeRobot writes it.
    """
    path, wrong = folder / PREPROCESSOR, "name the statistics of this robot: --norm-stats FILE"
    steps = [step for step in Fields.read(path).objects("steps") if step.has("state_file")]
    found = [step for step in steps if step.get("registry_name", str, "") == "normalizer_processor"]
    if len(found) != 1:
        expected = "one normalizer_processor with a state_file"
        raise NormStatsError(expected=expected, found=f"{len(found)} of them", where=str(path), next=wrong)
    file = file_beside(folder, found[0].get("state_file", str), found[0].where)
    store = SafetensorsStore(file)
    fields = {
        ours: {name: store.read(key).tolist() for name in _STATS if (key := f"{feature}.{name}") in store.arrays}
        for ours, feature in _FEATURES.items()
    }
    sizes = {"state": robot.state_size, "actions": robot.model_action_size}
    for ours, vectors in fields.items():
        lengths = {len(values) if isinstance(values, list) else 0 for values in vectors.values()}
        if lengths - {sizes[ours]}:
            expected = f"statistics of {sizes[ours]} {ours} dimensions, as robot {robot.name!r} has"
            raise NormStatsError(expected=expected, found=shown(sorted(lengths)), where=str(file), next=wrong)
    return stats_from_fields(fields, robot, action_horizon, str(file))
