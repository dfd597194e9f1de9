"""One update of the training state."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from manipi.errors import NonFiniteError
from manipi.model import VLA, ModelInput
from manipi.model.config import Pi0FastConfig
from manipi.train.config import TrainConfig
from manipi.train.parallel import ALONE, World
from manipi.train.step.optimizer import gradient_norm, learning_rate, parameter_norm, update, update_average
from manipi.train.step.state import TrainState


def accumulate_gradients(
    model: VLA, inputs: ModelInput, draws: Sequence[Tensor], parts: int, world: World = ALONE
) -> tuple[Tensor, Tensor]:
    """Add the gradients of the batch's loss to those of the parameters, part after part.

    Returns the loss of the whole batch, and that of each sample here [B].

    Args:
        inputs: this process's rows of the batch.
        draws: their noise and timesteps; none for π0-FAST.
        parts: how many follow each other; the rows divide by it.
        world: the processes among whom the batch is shared.
    """
    total = world.total(model.loss_weight(inputs, draws[0].shape[1] if draws else 1)).clamp(min=1)
    loss, samples = torch.zeros((), device=total.device), []
    for part, *drawn in zip(inputs.split(parts), *(draw.chunk(parts) for draw in draws), strict=True):
        found = model(part, *drawn)
        share = found.loss * (found.weight / total)
        # Gradients are averaged over processes, although each has a share of the sum.
        (share * world.size).backward()
        loss += share.detach()
        samples.append(found[1].detach().flatten(1).mean(1) if found[1].ndim > 1 else found[1].detach())
    return world.total(loss), torch.cat(samples)


BETA_ALPHA = 1.5
"""Timesteps follow Beta(1.5, 1): more weight near pure noise (π0 paper, appendix B)."""


def draw_noise(seed: int, step: int, batch: int, draws: int, horizon: int, action_dim: int) -> tuple[Tensor, Tensor]:
    """Noise [B, K, H, A], standard normal, and timesteps [B, K] in [0.001, 1], on the CPU, float32."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    noise = torch.randn(batch, draws, horizon, action_dim, generator=generator)
    uniform = torch.rand(batch, draws, generator=generator)
    # Beta(a, 1) has the distribution function t^a, so a power of a uniform number follows it.
    return noise, uniform ** (1 / BETA_ALPHA) * 0.999 + 0.001


def draw_delay(seed: int, step: int, batch: int, max_delay: int) -> Tensor:
    """How many first steps of each chunk are given, int64 [B], every number from 0 to `max_delay` equally often."""
    # Another generator than that of the noise, which stays as it is without delays.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step + 2**62) % 2**63)
    return torch.randint(max_delay + 1, (batch,), generator=generator)


def require_finite(loss: Tensor, grad_norm: Tensor, sample_loss: Tensor, step: int) -> tuple[float, float]:
    """The loss and the gradient norm as numbers, brought from the device in one copy, for which it is waited.

    To wait here is what leaves the weights as they were: the update has not been queued yet.

    Raises:
        NonFiniteError: one of the two is NaN or infinite.
    """
    values = torch.stack([loss.detach(), grad_norm.detach()]).tolist()
    if np.isfinite(values).all():
        return values[0], values[1]
    error = NonFiniteError(
        expected="a finite loss and gradient",
        found=f"loss {values[0]}, gradient norm {values[1]}",
        where=f"step {step}",
        next="lower --optimizer.lr; the last checkpoint is intact",
    )
    error.sample_loss = sample_loss.tolist()
    raise error


def train_step(state: TrainState, inputs: ModelInput, config: TrainConfig) -> tuple[dict[str, Tensor | float], Tensor]:
    """One update of the state in place. Returns what the log wants, and the loss of each sample here [B].

    Raises:
        NonFiniteError: the loss or the gradient is not finite; the weights are those before the step.
    """
    loss, sample_loss = add_gradients(state, inputs, config)
    parameters = list(state.parameters.values())
    norm = gradient_norm(parameters)
    loss_value, norm_value = require_finite(loss, norm, sample_loss, state.step)
    state.gather_rows()
    update(state.optimizer, state.step, config.optimizer, norm)
    if state.average:
        update_average(list(state.average.values()), list(state.optimized.values()), config.ema_decay)
    state.scatter_rows()
    rate = learning_rate(state.step, config.optimizer)
    state.step += 1
    norms = {"grad_norm": norm_value, "param_norm": parameter_norm(parameters)}
    return {"loss": loss_value, **norms, "learning_rate": rate}, sample_loss


def add_gradients(state: TrainState, inputs: ModelInput, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Add the gradients of this step's loss to those of the parameters. Returns the loss of the whole batch, and that
    of each sample here [B]."""
    draws = _draws(state, inputs, config)
    if config.max_delay:
        delays = draw_delay(config.seed, state.step, inputs.batch_size * state.world.size, config.max_delay)
        inputs = replace(inputs, delay=state.world.slice(delays))
    return accumulate_gradients(state.model, inputs, draws, config.accumulate, state.world)


def _draws(state: TrainState, inputs: ModelInput, config: TrainConfig) -> list[Tensor]:
    """This process's noise and timesteps of the step, where the policy has any."""
    if isinstance(config.model, Pi0FastConfig):
        return []
    world, size = state.world, (config.model.action_horizon, config.model.action_dim)
    drawn = draw_noise(config.seed, state.step, inputs.batch_size * world.size, config.noise_draws, *size)
    return [world.slice(whole) for whole in drawn]
