"""The update: learning-rate schedule, AdamW or SGD, clipping, and the average of the weights."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from manipi.model.shards import global_norm
from manipi.train.config import OptimizerConfig


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


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW has decoupled weight decay on every parameter, and SGD has none, as in the reference."""
    if config.kind == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def clip_gradients(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> Tensor:
    """Scale the gradients to a global norm of at most `clip_norm`, if there is one. Returns the norm before that."""
    parameters = list(parameters)
    norm = global_norm([p.grad for p in parameters if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm or math.inf, norm)
    return norm


def update(optimizer: torch.optim.Optimizer, step: int, config: OptimizerConfig) -> None:
    """Step with the learning rate of the 0-based `step`, then clear the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def update_average(average: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """ema = decay * ema + (1 - decay) * parameters, in place."""
    torch._foreach_lerp_(list(average), list(parameters), 1 - decay)  # type: ignore[reportPrivateImportUsage]


def parameter_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm over all matrices; vectors such as biases and norm scales do not count."""
    return global_norm([p for p in parameters if p.ndim > 1])
