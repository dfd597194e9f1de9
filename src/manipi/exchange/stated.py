"""What the files beside foreign weights say of the policy, so that recipe, robot and flags can be held against them.

openpi-torch   config.json                     action_horizon, action_dim
lerobot        config.json                     sizes, steps, normalisation, features, relative actions
               policy_preprocessor.json, policy_postprocessor.json: what LeRobot does around the model, step by step;
               they count where they say otherwise than config.json would

Nothing that changes what the model sees or what its actions mean is passed over: a step or a mode that has no place
here is refused by its name.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from manipi.errors import CheckpointError, ConfigError, shown
from manipi.exchange.lerobot_processors import MODES, POSTPROCESSOR, PREPROCESSOR, relative_dims
from manipi.model.config import ModelConfig, NormMode, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.robots.robot import Robot
from manipi.weights.foreign_json import Fields, unexpected
from manipi.weights.layouts import ForeignWeights

CONFIG = "config.json"
DESCRIPTION = "manipi"
"""The folder beside weights that manipi exported, which says all that their layout cannot."""
KINDS: dict[str, type[ModelConfig]] = {"pi0": Pi0Config, "pi05": Pi05Config, "pi0_fast": Pi0FastConfig}
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
_NO_MATTER = re.compile(
    "|".join(
        (
            "type|paligemma_variant|action_expert_variant|input_features|output_features|normalization_mapping",
            "n_action_steps|num_inference_steps|image_resolution|dtype|max_state_dim|empty_cameras|device",
            "use_relative_actions|relative_exclude_joints|action_feature_names|use_amp|gradient_checkpointing",
            "time_sampling_.*|optimizer_.*|scheduler_.*|compile_.*|freeze_vision_encoder|train_expert_only",
            "memory_.*|push_to_hub|repo_id|private|tags|license|pretrained_path|pretrained_revision|rtc_config",
            "max_action_tokens|text_tokenizer_name|action_tokenizer_name|temperature|max_decoding_steps",
            "fast_skip_tokens|validate_action_token_prefix|use_kv_cache",
        )
    )
)
"""Fields that are read, or that belong to training, to the hub, or to how LeRobot runs a policy."""
_FLAGS = {"action_horizon": "--action-horizon", "max_token_len": "--max-token-len"}


@dataclass(frozen=True, kw_only=True)
class Said:
    """One thing that a file says."""

    value: Any
    where: str
    """File and field."""


@dataclass(frozen=True, kw_only=True)
class Stated:
    """All that the files say; what they leave open is absent."""

    folder: Path
    kind: type[ModelConfig] | None = None
    model: dict[str, Said] = field(default_factory=dict)
    """Fields of the model config."""
    num_steps: int | None = None
    norm_mode: Said | None = None
    relative: Said | None = None
    """Which action dimensions are offsets from the state, [A]; True alone: all, however many there are."""
    state_size: Said | None = None
    action_size: Said | None = None
    padded: tuple[int, int] = (0, 0)
    """State and action sizes that say nothing of a robot, but are those that vectors are padded to."""
    cameras: tuple[str, ...] | None = None
    """Names of the pictures in the order in which the model sees them."""
    renamed: dict[str, str] = field(default_factory=dict)
    """A dataset's name of a feature -> the policy's."""
    notes: tuple[str, ...] = ()

    def rows(self) -> tuple[str, ...]:
        """What was taken over, and from where, for the certificate."""
        found = {**self.model, "normalisation": self.norm_mode}
        said = [f"{name} {one.value} ({one.where})" for name, one in found.items() if one is not None]
        if self.relative is not None:
            dims = self.relative.value
            text = ("offsets" if dims else "absolute") if isinstance(dims, bool) else _relative(dims)
            said.append(f"actions: {text} ({self.relative.where})")
        if self.num_steps is not None:
            said.append(f"{self.num_steps} flow steps ({CONFIG}, num_inference_steps)")
        if self.cameras:
            said.append(f"pictures, in this order: {', '.join(self.cameras)}")
        return (*said, *self.notes)

    def require_kind(self, kind: type[ModelConfig]) -> None:
        """Raises CheckpointError where the weights are of another kind of policy than the files say."""
        if self.kind is not None and self.kind is not kind:
            raise CheckpointError(
                expected=f"the weights of a {self.kind.__name__}, as {CONFIG} says",
                found=f"those of a {kind.__name__}",
                where=str(self.folder),
                next="copy or fetch the folder again; its files do not belong together",
            )

    def require_model(self, model: ModelConfig, chosen: frozenset[str]) -> None:
        """Raises ConfigError where the model is another one.

        Args:
            chosen: fields that the user named. Of those only the longest prompt may be another: the weights do not
                depend on it.
        """
        for name, said in self.model.items():
            ours = model.vision.image_size if name == "image_size" else getattr(model, name, said.value)
            if name in ("dtype", "cameras") or ours == said.value or (name == "max_token_len" and name in chosen):
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
        for ours, whose, next in (
            (flag, "--normalization", "leave --normalization out"),
            (None if flag else recipe, "the recipe", "--normalization {}"),
        ):
            if self.norm_mode is not None and ours not in (None, self.norm_mode.value):
                raise ConfigError(
                    expected=f"{self.norm_mode.value} normalisation, as {self.norm_mode.where} says",
                    found=f"{ours} of {whose}",
                    where=str(self.folder),
                    next=next.format(self.norm_mode.value),
                )
        said = self.norm_mode.value if self.norm_mode is not None else None
        return flag or said or recipe or ("zscore" if kind is Pi0Config else "quantile")

    def require_robot(self, robot: Robot, slots: Sequence[str]) -> None:
        """Raises ConfigError where the robot has other sizes, other relative dimensions or other pictures.

        Args:
            slots: the model's camera slots in order.
        """
        for name, said, ours, width in (
            ("state", self.state_size, robot.state_size, self.padded[0]),
            ("action", self.action_size, robot.model_action_size, self.padded[1]),
        ):
            if said is not None and ours != said.value and not (said.value == width and ours < width):
                expected = f"{said.value} {name} dimensions, as {said.where} says"
                raise self._other_robot(expected, f"{ours} of robot {robot.name!r}")
        if self.relative is not None:
            self._require_relative(robot, self.relative)
        if self.cameras is not None:
            self._require_cameras(robot, [slot for slot in slots if slot in robot.cameras], self.cameras)

    def _require_relative(self, robot: Robot, said: Said) -> None:
        ours = relative_dims(robot)
        theirs = (said.value,) * len(ours) if isinstance(said.value, bool) else (*said.value, *(True,) * len(ours))
        if ours != theirs[: len(ours)]:
            raise self._other_robot(
                f"{_relative(theirs[: len(ours)])}, as {said.where} says", f"{_relative(ours)} of robot {robot.name!r}"
            )

    def _require_cameras(self, robot: Robot, slots: Sequence[str], theirs: Sequence[str]) -> None:
        if len(robot.cameras) > len(theirs):
            expected = f"at most the {len(theirs)} pictures that {CONFIG} names: {', '.join(theirs)}"
            raise self._other_robot(expected, f"{len(robot.cameras)} of robot {robot.name!r}")
        places = [self._place(slot, robot, theirs) for slot in slots]
        known = [place for place in places if place is not None]
        if known != sorted(known):
            names = [robot.dataset_key(robot.cameras[slot]) for slot in slots]
            raise self._other_robot(
                f"pictures in the order in which {CONFIG} names them: {', '.join(theirs)}",
                f"{', '.join(names)} of robot {robot.name!r}",
            )

    def _place(self, slot: str, robot: Robot, theirs: Sequence[str]) -> int | None:
        key = robot.cameras[slot]
        names = {name.rpartition(".")[2] for name in (slot, key, robot.dataset_key(key))}
        names |= {self.renamed.get(name, name).rpartition(".")[2] for name in (key, robot.dataset_key(key))}
        found = [place for place, name in enumerate(theirs) if name.rpartition(".")[2] in names]
        return found[0] if len(found) == 1 else None

    def _other_robot(self, expected: str, found: str) -> ConfigError:
        next = "name the robot that the checkpoint was trained for: --robot FILE.py:NAME, or another --recipe"
        if (self.folder / DESCRIPTION).is_dir():
            next = f"leave --robot and --recipe out: manipi exported it, and {DESCRIPTION}/ beside the weights says all"
        return ConfigError(expected=expected, found=found, where=str(self.folder), next=next)


def _relative(dims: Sequence[bool]) -> str:
    named = [str(number) for number, relative in enumerate(dims) if relative]
    if not named or all(dims):
        return "actions that are offsets from the state" if named else "absolute actions"
    return f"offsets from the state in action dimensions {', '.join(named)} alone"


def read_stated(source: ForeignWeights) -> Stated:
    """What the files beside the weights say; nothing where there are none.

    Raises:
        CheckpointError: a file that is not as its project writes it, files that contradict each other, or a policy
            that there is no place for here.
    """
    folder = source.path if source.path.is_dir() else source.path.parent
    if source.layout.name == "openpi-torch" and (folder / CONFIG).is_file():
        config = Fields.read(folder / CONFIG)
        names = {name: name for name in ("action_horizon", "action_dim")}
        return Stated(folder=folder, model=_sizes(config, names))
    if source.layout.name != "lerobot":
        return Stated(folder=folder)
    stated = _read_config(folder) if (folder / CONFIG).is_file() else Stated(folder=folder)
    if (folder / PREPROCESSOR).is_file():
        stated = _read_processors(stated)
    return stated


def _sizes(config: Fields, names: dict[str, str]) -> dict[str, Said]:
    return {
        ours: Said(value=config.size(theirs), where=f"{CONFIG}, {theirs}")
        for theirs, ours in names.items()
        if config.has(theirs)
    }


def _read_config(folder: Path) -> Stated:
    config = Fields.read(folder / CONFIG)
    kind = config.get("type", str)
    if kind not in KINDS:
        raise unexpected(f"a policy of type {', '.join(KINDS)}", kind, f"{config.where}, type")
    for name in _WITHOUT:
        if config.get(name, bool, False):
            raise _no_place(f"{name} of {CONFIG}", config.where)
    for name, value in _FIXED.items():
        if config.has(name) and config.number(name) != value:
            raise _no_place(f"{name} other than {value:g}", config.where)
    model = _sizes(config, _SIZES)
    if config.has("image_resolution"):
        edges = config.get("image_resolution", list)
        if len(edges) != 2 or edges[0] != edges[1] or not isinstance(edges[0], int):
            raise _no_place(f"pictures of {shown(edges)}, which are not square", config.where)
        model["image_size"] = Said(value=edges[0], where=f"{CONFIG}, image_resolution")
    if (dtype := config.get("dtype", str, "")) in ("float32", "bfloat16"):
        model["dtype"] = Said(value=dtype, where=f"{CONFIG}, dtype")
    stated = Stated(
        folder=folder,
        kind=KINDS[kind],
        model=model,
        num_steps=config.size("num_inference_steps") if config.has("num_inference_steps") else None,
        padded=tuple(config.size(name) if config.has(name) else 0 for name in ("max_state_dim", "max_action_dim")),  # type: ignore[arg-type]
        notes=tuple(_notes(config)),
    )
    if config.has("normalization_mapping"):
        where = f"{CONFIG}, normalization_mapping"
        stated = replace(stated, norm_mode=_mode(config.inner("normalization_mapping"), where))
    if config.has("use_relative_actions"):
        relative = config.get("use_relative_actions", bool)
        mask = _mask(config.texts("relative_exclude_joints"), config.texts("action_feature_names"))
        stated = replace(stated, relative=Said(value=relative and mask, where=f"{CONFIG}, use_relative_actions"))
    return _read_features(stated, config)


def _notes(config: Fields) -> Iterator[str]:
    known = (*_SIZES, *_FIXED, *_WITHOUT)
    strange = [name for name in config.keys() if name not in known and not _NO_MATTER.fullmatch(name)]  # noqa: SIM118
    if strange := [name for name in strange if config.has(name)]:
        yield f"{CONFIG} also says {shown(strange)}, which has no place here"
    if config.has("n_action_steps") and config.has("chunk_size"):
        steps, chunk = config.size("n_action_steps"), config.size("chunk_size")
        if steps != chunk:
            yield f"LeRobot executes {steps} of its {chunk} steps; a client of ours chooses"


def _read_features(stated: Stated, config: Fields) -> Stated:
    sizes: dict[str, Said] = {}
    for inputs, feature, ours in (
        ("input_features", "observation.state", "state_size"),
        ("output_features", "action", "action_size"),
    ):
        if config.has(inputs) and config.inner(inputs).has(feature):
            shape = config.inner(inputs).inner(feature).get("shape", list)
            if len(shape) != 1 or not isinstance(shape[0], int):
                raise unexpected("the length of a vector", shape, f"{config.where}, {inputs}, {feature}")
            sizes[ours] = Said(value=shape[0], where=f"{CONFIG}, {inputs}")
    cameras = None
    if config.has("input_features"):
        inputs = config.inner("input_features")
        found = [name for name in inputs.keys() if inputs.inner(name).get("type", str) == "VISUAL"]  # noqa: SIM118
        # Pictures that never come are last there, and masked as an absent camera is here.
        cameras = tuple(name for name in found if "empty_camera" not in name) or None
    return replace(stated, cameras=cameras, **sizes)  # type: ignore[arg-type]


def _mode(mapping: Fields, where: str) -> Said:
    modes = {kind: mapping.get(kind, str, "IDENTITY") for kind in ("STATE", "ACTION", "VISUAL")}
    ours = {theirs: mode for mode, theirs in MODES.items()}
    if modes["STATE"] != modes["ACTION"] or modes["STATE"] not in ours or modes["VISUAL"] != "IDENTITY":
        text = ", ".join(f"{kind} {shown(mode)}" for kind, mode in modes.items())
        raise CheckpointError(
            expected=f"{' or '.join(ours)} for state and actions alike, and IDENTITY for pictures",
            found=text,
            where=mapping.where,
            next="manipi has no other normalisation: train such a policy again with one of them",
        )
    return Said(value=ours[modes["STATE"]], where=where)


def _mask(excluded: Sequence[str], names: Sequence[str]) -> Any:
    """LeRobot's rule: without names of the dimensions there are no exclusions, whatever is excluded."""
    tokens = [token.lower() for token in excluded if token]
    if not tokens or not names:
        return True
    return tuple(not any(token in name.lower() for token in tokens) for name in names)


def _read_processors(stated: Stated) -> Stated:
    before = _steps(stated.folder / PREPROCESSOR, (*_BEFORE, *_PROMPTS))
    after = _steps(stated.folder / POSTPROCESSOR, _AFTER)
    _require_order(before, "relative_actions_processor", "normalizer_processor", PREPROCESSOR)
    _require_order(after, "unnormalizer_processor", "absolute_actions_processor", POSTPROCESSOR)
    stated = _read_prompt(stated, before)
    norm = (_norm_mode(before, "normalizer"), _norm_mode(after, "unnormalizer"))
    for mode in norm:
        if stated.norm_mode is not None and stated.norm_mode.value != mode.value:
            raise _contradiction("the normalisation", stated.norm_mode, mode, stated.folder)
        stated = replace(stated, norm_mode=mode)
    relative = _read_relative(stated.folder, before, after)
    # Of the exclusions the processors alone are sure: config.json may lack the names of the dimensions.
    if stated.relative is not None and bool(stated.relative.value) != bool(relative.value):
        raise _contradiction("relative actions", stated.relative, relative, stated.folder)
    return replace(stated, relative=relative)


def _steps(path: Path, known: Sequence[str]) -> dict[str, Fields]:
    """The config of each step by its name, in order."""
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
    return steps


def _require_order(steps: dict[str, Fields], first: str, second: str, file: str) -> None:
    order = list(steps)
    if first in order and second in order and order.index(first) > order.index(second):
        raise CheckpointError(
            expected=f"{first} before {second}, as LeRobot has it",
            found="the other way round",
            where=file,
            next="what the model learned from cannot be told; train such a policy with manipi",
        )


def _read_prompt(stated: Stated, before: dict[str, Fields]) -> Stated:
    model, renamed = dict(stated.model), {}
    prompts = [name for name in before if name in _PROMPTS]
    if len(prompts) > 1:
        raise unexpected("one step that writes the prompt", prompts, str(stated.folder / PREPROCESSOR))
    for name in prompts:
        spelled = before[name].get("include_state_in_prompt", bool, True)
        if not spelled:
            raise _no_place("a prompt of π0.5's format without the state", before[name].where)
        if stated.kind is Pi05Config:
            model["state_in_prompt"] = Said(value=_PROMPTS[name], where=f"{PREPROCESSOR}, {name}")
    if (tokenizer := before.get("tokenizer_processor")) is not None and tokenizer.has("max_length"):
        found = Said(value=tokenizer.size("max_length"), where=f"{PREPROCESSOR}, tokenizer_processor")
        earlier = model.setdefault("max_token_len", found)
        if earlier.value != found.value:
            raise _contradiction("max_token_len", earlier, found, stated.folder)
    if (rename := before.get("rename_observations_processor")) is not None and rename.has("rename_map"):
        mapping = rename.inner("rename_map")
        renamed = {name: mapping.get(name, str) for name in mapping.keys()}  # noqa: SIM118
    notes = stated.notes
    if model.get("state_in_prompt", Said(value=False, where="")).value and "relative_actions_processor" not in before:
        notes += ("if LeRobot 0.4 trained it, its prompts spelled out the state padded to max_state_dim; ours do not",)
    return replace(stated, model=model, renamed=renamed, notes=notes)


def _norm_mode(steps: dict[str, Fields], name: str) -> Said:
    step = steps.get(f"{name}_processor")
    file = PREPROCESSOR if name == "normalizer" else POSTPROCESSOR
    if step is None:
        raise unexpected(f"a {name}_processor", "no such step", file)
    if step.has("normalize_observation_keys") and "observation.state" not in step.texts("normalize_observation_keys"):
        raise _no_place("a state that is not normalised", step.where)
    mapping = step.inner("norm_map")
    if name == "unnormalizer" and not mapping.has("STATE"):
        mapping = Fields({"STATE": mapping.get("ACTION", str), "ACTION": mapping.get("ACTION", str)}, mapping.where)
    return _mode(mapping, f"{file}, {name}_processor")


def _read_relative(folder: Path, before: dict[str, Fields], after: dict[str, Fields]) -> Said:
    step, back = before.get("relative_actions_processor"), after.get("absolute_actions_processor")
    on = step is not None and step.get("enabled", bool, False)
    if on != (back is not None and back.get("enabled", bool, False)):
        raise CheckpointError(
            expected="relative actions in both processors or in neither",
            found=f"{PREPROCESSOR} {'with' if on else 'without'} them, and {POSTPROCESSOR} the other way round",
            where=str(folder),
            next="copy or fetch the folder again; its files do not belong together",
        )
    if step is None or not on:
        return Said(value=False, where=f"{PREPROCESSOR}, {'without' if step is None else 'disabled'} relative actions")
    mask = _mask(step.texts("exclude_joints"), step.texts("action_names"))
    return Said(value=mask, where=f"{PREPROCESSOR}, relative_actions_processor")


def _contradiction(name: str, one: Said, other: Said, folder: Path) -> CheckpointError:
    return CheckpointError(
        expected=f"files that agree on {name}: {shown(one.value)} in {one.where}",
        found=f"{shown(other.value)} in {other.where}",
        where=str(folder),
        next="ask whoever trained it, and correct the file that is wrong",
    )


def _no_place(what: str, where: str) -> CheckpointError:
    return CheckpointError(
        expected="a π policy as openpi defines it",
        found=what,
        where=where,
        next="manipi has no place for it: run it with LeRobot, or train such a policy with manipi",
    )
