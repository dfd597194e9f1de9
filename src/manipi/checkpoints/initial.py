"""Weights to go on from, and low-rank adapters: merged, or in files of their own.

Weights are those of a checkpoint of ours, of openpi, of LeRobot, or of the vision-language model alone.

adapters/
├─ adapters.safetensors   the `lora_a` and `lora_b` of every adapted matrix
├─ config.json            the model with its adapters
└─ base.json              SHA-256 of the weights that they belong to
"""

import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from manipi.checkpoints.native import MANIFEST, Checkpoint, read_config, read_description, seal, verify, write_config
from manipi.errors import CheckpointError, IntegrityError
from manipi.model import VLA
from manipi.model.config import NO_ADAPTERS, ModelConfig, Pi0FastConfig
from manipi.model.device import fill
from manipi.model.layers import AdaptedLinear
from manipi.records import read_json, write_json
from manipi.remote.fetch import fetch
from manipi.tokenizers.text import PALIGEMMA_VOCABULARY, TextTokenizer, require_paligemma
from manipi.weights.layouts import open_weights
from manipi.weights.names import require_match
from manipi.weights.released import resolve
from manipi.weights.stores import ArrayInfo, write_safetensors


def load_initial_weights(model: VLA, source: str) -> list[str]:
    """Fill a model from a checkpoint. Returns the names that keep their own initial values.

    Those may be adapters and the projection of older states, where the checkpoint has none; and everything beyond the
    language model where it is a PaliGemma.

    Args:
        source: a released name, a folder, a file, or a URL. A run's folder stands for its newest checkpoint, and
            adapters that the model has not are merged into the matrices that they adapt.

    Raises:
        WeightsMismatchError: anything else is missing, and whatever is unexpected or mis-shaped.
        CheckpointError: no checkpoint, or a damaged one.
        FetchError: it cannot be had.
    """
    path = _folder(source)
    parameters = dict(model.named_parameters())
    tensors: Iterable[tuple[str, Tensor]]
    vlm_only = False
    if (path / MANIFEST).is_file():
        verify(path)
        if not (path / "model.safetensors").is_file():
            raise CheckpointError(
                expected="a checkpoint with all weights",
                found="adapters alone",
                where=str(path),
                next="join them with their base first: manipi import (see its --help)",
            )
        weights = load_file(path / "model.safetensors")
        if any(is_adapter(name) and name not in parameters for name in weights):
            weights = merge_adapters(weights, read_description(path).config.model, keep=parameters)
        theirs = {name: tuple(w.shape) for name, w in weights.items()}
        tensors = weights.items()
    else:
        foreign = open_weights(path)
        config, vlm_only = foreign.config(like=model.config), foreign.layout.vlm_only
        foreign.check(config)
        theirs = {name: a.our_shape for a in foreign.arrays(config).values() for layer in a.names for name in layer}
        tensors = foreign.tensors(config)
    added = [name for name in parameters if is_adapter(name) or name.startswith("past_state.")]
    kept = [name for name in parameters if name not in theirs and (vlm_only or name in added)]
    require_match({name: tuple(p.shape) for name, p in parameters.items() if name not in kept}, theirs, str(path))
    for name, tensor in tensors:
        fill(parameters[name], tensor)
    return kept


def require_tokenizer(source: str, vocab_size: int, text: TextTokenizer) -> None:
    """That a model of `vocab_size` reads prompts in the ids that the weights of `source` were trained with.

    Raises:
        TokenizerError: not PaliGemma's tokenizer, where another project's weights have its vocabulary.
        FetchError: the weights cannot be had.
    """
    # Our own checkpoints may have been trained with any tokenizer, whatever the size of their embedding.
    if vocab_size == PALIGEMMA_VOCABULARY and not (_folder(source) / MANIFEST).is_file():
        require_paligemma(text)


def _folder(source: str) -> Path:
    """Where the weights are: of a run's folder, its newest checkpoint."""
    path = fetch(resolve(source))
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir():
        return path
    steps = [int(one.name) for one in checkpoints.iterdir() if one.name.isdigit()]
    if not steps:
        raise CheckpointError(
            expected="a run with a checkpoint to start from",
            found="none yet",
            where=str(checkpoints),
            next="let that run reach its first checkpoint, or name other weights",
        )
    return checkpoints / str(max(steps))


# ---- adapters


def merge_adapters(weights: Mapping[str, Tensor], config: ModelConfig, keep: Container[str] = ()) -> dict[str, Tensor]:
    """The weights with plain matrices, `W + scale · B A`, each in the wider dtype of the two.

    Args:
        config: of the model that the weights belong to.
        keep: names of adapters that stay beside their matrices.
    """
    with torch.device("meta"):
        model = VLA(config)
    model.load_state_dict(dict(weights), strict=True, assign=True)
    merged = dict(weights)
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and f"{name}.lora_a" not in keep:
            # Rounding to a coarser base would lose what the adapters learned.
            dtype = torch.promote_types(module.weight.dtype, module.lora_a.dtype)
            merged[f"{name}.weight"] = module.merged().to(dtype)
            del merged[f"{name}.lora_a"], merged[f"{name}.lora_b"]
    return merged


def without_adapters(checkpoint: Checkpoint) -> Checkpoint:
    """The same policy with plain matrices, as of `merge_adapters`."""
    model, plain = checkpoint.config.model, {"vlm_adapters": NO_ADAPTERS}
    if not isinstance(model, Pi0FastConfig):
        plain["action_adapters"] = NO_ADAPTERS
    config = replace(checkpoint.config, model=replace(model, **plain))
    return replace(checkpoint, weights=merge_adapters(checkpoint.weights, model), config=config, self_test=None)


def write_adapters(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """Write the adapters alone into an existing folder."""
    adapters = {name: w.to(dtype or w.dtype) for name, w in checkpoint.weights.items() if is_adapter(name)}
    infos = {name: ArrayInfo(tuple(w.shape), w.dtype) for name, w in adapters.items()}
    write_safetensors(folder / "adapters.safetensors", infos, adapters.items())
    write_config(folder, checkpoint.config)
    write_json(folder / "base.json", {"sha256": base_sha256(checkpoint.weights)})
    seal(folder)


def read_adapters(folder: Path, base: Checkpoint) -> Checkpoint:
    """The base with the adapters of the folder beside its matrices.

    Args:
        base: with adapters or without; its own are left out.

    Raises:
        CheckpointError: the folder is no such folder, or altered.
        IntegrityError: the adapters belong to other weights.
        WeightsMismatchError: they do not fit.
    """
    verify(folder)
    weights = {name: w for name, w in base.weights.items() if not is_adapter(name)}
    expected, found = read_json(folder / "base.json")["sha256"], base_sha256(weights)
    if found != expected:
        raise IntegrityError(
            expected=f"the weights that the adapters were trained on (SHA-256 {expected[:16]}…)",
            found=f"other weights ({found[:16]}…)",
            where=str(folder),
            next="name the checkpoint that the training started from: --base",
        )
    config = read_config(folder)
    weights |= load_file(folder / "adapters.safetensors")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in VLA(config.model).named_parameters()}
    require_match(shapes, {name: tuple(w.shape) for name, w in weights.items()}, str(folder))
    return replace(base, weights=weights, config=config, self_test=None)


def base_sha256(weights: Mapping[str, Tensor]) -> str:
    """Of the matrices without adapters: names and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(name for name in weights if not is_adapter(name)):
        digest.update(f"{name} {weights[name].dtype}".encode())
        digest.update(weights[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_adapter(name: str) -> bool:
    """Whether the tensor of that name is a part of a low-rank update."""
    return name.endswith((".lora_a", ".lora_b"))
