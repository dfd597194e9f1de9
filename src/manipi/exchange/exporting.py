"""Our checkpoints in other projects' layouts, with their norm stats, and a description that imports them back whole.

openpi-jax     params/ (Orbax), assets/<robot>/norm_stats.json
openpi-torch   model.safetensors, config.json, assets/…
lerobot        model.safetensors, config.json, policy_preprocessor.json and policy_postprocessor.json with norm stats
adapters       adapters.safetensors: the low-rank updates alone, and the hash of the weights that they belong to
manipi         our own, for merging adapters into the matrices
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from manipi.checkpoints.native import Checkpoint, read_checkpoint, seal, write_description
from manipi.errors import ConfigError
from manipi.exchange.adapters import is_adapter, merge_adapters, read_adapters, write_adapters
from manipi.exchange.certificate import (
    Certificate,
    answer_of_source,
    answer_of_weights,
    certify,
    record_self_test,
)
from manipi.exchange.lerobot_processors import MODES, relative_settings, write_processors
from manipi.exchange.stated import DESCRIPTION
from manipi.model.config import GEMMA_2B, GEMMA_300M, ModelConfig, Pi0Config, Pi0FastConfig
from manipi.records import write_json
from manipi.storage import atomic_directory, require_absent, require_room
from manipi.transforms.normalize import save_norm_stats
from manipi.weights.layouts import open_source
from manipi.weights.names import Array, openpi_arrays, stack_layer
from manipi.weights.orbax import write_tree
from manipi.weights.safetensors_writer import write_safetensors
from manipi.weights.stores import ArrayInfo, bytes_of
from manipi.weights.torch_names import PREFIXES, torch_arrays

Target: TypeAlias = Literal["openpi-jax", "openpi-torch", "lerobot", "adapters", "manipi"]


def export_checkpoint(
    folder: Path, to: Target, target: Path, *, dtype: torch.dtype | None = None, merge: bool = False
) -> Certificate:
    """Write the checkpoint in another layout; on any error nothing is left behind.

    Args:
        dtype: of the weights written; None keeps each tensor's own.
        merge: put adapters into the matrices first.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: the layout has no place for the policy or its adapters.
        SelfTestError: the policy answers otherwise than before.
        StorageError: `target` exists, or the disk is full.
    """
    checkpoint = read_checkpoint(folder)
    exported = merge_adapters(checkpoint) if merge else checkpoint
    _require_place(exported.config.model, to, folder)
    if to == "lerobot":
        relative_settings(exported.robot)  # or nothing is computed first
    written = {name: ArrayInfo(tuple(w.shape), dtype or w.dtype) for name, w in exported.weights.items()}
    require_absent(target)
    if to != "openpi-jax":  # which is compressed, to a size that is not known before
        alone = {name: info for name, info in written.items() if to != "adapters" or is_adapter(name)}
        require_room(target, bytes_of(alone))
    before = answer_of_weights(checkpoint.weights, checkpoint)
    with atomic_directory(target) as partial:
        _WRITERS[to](partial, exported, dtype)
        after = _read_back(partial, to, exported)
        return certify(
            str(folder),
            target,
            to,
            before,
            after,
            model=exported.config.model,
            read=[w.dtype for w in checkpoint.weights.values()],
            written=written,
        )


def _require_place(model: ModelConfig, to: Target, folder: Path) -> None:
    adapted = bool(model.vlm_adapters) or (not isinstance(model, Pi0FastConfig) and bool(model.action_adapters))
    if adapted and to in ("openpi-torch", "lerobot"):
        raise ConfigError(
            expected=f"plain weights: {to} has no place for low-rank adapters",
            found="a policy with adapters",
            where=str(folder),
            next="add --merge to put them into the matrices, or export --to openpi-jax or adapters",
        )
    if not adapted and to == "adapters":
        raise ConfigError(
            expected="a policy with low-rank adapters", found="none", where=str(folder), next="export it whole"
        )
    if isinstance(model, Pi0FastConfig) and to == "openpi-torch":
        raise ConfigError(
            expected="π0 or π0.5: openpi has no π0-FAST in PyTorch",
            found=type(model).__name__,
            where=str(folder),
            next="export --to openpi-jax or lerobot",
        )


def _read_back(partial: Path, to: Target, exported: Checkpoint) -> np.ndarray:
    if to == "manipi":
        return answer_of_weights(read_checkpoint(partial).weights, exported)
    if to == "adapters":
        return answer_of_weights(read_adapters(partial, exported).weights, exported)
    return answer_of_source(open_source(partial), exported)


def _layers(
    arrays: Mapping[str, Array], weights: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Iterator[tuple[str, int | None, Tensor]]:
    for path, array in arrays.items():
        for layer in range(len(array.names)):
            values = stack_layer(array, layer, weights)
            yield path, layer if len(array.names) > 1 else None, values.to(dtype or values.dtype)


def _infos(
    arrays: Mapping[str, Array], weights: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, ArrayInfo]:
    return {path: ArrayInfo(a.shape, dtype or weights[a.names[0][0]].dtype) for path, a in arrays.items()}


def _write_jax(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    arrays = openpi_arrays(checkpoint.config.model)
    infos = _infos(arrays, checkpoint.weights, dtype)
    if strange := {str(info.dtype).removeprefix("torch.") for info in infos.values()} - {"float32", "bfloat16"}:
        raise ConfigError(
            expected="weights in float32 or bfloat16, as openpi-jax has them",
            found=", ".join(sorted(strange)),
            where=str(folder),
            next="--dtype float32, or bfloat16",
        )
    (folder / "params").mkdir()
    write_tree(folder / "params", infos, _layers(arrays, checkpoint.weights, dtype))
    _write_companions(folder, checkpoint)


def _write_torch(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    _write_safetensors(folder, checkpoint, dtype, "openpi-torch")
    write_json(folder / "config.json", _openpi_config(checkpoint, dtype))


def _write_lerobot(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    _write_safetensors(folder, checkpoint, dtype, "lerobot")
    config = _lerobot_config(checkpoint)
    write_json(folder / "config.json", config)
    write_processors(folder, checkpoint, config)


def _write_safetensors(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None, layout: str) -> None:
    model, prefixes = checkpoint.config.model, PREFIXES[layout][0]
    arrays, weights = torch_arrays(model, prefixes), checkpoint.weights
    # Their files name the tied embedding by the output matrix; the action expert's own output matrix is read by nobody,
    # but openpi's loader asks for it.
    arrays[prefixes.lm_head] = arrays.pop(f"{prefixes.language}embed_tokens.weight")
    infos = _infos(arrays, weights, dtype)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from ((path, values) for path, _, values in _layers(arrays, weights, dtype))
        if prefixes.expert_lm_head in infos:
            info = infos[prefixes.expert_lm_head]
            yield prefixes.expert_lm_head, torch.zeros(info.shape, dtype=info.dtype)

    if not isinstance(model, Pi0FastConfig):
        shape = (model.vocab_size, model.action_expert.width)
        infos[prefixes.expert_lm_head] = ArrayInfo(shape, dtype or weights["head.action_in.weight"].dtype)
    write_safetensors(folder / "model.safetensors", infos, tensors(), {"format": "pt"})
    _write_companions(folder, checkpoint)


def _write_manipi(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    weights = checkpoint.weights
    infos = {name: ArrayInfo(tuple(w.shape), dtype or w.dtype) for name, w in weights.items()}
    tensors = ((name, w.to(infos[name].dtype)) for name, w in weights.items())
    write_safetensors(folder / "model.safetensors", infos, tensors)
    written = replace(checkpoint, weights=load_file(folder / "model.safetensors"))
    write_description(folder, replace(written, self_test=record_self_test(written)))
    seal(folder)


def _write_companions(folder: Path, checkpoint: Checkpoint) -> None:
    """Norm stats where openpi looks for them, and all that the layout cannot say."""
    assets = folder / "assets" / checkpoint.robot.name
    assets.mkdir(parents=True)
    save_norm_stats(checkpoint.norm_stats, assets / "norm_stats.json")
    (folder / DESCRIPTION).mkdir()
    write_description(folder / DESCRIPTION, checkpoint)


_VARIANTS = {GEMMA_2B: "gemma_2b", GEMMA_300M: "gemma_300m"}
"""openpi has names for these sizes alone."""


def _openpi_config(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, object]:
    model = checkpoint.config.model
    precision = str(dtype or checkpoint.weights["head.action_in.weight"].dtype).removeprefix("torch.")
    return {
        "action_dim": model.action_dim,
        "action_horizon": model.action_horizon,
        "paligemma_variant": _VARIANTS.get(model.vlm),
        "action_expert_variant": None if isinstance(model, Pi0FastConfig) else _VARIANTS.get(model.action_expert),
        "precision": precision,
    }


def _lerobot_config(checkpoint: Checkpoint) -> dict[str, object]:
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


_WRITERS: dict[str, Callable[[Path, Checkpoint, torch.dtype | None], None]] = {
    "openpi-jax": _write_jax,
    "openpi-torch": _write_torch,
    "lerobot": _write_lerobot,
    "adapters": write_adapters,
    "manipi": _write_manipi,
}
