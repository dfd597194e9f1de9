"""Frozen matrices in 4 bits: the NF4 of QLoRA (Dettmers et al. 2023), by bitsandbytes.

    weight [out, in]  ──▶  codes uint8 [out · in / 2]: two indices into 16 normal quantiles per byte
                           absmax float32 [out · in / 64]: one factor per block of 64 numbers

A matrix exists in full only while a layer computes, and again in its backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64


class NF4Matrix(nn.Module):
    """A matrix [out, in] in 4 bits; applied to x it is `x Wᵀ`.

    Args:
        weight: the matrix.
        dtype: what it is expanded to, and what a checkpoint holds.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        from bitsandbytes import functional  # type: ignore[reportMissingImports]

        codes, state = functional.quantize_4bit(weight.detach().float().contiguous(), blocksize=BLOCK, quant_type="nf4")
        self.shape, self.dtype = weight.shape, dtype
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("quantiles", state.code, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)  # type: ignore[reportReturnType]

    def expand(self) -> Tensor:
        """The matrix that the codes stand for."""
        from bitsandbytes import functional  # type: ignore[reportMissingImports]

        settings: dict[str, Any] = {"blocksize": BLOCK, "quant_type": "nf4", "dtype": self.dtype}
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
