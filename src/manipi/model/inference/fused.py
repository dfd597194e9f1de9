"""Layers as an engine runs them: matrices with the same input are one, and keys and values go into a fixed cache.

    q_proj  k_proj  v_proj   ──▶  qkv          one product, and one pass over the input
    gate_proj  up_proj       ──▶  gate_up
    several query heads      ──▶  more rows    one key/value head is read once, never repeated

    cache of a layer   [B, G, ■ prefix ■ ■ | state | actions · · · ]
                                                     └─ overwritten by every denoising step

Nothing is copied where a matrix keeps its dtype: the model's own parameters become views of the fused ones.

Shape suffixes: B batch, T query tokens, S key tokens, P patches, D width, N query heads, G key/value heads, H head dim.
"""

from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manipi.model.gemma import MLP, ExpertLayer, rotate
from manipi.model.inference.quantize import MakeMatrix, Plain
from manipi.model.layers import Linear
from manipi.model.lora import AdaptedLinear
from manipi.model.siglip import VisionBlock


class Norm(NamedTuple):
    """An RMS norm with its modulation known: `x / rms(x) · factor + shift`, and the gate of the residual after it.

    Each is [D], or [B, T, D] where tokens differ.
    """

    factor: Tensor
    shift: Tensor | None = None
    gate: Tensor | None = None

    def __call__(self, x_BTD: Tensor) -> Tensor:
        shared = self.factor.ndim == 1
        normed = F.rms_norm(x_BTD, x_BTD.shape[-1:], self.factor if shared else None, eps=1e-6)
        normed = normed if shared else normed * self.factor
        return normed if self.shift is None else normed + self.shift

    def residual(self, x_BTD: Tensor, update_BTD: Tensor) -> Tensor:
        return x_BTD + (update_BTD if self.gate is None else update_BTD * self.gate)


class Slots(NamedTuple):
    """One layer's keys and values [B, G, S, H], in the dtype to compute in: room for the whole sequence."""

    keys: Tensor
    values: Tensor


class Place(NamedTuple):
    """Where a run of tokens stands; the same for all layers."""

    start: int
    """Slot of the first token; the tokens see all slots up to their own last one."""
    rope: tuple[Tensor, Tensor]
    """[B, T, 1, H/2]."""
    bias: Tensor | None
    """Added to the logits [B, 1 or G, 1 or T·N/G, S]; None where everything is seen."""


LayerNorms: TypeAlias = tuple[Norm, Norm]
"""Before attention and before the MLP."""


class FusedVisionLayer(nn.Module):
    """`VisionBlock` with one matrix for queries, keys and values."""

    def __init__(self, block: VisionBlock, make: MakeMatrix):
        super().__init__()
        self.num_heads = block.num_heads
        self.attention_norm, self.mlp_norm = block.attention_norm, block.mlp_norm
        self.qkv = fuse(make, block.q_proj, block.k_proj, block.v_proj)
        self.out, self.up, self.down = (fuse(make, one) for one in (block.out_proj, block.up_proj, block.down_proj))

    def forward(self, x_BPD: Tensor, dtype: torch.dtype) -> Tensor:
        qkv = self.qkv(self.attention_norm(x_BPD).to(dtype)).unflatten(-1, (3, self.num_heads, -1))
        attended_BNPH = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        x_BPD = x_BPD + self.out(attended_BNPH.transpose(1, 2).flatten(-2))
        return x_BPD + self.down(F.gelu(self.up(self.mlp_norm(x_BPD).to(dtype)), approximate="tanh"))


class FusedLayer(nn.Module):
    """`ExpertLayer` with two fused matrices, over a fixed cache."""

    def __init__(self, layer: ExpertLayer, make: MakeMatrix):
        super().__init__()
        self.head_dim = layer.head_dim
        self.sizes = [one.out_features for one in (layer.q_proj, layer.k_proj, layer.v_proj)]
        self.qkv = fuse(make, layer.q_proj, layer.k_proj, layer.v_proj)
        self.out = fuse(make, layer.out_proj)
        mlp = cast(MLP, layer.mlp)
        self.gate_up, self.down = fuse(make, mlp.gate_proj, mlp.up_proj), fuse(make, mlp.down_proj)

    def forward(self, x_BTD: Tensor, slots: Slots, place: Place, norms: LayerNorms, row_B: Tensor | None) -> Tensor:
        """The tokens [B, T, D] after this layer, whose keys and values are in their slots now.

        Args:
            row_B: the only token of each row whose result is wanted, which makes it [B, 1, D]; None: all.
        """
        dtype = slots.keys.dtype
        q, k, v = self.qkv(norms[0](x_BTD).to(dtype)).unflatten(-1, (-1, self.head_dim)).split(self._heads(), dim=2)
        end, rope = write(slots, place, k, v), place.rope
        if row_B is not None:
            each_B = torch.arange(len(row_B), device=row_B.device)
            x_BTD, q, *rope = (t[each_B, row_B][:, None] for t in (x_BTD, q, *rope))
        attended = attend(rotate(q, (rope[0], rope[1])), slots.keys[:, :, :end], slots.values[:, :, :end], place.bias)
        x_BTD = norms[0].residual(x_BTD, self.out(attended))
        gate, up = self.gate_up(norms[1](x_BTD).to(dtype)).chunk(2, dim=-1)
        return norms[1].residual(x_BTD, self.down(F.gelu(gate, approximate="tanh") * up))

    def _heads(self) -> list[int]:
        return [size // self.head_dim for size in self.sizes]


class KeysValuesLayer(nn.Module):
    """What a flow policy reads of its language model's last layer: keys and values, no queries, no MLP."""

    def __init__(self, layer: ExpertLayer, make: MakeMatrix):
        super().__init__()
        self.head_dim = layer.head_dim
        self.kv = fuse(make, layer.k_proj, layer.v_proj)

    def forward(self, x_BTD: Tensor, slots: Slots, place: Place, norms: LayerNorms, row_B: Tensor | None) -> Tensor:
        """Fills the slots; the tokens are as they came."""
        k, v = self.kv(norms[0](x_BTD).to(slots.keys.dtype)).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        write(slots, place, k, v)
        return x_BTD


def write(slots: Slots, place: Place, k_BTGH: Tensor, v_BTGH: Tensor) -> int:
    """Rotated keys, and values, into their slots. Returns the slot after them."""
    end = place.start + k_BTGH.shape[1]
    slots.keys[:, :, place.start : end] = rotate(k_BTGH, place.rope).transpose(1, 2)
    slots.values[:, :, place.start : end] = v_BTGH.transpose(1, 2)
    return end


def attend(q_BTNH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, bias: Tensor | None) -> Tensor:
    """Attention [B, T, N·H] in which the query heads of one key head are rows behind each other."""
    b, t, n, h = q_BTNH.shape
    g = k_BGSH.shape[1]
    rows = q_BTNH.unflatten(2, (g, n // g)).transpose(1, 2).reshape(b, g, t * (n // g), h)
    attended = F.scaled_dot_product_attention(rows, k_BGSH, v_BGSH, attn_mask=bias)
    return attended.unflatten(2, (t, n // g)).transpose(1, 2).reshape(b, t, n * h)


@torch.no_grad()
def fuse(make: MakeMatrix, *layers: Linear) -> nn.Module:
    """One matrix for layers that read the same input: their outputs stand behind each other."""
    weight = torch.cat([_matrix(layer) for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    fused = make(weight, bias)
    if isinstance(fused, Plain) and fused.weight.dtype == layers[0].weight.dtype:
        parts = fused.weight.split([layer.out_features for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            if not isinstance(layer, AdaptedLinear):
                layer.weight.data = part
    return fused


def _matrix(layer: Linear) -> Tensor:
    return layer.merged() if isinstance(layer, AdaptedLinear) else layer.weight.detach()
