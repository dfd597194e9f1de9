"""Our checkpoints in other projects' layouts, with their norm stats, and a description that imports them back whole.

openpi-jax     params/ (Orbax), assets/<robot>/norm_stats.json
openpi-torch   model.safetensors, config.json, assets/…
lerobot        model.safetensors, config.json, policy_preprocessor.json and policy_postprocessor.json with norm stats
adapters       adapters.safetensors: the low-rank updates alone, and the hash of the weights that they belong to
manipi         our own, for merging adapters into the matrices
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from manipi.checkpoints.adapters import is_adapter, read_adapters, without_adapters, write_adapters
from manipi.checkpoints.native import Checkpoint, read_checkpoint, write_description
from manipi.errors import ConfigError
from manipi.exchange.certificate import Certificate, answer_of_foreign, answer_of_weights, certify, write_streamed
from manipi.exchange.lerobot import DESCRIPTION, policy_config, relative_settings, write_processors
from manipi.model.config import GEMMA_2B, GEMMA_300M, ModelConfig, Pi0FastConfig
from manipi.records import write_json
from manipi.storage import atomic_directory, require_absent, require_room
from manipi.transforms.normalize import save_norm_stats
from manipi.weights.layouts import open_weights
from manipi.weights.names import LEROBOT, OPENPI_JAX, OPENPI_TORCH, arrays, stack_layer
from manipi.weights.stores import ArrayInfo, bytes_of, write_safetensors, write_tree

# Their PyTorch files name the tied embedding by the output matrix.
_LAYOUTS = {"openpi-jax": OPENPI_JAX} | {one.name: one.with_embedding(one.lm_head) for one in (OPENPI_TORCH, LEROBOT)}
_VARIANTS = {GEMMA_2B: "gemma_2b", GEMMA_300M: "gemma_300m"}
"""openpi has names for these sizes alone."""
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
    exported = without_adapters(checkpoint) if merge else checkpoint
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
        if to == "adapters":
            write_adapters(partial, exported, dtype)
            after = answer_of_weights(read_adapters(partial, exported).weights, exported)
        elif to == "manipi":
            tensors = ((name, w.to(written[name].dtype)) for name, w in exported.weights.items())
            write_streamed(partial, exported, written, tensors)
            after = answer_of_weights(read_checkpoint(partial).weights, exported)
        else:
            _write_foreign(partial, exported, to, dtype)
            after = answer_of_foreign(open_weights(partial), exported)
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


def _write_foreign(folder: Path, checkpoint: Checkpoint, to: str, dtype: torch.dtype | None) -> None:
    """The weights in another project's layout, what it has beside them, and all that it cannot say."""
    model, weights, layout = checkpoint.config.model, checkpoint.weights, _LAYOUTS[to]
    tree = arrays(model, layout)
    infos = {path: ArrayInfo(a.shape, dtype or weights[a.names[0][0]].dtype) for path, a in tree.items()}

    def layers() -> Iterator[tuple[str, int | None, Tensor]]:
        for path, array in tree.items():
            for layer in range(len(array.names)):
                values = stack_layer(array, layer, weights)
                yield path, layer if len(array.names) > 1 else None, values.to(dtype or values.dtype)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from ((path, values) for path, _, values in layers())
        yield from (
            (path, torch.zeros(infos[path].shape, dtype=infos[path].dtype)) for path in infos.keys() - tree.keys()
        )

    if layout.is_jax:
        if strange := {str(info.dtype).removeprefix("torch.") for info in infos.values()} - {"float32", "bfloat16"}:
            raise ConfigError(
                expected="weights in float32 or bfloat16, as openpi-jax has them",
                found=", ".join(sorted(strange)),
                where=str(folder),
                next="--dtype float32, or bfloat16",
            )
        (folder / "params").mkdir()
        write_tree(folder / "params", infos, layers())
    else:
        if not isinstance(model, Pi0FastConfig):
            # The action expert's own output matrix is never used, but openpi's loader asks for it.
            shape, like = (model.vocab_size, model.action_expert.width), weights["head.action_in.weight"]
            infos[layout.expert_lm_head] = ArrayInfo(shape, dtype or like.dtype)
        write_safetensors(folder / "model.safetensors", infos, tensors(), {"format": "pt"})
    if to == "openpi-torch":
        assert not isinstance(model, Pi0FastConfig)
        config = {
            "action_dim": model.action_dim,
            "action_horizon": model.action_horizon,
            "paligemma_variant": _VARIANTS.get(model.vlm),
            "action_expert_variant": _VARIANTS.get(model.action_expert),
            "precision": str(infos[layout.expert_lm_head].dtype).removeprefix("torch."),
        }
        write_json(folder / "config.json", config)
    elif to == "lerobot":
        config = policy_config(checkpoint)
        write_json(folder / "config.json", config)
        write_processors(folder, checkpoint, config)
    assets = folder / "assets" / checkpoint.robot.name
    assets.mkdir(parents=True)
    save_norm_stats(checkpoint.norm_stats, assets / "norm_stats.json")
    (folder / DESCRIPTION).mkdir()
    write_description(folder / DESCRIPTION, checkpoint)
