"""The reference implementation's parameter tree and our state dict, as one table.

The reference stacks the layers of each expert on the first axis, keeps heads apart from features and stores matrices as
[in, out]. Our matrices are [out, in], one per layer:

    PaliGemma/llm/layers/attn/q_einsum_1/w   [layer, N, D, H]   ◀──▶   gemma.blocks.{layer}.experts.action.q_proj.weight
                                                                       [N·H, D]

A row of the table names the reference's axes and the order in which they stand in ours, where letters written together
are flattened: `"NDH"` and `"NH D"` for the row above. Each letter is an axis, whose size the config says.
"""

import math
from collections.abc import Container, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manipi.errors import WeightsMismatchError
from manipi.model.config import Adapters, GemmaSize, ModelConfig, Pi0Config, Pi0FastConfig


class Row(NamedTuple):
    """One array of the reference, and the tensors of ours that hold its values."""

    reference: str
    ours: str
    """`{layer}` where the reference stacks layers. Names with `|` between them: it stacks those after the layers."""
    axes: str
    order: str


VISION = (
    Row("embedding/kernel", "patch_embedding.weight", "PQCD", "D PQC"),
    Row("embedding/bias", "patch_embedding.bias", "D", "D"),
    Row("pos_embedding", "position_embedding", "1TD", "1T D"),
    Row("Transformer/encoder_norm/scale", "final_norm.weight", "D", "D"),
    Row("Transformer/encoder_norm/bias", "final_norm.bias", "D", "D"),
    Row("head/kernel", "head.weight", "DO", "O D"),
    Row("head/bias", "head.bias", "O", "O"),
)

_ATTENTION = "MultiHeadDotProductAttention_0"
VISION_BLOCK = (
    Row("LayerNorm_0/scale", "attention_norm.weight", "D", "D"),
    Row("LayerNorm_0/bias", "attention_norm.bias", "D", "D"),
    Row(f"{_ATTENTION}/query/kernel", "q_proj.weight", "DNH", "NH D"),
    Row(f"{_ATTENTION}/query/bias", "q_proj.bias", "NH", "NH"),
    Row(f"{_ATTENTION}/key/kernel", "k_proj.weight", "DNH", "NH D"),
    Row(f"{_ATTENTION}/key/bias", "k_proj.bias", "NH", "NH"),
    Row(f"{_ATTENTION}/value/kernel", "v_proj.weight", "DNH", "NH D"),
    Row(f"{_ATTENTION}/value/bias", "v_proj.bias", "NH", "NH"),
    Row(f"{_ATTENTION}/out/kernel", "out_proj.weight", "NHD", "D NH"),
    Row(f"{_ATTENTION}/out/bias", "out_proj.bias", "D", "D"),
    Row("LayerNorm_1/scale", "mlp_norm.weight", "D", "D"),
    Row("LayerNorm_1/bias", "mlp_norm.bias", "D", "D"),
    Row("MlpBlock_0/Dense_0/kernel", "up_proj.weight", "DM", "M D"),
    Row("MlpBlock_0/Dense_0/bias", "up_proj.bias", "M", "M"),
    Row("MlpBlock_0/Dense_1/kernel", "down_proj.weight", "MD", "D M"),
    Row("MlpBlock_0/Dense_1/bias", "down_proj.bias", "D", "D"),
)

# `{e}` is empty for the first expert and `_1` for the second. Where every head has keys and values of its own, the
# reference keeps queries, keys and values in one array; else queries apart.
EXPERT_LAYER = (
    Row("attn/q_einsum{e}/w", "q_proj.weight", "NDH", "NH D"),
    Row("attn/kv_einsum{e}/w", "k_proj.weight|v_proj.weight", "GDH", "GH D"),
    Row("attn/qkv_einsum{e}/w", "q_proj.weight|k_proj.weight|v_proj.weight", "NDH", "NH D"),
    Row("attn/attn_vec_einsum{e}/w", "out_proj.weight", "NHD", "D NH"),
    Row("mlp{e}/gating_einsum", "mlp.gate_proj.weight|mlp.up_proj.weight", "DM", "M D"),
    Row("mlp{e}/linear", "mlp.down_proj.weight", "MD", "D M"),
)
# The updates beside them (`manipi.model.layers`), attention first. R is the rank.
ATTENTION_LORA = (
    Row("attn/q_einsum{e}/lora_a", "q_proj.lora_a", "NDR", "NR D"),
    Row("attn/q_einsum{e}/lora_b", "q_proj.lora_b", "NRH", "N H R"),
    Row("attn/kv_einsum{e}/lora_a", "k_proj.lora_a|v_proj.lora_a", "GDR", "GR D"),
    Row("attn/kv_einsum{e}/lora_b", "k_proj.lora_b|v_proj.lora_b", "GRH", "G H R"),
    Row("attn/qkv_einsum{e}/lora_a", "q_proj.lora_a|k_proj.lora_a|v_proj.lora_a", "NDR", "NR D"),
    Row("attn/qkv_einsum{e}/lora_b", "q_proj.lora_b|k_proj.lora_b|v_proj.lora_b", "NRH", "N H R"),
    Row("attn/attn_vec_einsum{e}/lora_a", "out_proj.lora_a", "NHR", "R NH"),
    Row("attn/attn_vec_einsum{e}/lora_b", "out_proj.lora_b", "NRD", "N D R"),
)
FEED_FORWARD_LORA = (
    Row("mlp{e}/gating_einsum_lora_a", "mlp.gate_proj.lora_a|mlp.up_proj.lora_a", "DR", "R D"),
    Row("mlp{e}/gating_einsum_lora_b", "mlp.gate_proj.lora_b|mlp.up_proj.lora_b", "RM", "1 M R"),
    Row("mlp{e}/linear_lora_a", "mlp.down_proj.lora_a", "MR", "R M"),
    Row("mlp{e}/linear_lora_b", "mlp.down_proj.lora_b", "RD", "1 D R"),
)
_NORM = (Row("scale", "scale", "D", "D"),)
_ADAPTIVE_NORM = (
    Row("Dense_0/kernel", "modulation.weight", "DE", "E D"),
    Row("Dense_0/bias", "modulation.bias", "E", "E"),
)

LLM = (Row("embedder/input_embedding", "token_embedding", "VD", "V D"),)

FLOW = (
    Row("action_in_proj/kernel", "action_in.weight", "AD", "D A"),
    Row("action_in_proj/bias", "action_in.bias", "D", "D"),
    Row("action_out_proj/kernel", "action_out.weight", "DA", "A D"),
    Row("action_out_proj/bias", "action_out.bias", "A", "A"),
)
PI0 = (
    Row("state_proj/kernel", "state_in.weight", "AD", "D A"),
    Row("state_proj/bias", "state_in.bias", "D", "D"),
    Row("action_time_mlp_in/kernel", "time_mlp_in.weight", "ED", "D E"),
    Row("action_time_mlp_in/bias", "time_mlp_in.bias", "D", "D"),
    Row("action_time_mlp_out/kernel", "time_mlp_out.weight", "DF", "F D"),
    Row("action_time_mlp_out/bias", "time_mlp_out.bias", "D", "D"),
)
PI05 = (
    Row("time_mlp_in/kernel", "time_mlp_in.weight", "DF", "F D"),
    Row("time_mlp_in/bias", "time_mlp_in.bias", "D", "D"),
    Row("time_mlp_out/kernel", "time_mlp_out.weight", "DF", "F D"),
    Row("time_mlp_out/bias", "time_mlp_out.bias", "D", "D"),
)


class Array(NamedTuple):
    """One array of the reference's tree, resolved for a config."""

    names: tuple[tuple[str, ...], ...]
    """Our tensors, [layer][part]: one layer where nothing is stacked, several parts where a pair or triple is."""
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    """Sizes of one layer and part in the reference."""
    permutation: tuple[int, ...]
    """From the reference's axes to the order of ours."""
    our_shape: tuple[int, ...]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Of one layer in the reference; the parts, where there are several, stand first."""
        return (() if len(self.names[0]) == 1 else (len(self.names[0]),)) + self.axes


def openpi_arrays(config: ModelConfig) -> dict[str, Array]:
    """Every array that the reference has for this config, by tree path."""
    v, vlm = config.vision, config.vlm
    sizes = {"D": v.width, "N": v.num_heads, "H": v.width // v.num_heads, "M": v.mlp_dim, "O": vlm.width}
    sizes |= {"P": v.patch_size, "Q": v.patch_size, "C": 3, "1": 1, "T": v.num_tokens}
    encoder, vision_block = "PaliGemma/img/Transformer/encoderblock/", "vision.blocks.{layer}."
    tree = dict(_resolve(VISION, "PaliGemma/img/", "vision.", sizes))
    tree |= _resolve(VISION_BLOCK, encoder, vision_block, sizes, v.depth)
    tree |= _resolve(LLM, "PaliGemma/llm/", "gemma.", {"V": config.vocab_size, "D": vlm.width})
    tree |= _expert(vlm, config.vlm_adapters, "vlm", "", _NORM)
    if not isinstance(config, Pi0FastConfig):
        pi0, width = isinstance(config, Pi0Config), config.action_expert.width
        norm = _NORM if pi0 else _ADAPTIVE_NORM
        tree |= _expert(config.action_expert, config.action_adapters, "action", "_1", norm)
        sizes = {"A": config.action_dim, "D": width, "F": width, "E": 2 * width}
        tree |= _resolve(FLOW + (PI0 if pi0 else PI05), "", "head.", sizes)
    return tree


def _expert(
    size: GemmaSize, adapters: Adapters, name: str, suffix: str, norm: tuple[Row, ...]
) -> Iterator[tuple[str, Array]]:
    sizes = {"D": size.width, "E": 3 * size.width, "M": size.mlp_dim}
    sizes |= {"N": size.num_heads, "G": size.num_kv_heads, "H": size.head_dim, "1": 1}
    theirs, ours = "PaliGemma/llm/layers/", f"gemma.blocks.{{layer}}.experts.{name}."
    absent = "attn/q_einsum attn/kv_einsum" if size.num_heads == size.num_kv_heads else "attn/qkv_einsum"
    updates = ((ATTENTION_LORA, adapters.attention), (FEED_FORWARD_LORA, adapters.feed_forward))
    for rows, rank in ((EXPERT_LAYER, 0), *((rows, lora.rank) for rows, lora in updates if lora is not None)):
        present = [row for row in rows if not row.reference.startswith(tuple(absent.split()))]
        named = tuple(row._replace(reference=row.reference.format(e=suffix)) for row in present)
        yield from _resolve(named, theirs, ours, sizes | {"R": rank}, size.depth)
    yield from _resolve(norm, f"{theirs}pre_attention_norm{suffix}/", f"{ours}attention_norm.", sizes, size.depth)
    yield from _resolve(norm, f"{theirs}pre_ffw_norm{suffix}/", f"{ours}mlp_norm.", sizes, size.depth)
    yield from _resolve(norm, f"PaliGemma/llm/final_norm{suffix}/", f"gemma.final_norms.{name}.", sizes)


def _resolve(
    rows: tuple[Row, ...], theirs: str, ours: str, sizes: Mapping[str, int], depth: int | None = None
) -> Iterator[tuple[str, Array]]:
    for row in rows:
        parts, groups = row.ours.split("|"), row.order.split()
        stacked = (() if depth is None else (depth,)) + ((len(parts),) if len(parts) > 1 else ())
        axes = tuple(sizes[axis] for axis in row.axes)
        yield (
            theirs + row.reference,
            Array(
                names=tuple(tuple(ours.format(layer=i) + part for part in parts) for i in range(depth or 1)),
                shape=stacked + axes,
                axes=axes,
                # An axis that only ours have is of size 1.
                permutation=tuple(row.axes.index(a) for group in groups for a in group if a in row.axes),
                our_shape=tuple(math.prod(sizes[axis] for axis in group) for group in groups),
            ),
        )


def unstack_layer(array: Array, layer: int, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Our tensors from one layer of a reference's array."""
    for name, part in zip(array.names[layer], values.reshape(len(array.names[layer]), *array.axes), strict=True):
        # A copy of its own, so that no two tensors share memory.
        ours = part.permute(array.permutation).clone(memory_format=torch.contiguous_format)
        yield name, ours.reshape(array.our_shape)


def stack_layer(array: Array, layer: int, state: Mapping[str, Tensor]) -> Tensor:
    """One layer of a reference's array [(parts,) *axes] from our tensors, in their dtype."""
    ordered = [array.axes[axis] for axis in array.permutation]
    inverse = np.argsort(array.permutation).tolist()
    parts = [state[name].reshape(ordered).permute(inverse) for name in array.names[layer]]
    return torch.stack(parts).reshape(array.layer_shape)


def to_torch(values: np.ndarray) -> Tensor:
    """The same memory as a tensor, bfloat16 included."""
    if values.dtype.name == "bfloat16":  # numpy has none of its own; extensions register it under this name
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def require_match(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    unused: Container[str] = (),
) -> None:
    """Every array accounted for.

    Raises:
        WeightsMismatchError: names that are missing, unexpected (and not `unused`) or mis-shaped; it lists all of them.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(name for name in found.keys() - expected.keys() if name not in unused)
    shapes = [f"{k} {found[k]} instead of {expected[k]}" for k in expected if k in found and found[k] != expected[k]]
    if missing or unexpected or shapes:
        raise WeightsMismatchError(
            expected=f"{len(expected)} arrays with the names and shapes of the config",
            found=f"missing {missing}; unexpected {unexpected}; mis-shaped {shapes}",
            where=where,
            next="check that the config has the type and sizes of the checkpoint, and that the copy is complete",
        )
