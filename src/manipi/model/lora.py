"""Low-rank updates of linear layers (LoRA, Hu et al. 2021), in the form that the released adapters have.

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
"""

from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from manipi.model.config import LoRA
from manipi.model.layers import Linear
from manipi.model.nf4 import NF4Matrix

Bottleneck = Literal["per_head", "shared"]


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
