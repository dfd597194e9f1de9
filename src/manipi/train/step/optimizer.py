"""The update: learning-rate schedule, AdamW or SGD, clipping, and the average of the weights.

What touches every weight goes over memory as seldom as torch allows: once over the gradients for their norm, once
through the fused AdamW, which scales them on its way, and once for the average.

Of training in bfloat16 alone, AdamW's results are rounded up or down at random. bfloat16 has 8 significant bits. An
update of less than 1/512 of a weight would be lost every time if it were rounded to the nearest; rounded up with the
probability of the fraction that is cut off, it survives on average:

    float32    s eeeeeeee mmmmmmm ffffffffffffffff     + 16 random bits, then the last 16 are cut off
    bfloat16   s eeeeeeee mmmmmmm

(Stochastic rounding: Gupta et al. 2015, "Deep learning with limited numerical precision".)
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from manipi.data.feed.sampler import random_bits
from manipi.model.device import global_norm, local
from manipi.train.config import OptimizerConfig

Groups = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
"""Parameters, or torch's parameter groups, whose `lr_scale` multiplies the learning rate."""


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Learning rate of the 0-based `step`: linear from peak/(warmup+1) to peak, then the schedule's decay."""
    if step < config.warmup_steps:
        start = config.lr / (config.warmup_steps + 1)
        return start + (config.lr - start) * step / config.warmup_steps
    if config.schedule == "rsqrt":
        return config.lr / math.sqrt(1 + (step - config.warmup_steps) / config.timescale)
    length = max(1, config.decay_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / length)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(parameters: Groups, config: OptimizerConfig, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW has decoupled weight decay on every parameter, and SGD has none, as in the reference.

    Args:
        seed: for parameters in bfloat16, whose updates are rounded at random.
    """
    if config.kind == "sgd":
        # Not the fused one: it has no rule for sharded parameters.
        return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, nesterov=config.nesterov, foreach=True)
    betas = (config.beta1, config.beta2)
    settings: dict[str, Any] = {"betas": betas, "eps": config.eps, "weight_decay": config.weight_decay}
    groups: list[Any] = list(parameters)
    first = next(p for one in groups for p in (one["params"] if isinstance(one, dict) else [one]))
    if config.state_bits == 8:
        return _adamw_8bit(groups, config.lr, seed, **settings)
    if first.dtype == torch.bfloat16:
        return StochasticAdamW(groups, config.lr, seed=seed, **settings)
    return torch.optim.AdamW(groups, config.lr, fused=True, **settings)


def _adamw_8bit(groups: list[Any], lr: float, seed: int, **settings: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit  # type: ignore[reportMissingImports]

    class SeededAdamW8bit(AdamW8bit):
        """torchao's, which rounds weights in bfloat16 at random, from torch's own generator."""

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            first = self.param_groups[0]["params"][0]
            # torchao compiles the update; without a GPU that takes a C++ compiler and longer than it saves.
            stance = torch.compiler.set_stance("default" if first.is_cuda else "force_eager")
            with stance, torch.random.fork_rng([first.device] if first.is_cuda else []):
                torch.manual_seed(step_seed(seed, int(self.state[first]["step"]) if self.state else 0))
                super().step()

    return SeededAdamW8bit(groups, lr, bf16_stochastic_round=True, **settings)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Global L2 norm of the gradients, over all shards. Sparse ones are coalesced for good."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad.values())
        elif parameter.grad is not None:
            gradients.append(parameter.grad)
    return global_norm(gradients)


def clip_scale(norm: Tensor, config: OptimizerConfig) -> Tensor | None:
    """What gradients of this norm are divided by, so that their norm is `clip_norm` at most; None: nothing."""
    return ((norm + 1e-6) / config.clip_norm).clamp(min=1.0) if config.clip_norm else None


def update(optimizer: torch.optim.Optimizer, step: int, config: OptimizerConfig, norm: Tensor) -> None:
    """Step with the learning rate of the 0-based `step` and gradients clipped from their `norm`, then clear them."""
    set_rate(optimizer, learning_rate(step, config))
    scale = clip_scale(norm, config)
    if isinstance(optimizer, (torch.optim.AdamW, StochasticAdamW)):
        optimizer.grad_scale = scale  # type: ignore[reportAttributeAccessIssue] (what torch's GradScaler sets)
    elif scale is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], scale)  # type: ignore[reportPrivateImportUsage]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set each group's learning rate to its multiple of `rate`."""
    for group in optimizer.param_groups:
        scaled = rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


@torch.no_grad()
def update_average(average: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """ema = decay * ema + (1 - decay) * parameters, in place. The average is float32, whatever the parameters are."""
    if all(p.dtype == torch.float32 for p in parameters):
        torch._foreach_lerp_(list(average), list(parameters), 1 - decay)  # type: ignore[reportPrivateImportUsage]
        return
    for mean, parameter in zip(average, parameters, strict=True):
        mean.lerp_(parameter.to(mean.dtype), 1 - decay)


def parameter_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm over all matrices; vectors such as biases and norm scales do not count."""
    return global_norm([p for p in parameters if p.ndim > 1])


# Rounding at random ---------------------------------------------------------------------------------------------------


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
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                # Flat; of sharded ones, the part that is here.
                for part in zip(*(local(t).view(-1).split(CHUNK) for t in tensors), strict=True):
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
