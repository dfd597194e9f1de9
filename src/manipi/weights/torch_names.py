"""The names of our tensors in the PyTorch layouts of the ecosystem, which all grew out of transformers' PaliGemma.

    ours                                      theirs, behind the layout's prefixes
    vision.blocks.3.up_proj.weight            …vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight
    gemma.blocks.3.experts.vlm.q_proj.weight  …language_model.layers.3.self_attn.q_proj.weight
    gemma.blocks.3.experts.action.…           …gemma_expert.model.layers.3.…
    head.state_in.weight                      …state_proj.weight

Shapes are equal but for the patch embedding, which is a convolution there: [D, channels, rows, columns].
"""

import math
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from manipi.model.config import ModelConfig, Pi0Config
from manipi.weights.names import Array, openpi_arrays

Layout: TypeAlias = Literal["openpi-torch", "lerobot", "paligemma"]


class Prefixes(NamedTuple):
    """What stands before the names of each part."""

    vision: str
    projector: str
    language: str
    lm_head: str
    """The output matrix of the vocabulary, which is the token embedding again."""
    expert: str = ""
    head: str = ""
    expert_lm_head: str = ""
    """The action expert's output matrix, which nothing uses."""


def _pi(root: str) -> Prefixes:
    vlm, expert = f"{root}paligemma_with_expert.paligemma.", f"{root}paligemma_with_expert.gemma_expert."
    return Prefixes(
        vision=f"{vlm}model.vision_tower.vision_model.",
        projector=f"{vlm}model.multi_modal_projector.linear.",
        language=f"{vlm}model.language_model.",
        lm_head=f"{vlm}lm_head.weight",
        expert=f"{expert}model.",
        head=root,
        expert_lm_head=f"{expert}lm_head.weight",
    )


PREFIXES: Mapping[str, tuple[Prefixes, ...]] = {
    "openpi-torch": (_pi(""),),
    "lerobot": (_pi("model."),),
    # transformers before and since 4.52.
    "paligemma": (
        Prefixes(
            vision="vision_tower.vision_model.",
            projector="multi_modal_projector.linear.",
            language="language_model.model.",
            lm_head="language_model.lm_head.weight",
        ),
        Prefixes(
            vision="model.vision_tower.vision_model.",
            projector="model.multi_modal_projector.linear.",
            language="model.language_model.",
            lm_head="lm_head.weight",
        ),
    ),
}
"""By layout; several where versions differ."""

_EXPERT = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention_norm.modulation": "input_layernorm.dense",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp_norm.modulation": "post_attention_layernorm.dense",
    "mlp.": "mlp.",
    "out_proj": "self_attn.o_proj",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
}
_VISION_BLOCK = {
    "attention_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "up_proj": "mlp.fc1",
    "down_proj": "mlp.fc2",
    "out_proj": "self_attn.out_proj",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
}
_HEAD = {"state_in": "state_proj", "action_in": "action_in_proj", "action_out": "action_out_proj"}


def torch_arrays(config: ModelConfig, prefixes: Prefixes) -> dict[str, Array]:
    """Every tensor of the layout for this config, by its name there; the language model alone without a head prefix."""
    tree: dict[str, Array] = {}
    for array in openpi_arrays(config).values():
        for name in (name for layer in array.names for name in layer):
            theirs = torch_name(name, config, prefixes)
            if theirs is not None:
                tree[theirs] = _array(name, array.our_shape, config)
    return tree


def torch_name(name: str, config: ModelConfig, prefixes: Prefixes) -> str | None:
    """Their name for one of our tensors; None where the layout has no such part."""
    part, _, rest = name.partition(".")
    if part == "vision":
        return _vision(rest, prefixes)
    if part == "head":
        return None if not prefixes.expert else prefixes.head + _head(rest, isinstance(config, Pi0Config))
    if rest == "token_embedding":
        return f"{prefixes.language}embed_tokens.weight"
    expert = "action" if ".action." in name else "vlm"
    prefix = prefixes.expert if expert == "action" else prefixes.language
    if not prefix:
        return None
    if rest.startswith("final_norms."):
        leaf = rest.removeprefix(f"final_norms.{expert}.")
        return f"{prefix}norm.{'weight' if leaf == 'scale' else leaf.replace('modulation', 'dense')}"
    layer, rest = re.fullmatch(rf"blocks\.(\d+)\.experts\.{expert}\.(.*)", rest).groups()  # type: ignore[union-attr]
    return f"{prefix}layers.{layer}.{_rename(rest, _EXPERT)}"


def _vision(rest: str, prefixes: Prefixes) -> str:
    if rest.startswith("head."):
        return prefixes.projector + rest.removeprefix("head.")
    if block := re.fullmatch(r"blocks\.(\d+)\.(.*)", rest):
        return f"{prefixes.vision}encoder.layers.{block[1]}.{_rename(block[2], _VISION_BLOCK)}"
    if rest == "position_embedding":
        return f"{prefixes.vision}embeddings.position_embedding.weight"
    names = {"patch_embedding": "embeddings.patch_embedding", "final_norm": "post_layernorm"}
    return prefixes.vision + _rename(rest, names)


def _head(rest: str, pi0: bool) -> str:
    return f"action_{rest}" if pi0 and rest.startswith("time_mlp") else _rename(rest, _HEAD)


def _rename(rest: str, names: Mapping[str, str]) -> str:
    """The longest known beginning replaced; other names stay."""
    for ours in sorted(names, key=len, reverse=True):
        if rest.startswith(ours):
            return names[ours] + rest.removeprefix(ours)
    return rest


def _array(name: str, shape: tuple[int, ...], config: ModelConfig) -> Array:
    if name == "vision.patch_embedding.weight":
        patch = config.vision.patch_size
        axes, permutation = (shape[0], 3, patch, patch), (0, 2, 3, 1)
    else:
        axes, permutation = shape, tuple(range(len(shape)))
    assert math.prod(axes) == math.prod(shape)
    return Array(names=((name,),), shape=axes, axes=axes, permutation=permutation, our_shape=shape)
