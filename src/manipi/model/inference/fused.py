"""The network's layers with fused or quantised matrices, and a cache of fixed size.

    q_proj  k_proj  v_proj   ──▶  one product, and one pass over the input
    gate_proj  up_proj       ──▶  likewise
    modulation of norms      ──▶  rows of a table, by denoising step
    several query heads      ──▶  more rows: one key/value head is read once, never repeated

    cache of a layer   [B, G, ■ prefix ■ ■ | state | actions · · · ]
                                                     └─ overwritten by every denoising step

Nothing is copied where a matrix keeps its dtype: the model's own parameters become views of the fused ones.

Shape suffixes: B batch, T query tokens, S key tokens, P patches, D width, N query heads, G key/value heads, H head dim.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from manipi.model.attention import Layout, attention_mask, bias_for, chosen
from manipi.model.config import GemmaSize
from manipi.model.gemma import MLP, ExpertLayer, KeysValues, KVCache, RMSNorm, Rotation, rms_norm, rotate
from manipi.model.inference.quantize import MakeMatrix, Plain
from manipi.model.layers import AdaptedLinear, Linear
from manipi.model.siglip import VisionBlock

Module = TypeVar("Module", bound=nn.Module)


def twin(module: Module, **children: nn.Module) -> Module:
    """The module with some other children; everything else is shared."""
    other = copy.copy(module)
    other._modules = {**module._modules, **children}
    return other


class FusedVisionBlock(VisionBlock):
    """`VisionBlock` with one matrix for queries, keys and values."""

    def __init__(self, block: VisionBlock, make: MakeMatrix):
        nn.Module.__init__(self)
        self.num_heads = block.num_heads
        self.attention_norm, self.mlp_norm = block.attention_norm, block.mlp_norm
        self.fused = fuse(make, block.q_proj, block.k_proj, block.v_proj)
        self.out_proj, self.up_proj, self.down_proj = (
            fuse(make, one) for one in (block.out_proj, block.up_proj, block.down_proj)
        )

    def qkv(self, x_BPD: Tensor) -> Sequence[Tensor]:
        return self.fused(x_BPD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class FusedMLP(MLP):
    """`MLP` with one matrix before the gate."""

    def __init__(self, mlp: MLP, make: MakeMatrix):
        nn.Module.__init__(self)
        self.fused, self.down_proj = fuse(make, mlp.gate_proj, mlp.up_proj), fuse(make, mlp.down_proj)

    def gate_up(self, x_BTD: Tensor) -> Sequence[Tensor]:
        return self.fused(x_BTD).chunk(2, dim=-1)


class FusedExpertLayer(ExpertLayer):
    """`ExpertLayer` with two fused matrices.

    Args:
        attends: without, the layer makes keys and values only, as the last one of a flow policy's language model.
    """

    def __init__(self, layer: ExpertLayer, make: MakeMatrix, norms: Sequence[nn.Module], *, attends: bool = True):
        nn.Module.__init__(self)
        self.head_dim, self.attends = layer.head_dim, attends
        self.attention_norm, self.mlp_norm = (norm.forward for norm in norms)  # as in `ExpertLayer.finish`
        self.fused = fuse(make, *(layer.q_proj, layer.k_proj, layer.v_proj)[not attends :])
        keys, queries = (one.out_features // layer.head_dim for one in (layer.k_proj, layer.q_proj))
        self.heads = [queries if attends else 0, keys]
        if attends:
            self.out_proj, self.mlp = fuse(make, layer.out_proj), FusedMLP(layer.mlp, make)

    def qkv(self, x_BTD: Tensor, wanted: int | Tensor, rope: Rotation) -> tuple[Tensor | None, Tensor, Tensor]:
        made_BTXH = self.fused(x_BTD).view(*x_BTD.shape[:2], -1, self.head_dim)
        turned, v = made_BTXH.split_with_sizes([sum(self.heads), self.heads[1]], dim=2)
        q, k = rotate(turned, rope).split_with_sizes(self.heads, dim=2)
        return chosen(q, wanted) if isinstance(wanted, Tensor) or wanted else None, k, v


class StepConditioning(NamedTuple):
    """Of one denoising step: what modulates each norm, from a table."""

    rows: Sequence[Tensor]
    """Factor, shift and gate of one norm after the other: [D], or [B, T, D] where tokens differ."""

    def of_layer(self, index: int) -> Sequence[Tensor]:
        return self.rows[6 * index : 6 * index + 6]


class FixedNorm(nn.Module):
    """`RMSNorm` whose factor is known."""

    factor: Tensor

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.register_buffer("factor", 1 + norm.scale.detach().float())

    def forward(self, x_BTD: Tensor, cond: None) -> tuple[Tensor, None]:
        return rms_norm(x_BTD, self.factor), None


class StepNorm(nn.Module):
    """`AdaptiveRMSNorm` whose modulation is known: the first or the second norm of a layer."""

    def __init__(self, number: int):
        super().__init__()
        self.first = 3 * number

    def forward(self, x_BTD: Tensor, cond: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        factor, shift, gate = cond[self.first : self.first + 3]
        return rms_norm(x_BTD, factor, shift), gate


class Slots(NamedTuple):
    """One layer's part of a `StaticCache`, for one span of tokens."""

    keys_BGSH: Tensor
    values_BGSH: Tensor
    filled: int
    """Slots that are taken; the tokens see these and their own."""

    def then(self, k_BGTH: Tensor, v_BGTH: Tensor, *, insulate: bool) -> KeysValues:
        """Writes them behind what is there, and returns all of it without a copy."""
        (keys, values, filled), added = self, k_BGTH.shape[2]
        if torch.is_grad_enabled():  # the gradients of a step must not reach into the step before
            before = KeysValues(keys.narrow(2, 0, filled), values.narrow(2, 0, filled))
            return before.then(k_BGTH, v_BGTH, insulate=insulate)
        keys.narrow(2, filled, added).copy_(k_BGTH)
        values.narrow(2, filled, added).copy_(v_BGTH)
        if filled + added == keys.shape[2]:
            return KeysValues(keys, values)
        return KeysValues(keys.narrow(2, 0, filled + added), values.narrow(2, 0, filled + added))


@dataclass(kw_only=True)
class StaticCache(KVCache):
    """A `KVCache` of fixed size: no span makes it grow, and what is not committed the next span overwrites.

    No mask has queries times keys elements: a key is seen by all queries of a block or by none, so that one row of
    biases says it all.
    """

    slots: list[tuple[Tensor, Tensor]]
    """Keys and values [B, G, S, H], by layer."""
    groups: int
    """Query heads that share a key head."""
    heads_as_rows: ClassVar[bool] = True

    @classmethod
    def of_size(cls, size: GemmaSize, batch_size: int, length: int, like: Tensor) -> "StaticCache":
        """An empty one, in the dtype and on the device of `like`."""
        shape = (batch_size, size.num_kv_heads, length, size.head_dim)
        slots = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(size.depth)]
        return cls(slots=slots, groups=size.num_heads // size.num_kv_heads)

    def past(self, index: int) -> Slots:
        return Slots(*self.slots[index], self.layouts[-1].end if self.layouts else 0)

    def keep(self, index: int, so_far: KeysValues) -> None:
        """It is there already."""

    def mask(self, query: Layout, key: Layout, dtype: torch.dtype) -> Tensor:
        if query.one_block:
            return bias_for(key.valid[:, None], dtype)
        return bias_for(attention_mask(query, key), dtype).repeat_interleave(self.groups, dim=2)

    def repeated(self, times: int) -> "StaticCache":
        """Each row so many times, behind each other."""
        if times == 1:
            return self
        repeat = partial(torch.repeat_interleave, repeats=times, dim=0)
        slots = [(repeat(keys), repeat(values)) for keys, values in self.slots]
        return replace(self, slots=slots, layouts=tuple(one.map(repeat) for one in self.layouts))


@torch.no_grad()
def fuse(make: MakeMatrix, *layers: Linear) -> nn.Module:
    """One matrix for layers that read the same input: their outputs stand behind each other."""
    weight = torch.cat([one.merged() if isinstance(one, AdaptedLinear) else one.weight.detach() for one in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    fused = make(weight, bias)
    if isinstance(fused, Plain) and fused.weight.dtype == layers[0].weight.dtype:
        parts = fused.weight.split([layer.out_features for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            if not isinstance(layer, AdaptedLinear):
                layer.weight.data = part
    return fused
