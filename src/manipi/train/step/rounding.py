"""Training in bfloat16 alone: AdamW whose results are rounded up or down at random.

bfloat16 has 8 significant bits. An update of less than 1/512 of a weight would be lost every time if it were rounded
to the nearest; rounded up with the probability of the fraction that is cut off, it survives on average:

    float32    s eeeeeeee mmmmmmm ffffffffffffffff     + 16 random bits, then the last 16 are cut off
    bfloat16   s eeeeeeee mmmmmmm

(Stochastic rounding: Gupta et al. 2015, "Deep learning with limited numerical precision".)
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from manipi.data.feed.sampler import random_bits
from manipi.model.shards import local

CHUNK = 2**24
"""Numbers that are updated at once: they bound the float32 copies."""


def round_stochastically(values: Tensor, generator: Generator) -> Tensor:
    """float32 to bfloat16, up or down at random; the mean of many results is the value.

    What bfloat16 has already stays as it is, and so do infinities and NaN.
    """
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return noise.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's rounding: with it, nothing about it has to be saved.

    A hash, and so no seed of the step's noise, of its delays, or of another step's.
    """
    return random_bits(f"rounding/{seed}/{step}").random_raw() % 2**63


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) of bfloat16 weights and moments, computed in float32 and rounded at random.

    Args:
        seed: the random bits are a function of it and of the number of steps done.
    """

    grad_scale: Tensor | None = None
    """What gradients are divided by on their way."""

    def __init__(
        self, params: Any, lr: float, *, betas: tuple[float, float], eps: float, weight_decay: float, seed: int
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        generators: dict[torch.device, Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                step, device = int(state["step"]), parameter.device
                if device not in generators:
                    generators[device] = Generator(device).manual_seed(step_seed(self._seed, step))
                state["step"] += 1
                for part in _chunks(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]):
                    self._update(part, group, step + 1, generators[device])

    def _update(self, part: tuple[Tensor, ...], group: dict[str, Any], step: int, generator: Generator) -> None:
        (weight, grad, mean, square), (beta1, beta2), lr = part, group["betas"], group["lr"]
        g = grad.float() if self.grad_scale is None else grad.float() / self.grad_scale
        m, v = mean.float().lerp_(g, 1 - beta1), square.float().lerp_(g.square(), 1 - beta2)
        denominator = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
        w = weight.float().mul_(1 - lr * group["weight_decay"])
        w.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
        for stored, value in ((weight, w), (mean, m), (square, v)):
            stored.copy_(round_stochastically(value, generator))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal parts of the tensors, flat; of sharded ones, the part that is here."""
    yield from zip(*(local(t).view(-1).split(CHUNK) for t in tensors), strict=True)
