"""Layers whose parameters keep their own dtype and that compute in the dtype of what flows through them.

Parameters may be float32 masters while activations are bfloat16; no autocast is involved. Norms stand on residual
streams, which are float32: with them, the roundings of one layer do not add up over the next ones.
`init_weights` of each layer is one row of the table in `VLA.init_weights`.
"""

from typing import Protocol, runtime_checkable

from torch import Generator, Tensor, nn
from torch.nn import functional as F


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
