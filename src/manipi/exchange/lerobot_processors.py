"""LeRobot's pre- and post-processor of a policy, which carry its norm stats: written beside exported weights, and read.

policy_preprocessor.json                                     the steps in order, one of which normalises
policy_preprocessor_step_2_normalizer_processor.safetensors  observation.state.mean, action.q99, …
policy_postprocessor.json, …

State and actions are the model's there: LeRobot knows none of our robots' conversions (6D rotations, gripper
directions, limits), so whoever calls it has to do them, as around openpi. Offsets from the state are the exception:
LeRobot has steps for those since 0.5.1, and they are written for a relative robot, so that it hands out positions.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from manipi.checkpoints.native import Checkpoint
from manipi.errors import ConfigError, NormStatsError, shown
from manipi.model.config import NormMode, Pi0Config, Pi0FastConfig, Pi05Config
from manipi.records import write_json
from manipi.robots.robot import Robot
from manipi.tokenizers import PALIGEMMA_PIECES_SHA256, SentencePieceTokenizer, TextTokenizer
from manipi.transforms.actions import ActionSpace
from manipi.transforms.normalize import EPSILON, stats_from_fields
from manipi.types import NormStats
from manipi.weights.foreign_json import Fields, file_beside
from manipi.weights.stores import SafetensorsStore

MODES: dict[NormMode, str] = {"zscore": "MEAN_STD", "quantile": "QUANTILES"}
PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
ABSOLUTE = "(absolute)"
"""In the name of every dimension that is no offset; LeRobot excludes dimensions by a part of their name."""
_STATS = ("mean", "std", "q01", "q99", "min", "max")
_FEATURES = {"state": "observation.state", "actions": "action"}


def policy_config(checkpoint: Checkpoint) -> dict[str, object]:
    """The fields of LeRobot's policy configs that the checkpoint settles."""
    model, robot = checkpoint.config.model, checkpoint.robot
    kind = "pi0_fast" if isinstance(model, Pi0FastConfig) else "pi0" if isinstance(model, Pi0Config) else "pi05"
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
    if isinstance(checkpoint.config.model, Pi0FastConfig):
        return
    norm = {"eps": EPSILON, "norm_map": config["normalization_mapping"]}
    both = {"features": config["input_features"] | config["output_features"], **norm}
    actions = {"features": config["output_features"], **norm}
    device = ("device_processor", {"device": "cpu", "float_dtype": None})
    before = [
        ("rename_observations_processor", {"rename_map": {}}),
        ("to_batch_processor", {}),
        ("normalizer_processor", both),
        *_prompt_steps(checkpoint),
        device,
    ]
    after = [("unnormalizer_processor", actions), device]
    if relative := relative_settings(checkpoint.robot):
        excluded, names = relative["relative_exclude_joints"], relative["action_feature_names"]
        step = {"enabled": True, "exclude_joints": excluded, "action_names": names}
        before.insert(2, ("relative_actions_processor", step))
        after.insert(1, ("absolute_actions_processor", {"enabled": True}))
    stats = _tensors(checkpoint.norm_stats)
    _write_pipeline(folder, "policy_preprocessor", before, stats)
    _write_pipeline(folder, "policy_postprocessor", after, stats)


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


def _prompt_steps(checkpoint: Checkpoint) -> list[tuple[str, dict[str, Any]]]:
    model = checkpoint.config.model
    if isinstance(model, Pi05Config) and model.state_in_prompt:
        prompt = ("pi05_prepare_state_tokenizer_processor_step", {"max_state_dim": model.action_dim})
    else:
        prompt = ("pi0_new_line_processor", {})
    tokenizer = {
        "tokenizer_name": _tokenizer_name(checkpoint.tokenizers.text),
        "max_length": model.max_token_len,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
    }
    return [prompt, ("tokenizer_processor", tokenizer)]


def _tokenizer_name(text: TextTokenizer) -> str | None:
    """None, which LeRobot refuses until it is given a tokenizer, where the policy speaks another than PaliGemma's."""
    known = isinstance(text, SentencePieceTokenizer) and text.pieces_sha256 == PALIGEMMA_PIECES_SHA256
    return "google/paligemma-3b-pt-224" if known else None


def _tensors(stats: NormStats) -> dict[str, torch.Tensor]:
    return {
        f"{feature}.{name}": torch.tensor(values, dtype=torch.float32)
        for field, feature in _FEATURES.items()
        for name in _STATS
        if np.isfinite(values := getattr(getattr(stats, field), name)).all()
    }


def _write_pipeline(
    folder: Path, name: str, steps: list[tuple[str, dict[str, Any]]], stats: dict[str, torch.Tensor]
) -> None:
    entries = []
    for number, (step, config) in enumerate(steps):
        entries.append({"registry_name": step, "config": config})
        if "norm_map" in config:
            entries[-1]["state_file"] = f"{name}_step_{number}_{step}.safetensors"
            save_file(stats, folder / entries[-1]["state_file"])
    write_json(folder / f"{name}.json", {"name": name, "steps": entries})


def read_processor_stats(folder: Path, robot: Robot, action_horizon: int) -> NormStats:
    """The statistics of a LeRobot policy, for this robot; see `stats_from_fields`.

    Raises:
        NormStatsError: the pipeline has no statistics, or they are not this robot's.
        CheckpointError: a file that is not as LeRobot writes it.
    """
    path = folder / PREPROCESSOR
    steps = [step for step in Fields.read(path).objects("steps") if step.has("state_file")]
    found = [step for step in steps if step.get("registry_name", str, "") == "normalizer_processor"]
    if len(found) != 1:
        raise _unusable("one normalizer_processor with a state_file", f"{len(found)} of them", path)
    file = file_beside(folder, found[0].get("state_file", str), found[0].where)
    store = SafetensorsStore(file)
    fields = {
        field: {name: store.read(key).tolist() for name in _STATS if (key := f"{feature}.{name}") in store.arrays}
        for field, feature in _FEATURES.items()
    }
    sizes = {"state": robot.state_size, "actions": robot.model_action_size}
    for field, vectors in fields.items():
        lengths = {len(values) if isinstance(values, list) else 0 for values in vectors.values()}
        if lengths - {sizes[field]}:
            expected = f"statistics of {sizes[field]} {field} dimensions, as robot {robot.name!r} has"
            raise _unusable(expected, f"{shown(sorted(lengths))}", file)
    return stats_from_fields(fields, robot, action_horizon, str(file))


def _unusable(expected: str, found: str, path: Path) -> NormStatsError:
    return NormStatsError(
        expected=expected, found=found, where=str(path), next="name the statistics of this robot: --norm-stats FILE"
    )
