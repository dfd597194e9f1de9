"""LeRobot's pre- and post-processor of a policy, which carry its norm stats: written beside exported weights, and read.

policy_preprocessor.json                                     the steps in order, one of which normalises
policy_preprocessor_step_2_normalizer_processor.safetensors  observation.state.mean, action.q99, …
policy_postprocessor.json, …

State and actions are the model's there: LeRobot knows none of our robots' conversions (offsets, 6D rotations, gripper
directions, limits), so whoever calls it has to do them, as around openpi.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from manipi.checkpoints.native import Checkpoint
from manipi.errors import NormStatsError
from manipi.model.config import NormMode, Pi0FastConfig, Pi05Config
from manipi.records import read_json, write_json
from manipi.robots.robot import Robot
from manipi.tokenizers import PALIGEMMA_PIECES_SHA256, SentencePieceTokenizer, TextTokenizer
from manipi.transforms.normalize import EPSILON, stats_from_fields
from manipi.types import NormStats

MODES: dict[NormMode, str] = {"zscore": "MEAN_STD", "quantile": "QUANTILES"}
PREPROCESSOR = "policy_preprocessor.json"
_STATS = ("mean", "std", "q01", "q99", "min", "max")
_FEATURES = {"state": "observation.state", "actions": "action"}


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
    stats = _tensors(checkpoint.norm_stats)
    _write_pipeline(folder, "policy_preprocessor", before, stats)
    _write_pipeline(folder, "policy_postprocessor", [("unnormalizer_processor", actions), device], stats)


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


def read_processor_stats(folder: Path, robot: Robot, action_horizon: int, mode: NormMode) -> NormStats:
    """The statistics of a LeRobot policy, for this robot; see `stats_from_fields`.

    Raises:
        NormStatsError: the pipeline normalises otherwise than `mode`, without statistics, or not at all; or they are
            not this robot's.
    """
    path = folder / PREPROCESSOR
    steps = read_json(path)["steps"]
    found = [step for step in steps if step.get("registry_name") == "normalizer_processor"]
    if len(found) != 1 or "state_file" not in found[0]:
        raise _unusable("one normalizer_processor with a state_file", f"{len(found)} steps, or one without", path)
    modes = {found[0]["config"]["norm_map"].get(kind) for kind in ("STATE", "ACTION")}
    if modes != {MODES[mode]}:
        raise _unusable(f"{MODES[mode]} for state and actions, as {mode} normalisation", f"{modes}", path)
    tensors = load_file(folder / found[0]["state_file"])
    fields = {
        field: {name: tensors[key].tolist() for name in _STATS if (key := f"{feature}.{name}") in tensors}
        for field, feature in _FEATURES.items()
    }
    return stats_from_fields(fields, robot, action_horizon, str(folder / found[0]["state_file"]))


def _unusable(expected: str, found: str, path: Path) -> NormStatsError:
    return NormStatsError(
        expected=expected, found=found, where=str(path), next="name the statistics of this robot: --norm-stats FILE"
    )
