"""Layers: linear ones with low-rank updates or in 4 bits, and the layer norm.

Parameters keep their own dtype, and layers compute in the dtype of what flows through them: parameters may be float32
masters while activations are bfloat16; no autocast is involved. Norms stand on residual streams, which are float32:
with them, the roundings of one layer do not add up over the next ones.
`init_weights` of each layer is one row of the table in `VLA.init_weights`.

Low-rank updates (LoRA, Hu et al. 2021) have the form that the released adapters have:

    x ──────── W ────────┐
    │                    + ──▶ y            y = W x + scale · B A x
    └── A ── B ── scale ─┘

The reference adapts each head of an attention matrix apart, along the head's own two axes (N heads, H head dim,
D width, R rank, I and O the features of an MLP matrix):

                              lora_a        lora_b
    queries, keys, values     [N·R, D]      [N, H, R]     each head has a bottleneck of its own
    attention output          [R, N·H]      [N, D, R]     all heads share one, whose way back is the sum over N
    MLP matrices              [R, I]        [1, O, R]

The attention output's N ways back are redundant, but they are what a checkpoint holds and what an optimizer sees.

Frozen matrices may be in 4 bits, the NF4 of QLoRA (Dettmers et al. 2023), by bitsandbytes:

    weight [out, in]  ──▶  codes uint8 [out · in / 2]: two indices into 16 normal quantiles per byte
                           absmax float32 [out · in / 64]: one factor per block of 64 numbers

A matrix exists in full only while a layer computes, and again in its backward pass.
"""

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from manipi.model.config import LoRA

NF4_BLOCK = 64
"""Numbers of a matrix in 4 bits that share a factor."""

Bottleneck = Literal["per_head", "shared"]


@runtime_checkable
class Initialised(Protocol):
    """A module that fills the parameters that it owns itself, not those of its children."""

    def init_weights(self, generator: Generator | None) -> None: ...


class Linear(nn.Linear):
    """`y = x Wᵀ + b`, with W and b cast to the dtype of x. Adapters replace this class."""

    def reset_parameters(self) -> None:
        """Leaves the memory as it is: `VLA` fills every parameter once, by `init_weights`."""

    def init_weights(self, generator: Generator | None) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class ZeroLinear(Linear):
    """A linear layer that starts at zero: the modulation of an adaptive norm (adaLN-zero, Peebles & Xie 2023)."""

    def init_weights(self, generator: Generator | None) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm, in and out in float32."""

    def reset_parameters(self) -> None:
        """Leaves the memory as it is, like `Linear`."""

    def init_weights(self, generator: Generator | None) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class NF4Matrix(nn.Module):
    """A matrix [out, in] in 4 bits; applied to x it is `x Wᵀ`.

    Args:
        weight: the matrix.
        dtype: what it is expanded to, and what a checkpoint holds.
    """

    codes: Tensor
    absmax: Tensor
    quantiles: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        from bitsandbytes import functional  # type: ignore[reportMissingImports]

        whole = weight.detach().float().contiguous()
        codes, state = functional.quantize_4bit(whole, blocksize=NF4_BLOCK, quant_type="nf4")
        self.shape, self.dtype = weight.shape, dtype
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("quantiles", state.code, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)  # type: ignore[reportReturnType]

    def expand(self) -> Tensor:
        """The matrix that the codes stand for."""
        from bitsandbytes import functional  # type: ignore[reportMissingImports]

        settings: dict[str, Any] = {"blocksize": NF4_BLOCK, "quant_type": "nf4", "dtype": self.dtype}
        state = functional.QuantState(self.absmax, shape=self.shape, code=self.quantiles, **settings)
        return functional.dequantize_4bit(self.codes, state)


class _Product(torch.autograd.Function):
    """`x Wᵀ` that keeps no expanded matrix for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: NF4Matrix) -> Tensor:
        ctx.matrix = matrix
        return F.linear(x, matrix.expand().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.matrix.expand().to(gradient.dtype), None


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, with every matrix in 4 bits expanded under the name that it had."""
    weights = {name: w for name, w in model.state_dict().items() if ".compressed." not in name}
    for name, module in model.named_modules():
        if isinstance(module, NF4Matrix):
            weights[f"{name.removesuffix('.compressed')}.weight"] = module.expand()
    return weights


class AdaptedLinear(Linear):
    """A linear layer without bias, and its low-rank update.

    Args:
        lora: rank and scale.
        num_heads: N of the table above; 1 for a matrix without heads.
        bottleneck: whether the output's heads have one each, or the input's heads share one.
    """

    def __init__(self, in_features: int, out_features: int, lora: LoRA, num_heads: int, bottleneck: Bottleneck):
        super().__init__(in_features, out_features, bias=False)
        per_head = bottleneck == "per_head"
        self.num_heads, self.per_head, self.scale = num_heads, per_head, lora.scale
        self.compressed: NF4Matrix | None = None
        self.lora_a = nn.Parameter(torch.empty(lora.rank * (num_heads if per_head else 1), in_features))
        self.lora_b = nn.Parameter(torch.empty(num_heads, out_features // (num_heads if per_head else 1), lora.rank))

    def init_weights(self, generator: Generator | None) -> None:
        super().init_weights(generator)
        nn.init.normal_(self.lora_a, std=self.in_features**-0.5, generator=generator)
        nn.init.zeros_(self.lora_b)

    def forward(self, input: Tensor) -> Tensor:
        low = F.linear(input, self.lora_a.to(input.dtype))
        if self.per_head:
            low_NR, b_NHR = low.unflatten(-1, (self.num_heads, -1)), self.lora_b.to(input.dtype)
            update = torch.einsum("...nr,nhr->...nh", low_NR, b_NHR).flatten(-2)
        else:
            update = F.linear(low, self._shared_way_back().to(input.dtype))
        base = super().forward(input) if self.compressed is None else self.compressed(input)
        return base + update * self.scale

    def compress(self, dtype: torch.dtype) -> None:
        """Keep the frozen matrix in 4 bits, to be expanded to `dtype`."""
        self.compressed = NF4Matrix(self.weight, dtype)
        del self.weight

    @torch.no_grad()
    def merged(self) -> Tensor:
        """`W + scale · B A` [out, in], in float32: the matrix of a plain layer that computes the same."""
        a, b = self.lora_a.float(), self.lora_b.float()
        if self.per_head:
            update = torch.einsum("nhr,nrd->nhd", b, a.unflatten(0, (self.num_heads, -1))).flatten(0, 1)
        else:
            update = self._shared_way_back() @ a
        return self.weight.float() + self.scale * update

    def _shared_way_back(self) -> Tensor:
        return self.lora_b.float().sum(0)


def linear(
    in_features: int, out_features: int, lora: LoRA | None, num_heads: int = 1, bottleneck: Bottleneck = "per_head"
) -> Linear:
    """A layer without bias: plain, or adapted where there is a `lora`."""
    if lora is None:
        return Linear(in_features, out_features, bias=False)
    return AdaptedLinear(in_features, out_features, lora, num_heads, bottleneck)
