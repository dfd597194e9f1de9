"""The architecture behind a foreign checkpoint, from the shapes of its tensors.

Shapes tell the kind of policy, all widths and depths, the adapters' ranks, and the action dimensions. They do not tell
the action horizon, the token budget, the cameras, an adapter's alpha (alpha = rank where nothing else is known, as in
openpi), nor, in the PyTorch layouts, how many heads share a matrix: those come from `like`, or are the released ones.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from manipi.errors import ConfigError, WeightsMismatchError
from manipi.model.config import (
    REFERENCE,
    Adapters,
    GemmaSize,
    LoRA,
    ModelConfig,
    Pi0Config,
    Pi0FastConfig,
    Pi05Config,
    VisionSize,
)
from manipi.weights.layouts import Source

_JAX = {
    "patch": "PaliGemma/img/embedding/kernel",
    "positions": "PaliGemma/img/pos_embedding",
    "vision_query": "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel",
    "vision_mlp": "PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel",
    "embedding": "PaliGemma/llm/embedder/input_embedding",
    "actions": "action_in_proj/kernel",
}


def infer_config(source: Source, like: ModelConfig | None = None) -> ModelConfig:
    """The config of the weights.

    Args:
        like: what the weights cannot tell; None: the released policies' settings. A PaliGemma has the kind of `like`.

    Raises:
        WeightsMismatchError: a tensor is missing that is needed to tell, or the kind is not that of `like`.
    """
    kind = type(like) if source.vlm_only and like is not None else _kind(source)
    if like is not None and not isinstance(like, kind):
        raise WeightsMismatchError(
            expected=f"the weights of a {type(like).__name__}",
            found=f"those of a {kind.__name__}",
            where=source.store.where,
            next="name a recipe or robot of that kind of policy (manipi recipes)",
        )
    base = like if like is not None else kind(compat=REFERENCE)
    read = _read_jax if source.prefixes is None else _read_torch
    return dataclasses.replace(base, **read(source, base))


def _kind(source: Source) -> type[ModelConfig]:
    names, root = source.shapes, source.prefixes.head if source.prefixes else ""
    leaf = "weight" if source.prefixes else "kernel"
    if f"{root}action_in_proj.{leaf}" in names or f"{root}action_in_proj/{leaf}" in names:
        pi0 = any(name.startswith(f"{root}state_proj") for name in names)
        return Pi0Config if pi0 else Pi05Config
    return Pi0FastConfig


def _shape(source: Source) -> Callable[[str, int], tuple[int, ...]]:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = source.shapes.get(name)
        if found is None or len(found) != rank or not all(found):
            raise WeightsMismatchError(
                expected="the tensors that tell the architecture",
                found=f"missing [{name!r}]" if found is None else f"{name} of shape {found} instead of {rank} axes",
                where=source.store.where,
                next="copy or fetch the checkpoint again; it is not complete",
            )
        return found

    return shape


def _read_jax(source: Source, base: ModelConfig) -> dict[str, Any]:
    root = "params/" if source.layout == "paligemma-npz" else "PaliGemma/"
    read = _shape(source)
    names = {key: name.replace("PaliGemma/", root, 1) for key, name in _JAX.items()}
    patch, _, _, width = read(names["patch"], 4)
    depth, _, heads, _ = read(names["vision_query"], 4)
    grid = math.isqrt(read(names["positions"], 3)[1])
    fields: dict[str, Any] = {
        "vision": VisionSize(
            width=width,
            depth=depth,
            mlp_dim=read(names["vision_mlp"], 3)[2],
            num_heads=heads,
            patch_size=patch,
            image_size=grid * patch,
        ),
        "vocab_size": read(names["embedding"], 2)[0],
        "vlm": _jax_size(source, f"{root}llm/layers/", ""),
        "vlm_adapters": _jax_adapters(source.shapes, f"{root}llm/layers/", "", base.vlm_adapters),
    }
    if not source.vlm_only and not isinstance(base, Pi0FastConfig):
        fields["action_dim"] = read(names["actions"], 2)[0]
        fields["action_expert"] = _jax_size(source, f"{root}llm/layers/", "_1")
        fields["action_adapters"] = _jax_adapters(source.shapes, f"{root}llm/layers/", "_1", base.action_adapters)
    return fields


def _jax_size(source: Source, layers: str, suffix: str) -> GemmaSize:
    read = _shape(source)
    depth, heads, head_dim, width = read(f"{layers}attn/attn_vec_einsum{suffix}/w", 4)
    # Where every head has keys and values of its own, they lie in one array with the queries.
    joint = f"{layers}attn/qkv_einsum{suffix}/w" in source.shapes
    return GemmaSize(
        width=width,
        depth=depth,
        mlp_dim=read(f"{layers}mlp{suffix}/linear", 3)[1],
        num_heads=heads,
        num_kv_heads=heads if joint else read(f"{layers}attn/kv_einsum{suffix}/w", 5)[2],
        head_dim=head_dim,
    )


def _jax_adapters(shapes: dict[str, tuple[int, ...]], layers: str, suffix: str, like: Adapters) -> Adapters:
    def lora(like: LoRA | None, *names: str) -> LoRA | None:
        found = [shapes[name][-1] for name in names if shapes.get(name)]
        if not found:
            return None
        return like if like is not None and like.rank == found[0] else LoRA(rank=found[0], alpha=float(found[0]))

    return Adapters(
        attention=lora(like.attention, *(f"{layers}attn/{q}_einsum{suffix}/lora_a" for q in ("q", "qkv"))),
        feed_forward=lora(like.feed_forward, f"{layers}mlp{suffix}/gating_einsum_lora_a"),
    )


def _read_torch(source: Source, base: ModelConfig) -> dict[str, Any]:
    read, prefixes = _shape(source), source.prefixes
    assert prefixes is not None
    width, _, patch, _ = read(f"{prefixes.vision}embeddings.patch_embedding.weight", 4)
    grid = math.isqrt(read(f"{prefixes.vision}embeddings.position_embedding.weight", 2)[0])
    embedding = f"{prefixes.language}embed_tokens.weight"
    rows = read(embedding if embedding in source.shapes else prefixes.lm_head, 2)[0]
    vision = dataclasses.replace(
        base.vision,
        width=width,
        depth=_depth(source, f"{prefixes.vision}encoder.layers."),
        mlp_dim=read(f"{prefixes.vision}encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch_size=patch,
        image_size=grid * patch,
    )
    vlm = _torch_size(source, read, prefixes.language, base.vlm)
    fields: dict[str, Any] = {"vision": vision, "vlm": vlm, "vlm_adapters": Adapters()}
    # transformers pads the vocabulary of PaliGemma.
    fields["vocab_size"] = min(rows, base.vocab_size) if source.layout == "paligemma" else rows
    if prefixes.expert and not isinstance(base, Pi0FastConfig):
        fields["action_dim"] = read(f"{prefixes.head}action_in_proj.weight", 2)[1]
        fields["action_expert"] = _torch_size(source, read, prefixes.expert, base.action_expert)
        fields["action_adapters"] = Adapters()
    return fields


def _torch_size(source: Source, read: Callable[[str, int], tuple[int, ...]], prefix: str, like: GemmaSize) -> GemmaSize:
    """Matrices hold heads times head dim; `like` says how many of which."""
    queries, width = read(f"{prefix}layers.0.self_attn.q_proj.weight", 2)
    keys = read(f"{prefix}layers.0.self_attn.k_proj.weight", 2)[0]
    if queries % like.head_dim or keys % like.head_dim:
        raise ConfigError(
            expected=f"heads of {like.head_dim} dimensions, as in the named recipe or the released policies",
            found=f"query and key matrices of {queries} and {keys} rows",
            where=source.store.where,
            next="name a recipe with this policy's head_dim: --recipe",
        )
    return GemmaSize(
        width=width,
        depth=_depth(source, f"{prefix}layers."),
        mlp_dim=read(f"{prefix}layers.0.mlp.up_proj.weight", 2)[0],
        num_heads=queries // like.head_dim,
        num_kv_heads=keys // like.head_dim,
        head_dim=like.head_dim,
    )


def _depth(source: Source, prefix: str) -> int:
    numbers = {name.removeprefix(prefix).split(".")[0] for name in source.shapes if name.startswith(prefix)}
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
