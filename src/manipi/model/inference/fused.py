"""Layers with fused or quantised matrices, and a cache of fixed size.

    q_proj  k_proj  v_proj   ──▶  one product, and one pass over the input
    gate_proj  up_proj       ──▶  likewise
    modulation of norms      ──▶  rows of a table, by denoising step
    several query heads      ──▶  more rows: one key/value head is read once, never repeated

    cache of a layer   [B, G, ■ prefix ■ ■ | state | actions · · · ]
                                                     └─ overwritten by every denoising step

Nothing is copied where a matrix keeps its dtype: the model's own parameters become views of the fused ones.

Matrices are kept as they are, or in 8 bits:

    kind           weights                      activations                    products
    none           the model's dtype            the compute dtype              torch's own
    int8_weights   int8, one scale per output   the compute dtype              expanded before each product: less memory
    int8           int8, one scale per output   int8, scaled at each product   int8 with int32 sums
    fp8            e4m3, one scale per output   e4m3, one scale per row        a GPU's, compute capability 8.9 or later

Activations of `int8` have a scale per row on a GPU; on a processor one per call, as its kernels take them.

Shape suffixes: B batch, T query tokens, S key tokens, P patches, D width, N query heads, G key/value heads, H head dim;
of matrices R rows, I input features, O output features.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manipi.errors import ConfigError, unknown_name
from manipi.model.attention import Layout, attention_mask, bias_for, chosen
from manipi.model.config import GemmaSize
from manipi.model.gemma import MLP, ExpertLayer, KeysValues, KVCache, RMSNorm, Rotation, rms_norm, rotate
from manipi.model.layers import AdaptedLinear, Linear
from manipi.model.siglip import VisionBlock

Quantization: TypeAlias = Literal["none", "int8_weights", "int8", "fp8"]

MakeMatrix: TypeAlias = Callable[[Tensor, Tensor | None], nn.Module]
"""A weight [O, I] and a bias [O] or None to a module that computes `x Wᵀ + b` in the dtype of x."""

FEWEST_ROWS = 32
"""`torch._int_mm` on a GPU refuses 16 rows and fewer; missing ones are added as zeros."""

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

    def __init__(self, layer: ExpertLayer, make: MakeMatrix, *, attends: bool = True):
        nn.Module.__init__(self)
        self.head_dim = layer.head_dim
        norms = (layer.attention_norm, layer.mlp_norm)
        known = (FixedNorm(n) if isinstance(n, RMSNorm) else StepNorm(number) for number, n in enumerate(norms))
        self.attention_norm, self.mlp_norm = (norm.forward for norm in known)  # as in `ExpertLayer.finish`
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
        if k_BGTH.requires_grad:  # the gradients of a step must not reach into the step before
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


# Matrices -------------------------------------------------------------------------------------------------------------


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


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to compute in for a model of that dtype: float32 on processors that emulate bfloat16, a sixth as fast."""
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if device.type != "cpu" or native else torch.float32


def maker(kind: Quantization, device: torch.device, dtype: torch.dtype) -> MakeMatrix:
    """What makes matrices of that kind on that device.

    Raises:
        ConfigError: an unknown kind, or fp8 on a device that has none.
    """
    if kind not in get_args(Quantization):
        raise unknown_name("quantization", kind, get_args(Quantization), next="choose one of them")
    if kind == "none":
        return lambda weight, bias: Plain(weight, bias, dtype)
    if kind == "int8_weights":
        return Int8Weights
    if kind == "int8":
        return PackedInt8 if device.type == "cpu" else Int8Rows
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            expected="a GPU with fp8 products: compute capability 8.9 or later (Ada, Hopper, Blackwell)",
            found=torch.cuda.get_device_name(device) if device.type == "cuda" else f"device {device.type}",
            where="quantization fp8",
            next="choose int8, which every device has",
        )
    return Float8


class Plain(nn.Module):
    """The matrix in the model's dtype, cast once instead of at every call where that is the dtype of x."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", weight_OI.to(dtype))
        self.register_buffer("bias", None if bias_O is None else bias_O.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    __call__ = forward  # without the hooks of a module, which cost microseconds: a chunk takes hundreds of products


class Coded(nn.Module):
    """A weight in 8 bits, with one scale for each output."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    dtype: ClassVar[torch.dtype] = torch.int8

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None):
        super().__init__()
        codes_OI, scale_O1 = encode(weight_OI, self.dtype)
        self.register_buffer("codes", codes_OI)
        self.register_buffer("scale", scale_O1[:, 0])
        self.register_buffer("bias", None if bias_O is None else bias_O.float())


class Int8Weights(Coded):
    """Half the memory of bfloat16, in the arithmetic of the activations."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.codes.to(x.dtype) * self.scale[:, None].to(x.dtype), bias)


class Int8Rows(Coded):
    """`torch._int_mm` between rows of activations and outputs of the weight, each with a scale of its own."""

    def forward(self, x: Tensor) -> Tensor:
        codes_RI, scale_R1 = encode(x.flatten(0, -2), self.dtype)
        rows = len(codes_RI)
        codes_RI = F.pad(codes_RI, (0, 0, 0, max(FEWEST_ROWS - rows, 0)))
        sums_RO = torch.ops.aten._int_mm(codes_RI, self.codes.t())[:rows]
        y_RO = sums_RO * scale_R1 * self.scale
        return (y_RO if self.bias is None else y_RO + self.bias).to(x.dtype).unflatten(0, x.shape[:-1])


class PackedInt8(nn.Module):
    """oneDNN's int8 product for processors, with one scale and zero point for all activations of a call.

    Without VNNI pairs of products are summed in 16 bits, which hold 7 bits of an activation times 8 of a weight.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None):
        super().__init__()
        codes_OI, scale_O1 = encode(weight_OI, torch.int8)
        self.register_buffer("codes", torch.ops.onednn.qlinear_prepack(codes_OI, None), persistent=False)
        self._scale, self._bias = scale_O1[:, 0].contiguous(), None if bias_O is None else bias_O.float()
        self._zero = torch.zeros_like(self._scale, dtype=torch.int32)
        self._levels = 255 if torch.cpu._is_vnni_supported() else 127

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        low, high = (float(edge) for edge in x32.aminmax())
        low, high = min(low, 0.0), max(high, 1e-12)
        scale = (high - low) / self._levels
        zero = round(-low / scale)
        codes = (x32 / scale).add_(zero).round_().clamp_(0, self._levels).to(torch.uint8)
        # Sums in float32 out of the kernel: its bfloat16 output is a thousand times slower without AVX-512.
        weights, output = (self.codes, self._scale, self._zero), (1.0, 0, torch.float32, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise(codes, scale, zero, *weights, self._bias, *output).to(x.dtype)


class Float8(Coded):
    """`torch._scaled_mm` in e4m3, with scales per row and per output."""

    dtype = torch.float8_e4m3fn

    def forward(self, x: Tensor) -> Tensor:
        codes_RI, scale_R1 = encode(x.flatten(0, -2), self.dtype)
        y_RO = torch.ops.aten._scaled_mm(codes_RI, self.codes.t(), scale_R1, self.scale[None], out_dtype=torch.bfloat16)
        y_RO = y_RO if self.bias is None else y_RO + self.bias.to(y_RO.dtype)
        return y_RO.to(x.dtype).unflatten(0, x.shape[:-1])


def encode(x_RI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [R, I] in int8 or e4m3 and scales float32 [R, 1], symmetric around zero: `x ≈ codes · scale`."""
    largest = torch.finfo(dtype).max if dtype.is_floating_point else 127.0
    scale_R1 = x_RI.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / largest
    scaled_RI = x_RI.float() / scale_R1
    return (scaled_RI if dtype.is_floating_point else scaled_RI.round()).to(dtype), scale_R1
