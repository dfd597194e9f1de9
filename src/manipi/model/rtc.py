"""Real-time chunking: an action chunk that goes on from the one that is being executed.

While the policy computes, the robot executes the first `delay` steps of what is left of its previous chunk. The new
chunk has to begin with them, and should not turn away abruptly behind them:

    step of the new chunk     0 … d-1         d …  e-1         e … H-1
    previous chunk            committed       planned          nothing
    weight W                  1               falls to 0       0            e = H - s: steps that are left

Two ways to get there. *Guidance* needs no training (Black et al. 2025, arXiv 2506.07339): every denoising step is
pulled towards the previous chunk by the gradient of its prediction of the end. *Prefix* needs a policy that was trained
with `max_delay` (Black et al. 2025, arXiv 2512.05964): the committed steps are given, clean and at their own timestep.

The papers' time τ runs from noise (0) to actions (1). Here t = 1 - τ and the velocity is u = -v, so that

    â = x - t·u                                 the end, as predicted from here                 eq. 3
    r² = t² / ((1-t)² + t²)                                                                     eq. 4
    u' = u - min(β, t / ((1-t)·r²)) · (W∘(y - â))ᵀ ∂â/∂x                                        eq. 2

Shape suffixes: B batch, K noise draws, H action horizon, A action dimensions.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from manipi.model.inputs import ModelInput

MAX_GUIDANCE = 5.0
"""β, which bounds the weight of the guidance near pure noise, where equation 2 has no bound; the paper's value."""

CLEAN = 0.0
"""The timestep of an action."""

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Noisy actions [B, K, H, A] and timesteps, [B, K] or one per step [B, K, H], to a velocity [B, K, H, A]."""


def soft_mask(delay_B: Int64[Tensor, "B"], left_B: Int64[Tensor, "B"], horizon: int) -> Float[Tensor, "B H"]:
    """How much each step of the previous chunk binds the new one (equation 5).

    1 for the first `delay` steps; then c·(eᶜ - 1)/(e - 1) with c falling in equal parts to 0 at step `left`.
    """
    steps_H = torch.arange(horizon, device=delay_B.device)
    left_B1 = left_B[:, None]
    delay_B1 = torch.minimum(delay_B[:, None], left_B1)
    fall_BH = (left_B1 - steps_H) / (left_B1 - delay_B1 + 1)
    planned_BH = fall_BH * torch.expm1(fall_BH) / math.expm1(1.0)
    return torch.where(steps_H < delay_B1, 1.0, torch.where(steps_H < left_B1, planned_BH, 0.0))


def guidance_weight(timestep: float, most: float = MAX_GUIDANCE) -> float:
    """min(β, t / ((1-t)·r²)), by equations 2 and 4."""
    t = timestep
    return most if t >= 1 else min(most, ((1 - t) ** 2 + t**2) / ((1 - t) * t))


def guided_velocity(
    velocity: Velocity, x_BKHA: Tensor, timestep: float, previous_BHA: Tensor, mask_BH: Tensor
) -> Tensor:
    """The velocity, corrected so that its end comes closer to the previous chunk; a pass through the model and back."""
    timestep_BK = torch.full(x_BKHA.shape[:2], timestep, device=x_BKHA.device)
    with torch.enable_grad():
        x_BKHA = x_BKHA.detach().requires_grad_()
        velocity_BKHA = velocity(x_BKHA, timestep_BK)
        end_BKHA = x_BKHA - timestep * velocity_BKHA
        error_BKHA = mask_BH[:, None, :, None] * (previous_BHA[:, None] - end_BKHA).detach()
        (pull_BKHA,) = torch.autograd.grad(end_BKHA, x_BKHA, error_BKHA)
    return velocity_BKHA.detach() - guidance_weight(timestep) * pull_BKHA


def sample_on(velocity: Velocity, inputs: ModelInput, noise_BKHA: Tensor, num_steps: int, max_delay: int) -> Tensor:
    """Chunks that go on from the previous one, in the way that the weights know.

    Args:
        inputs: with `delay`, `actions` and `action_valid`.
        max_delay: the longest prefix that the weights were trained with; 0: none.
    """
    assert inputs.delay is not None, "nothing to go on from"
    assert inputs.actions is not None, "a delay needs the previous chunk"
    assert inputs.action_valid is not None, "a delay needs to know what is left of the previous chunk"
    left_B = inputs.action_valid.sum(1)
    delay_B = torch.minimum(inputs.delay, left_B)
    if max_delay and bool((delay_B <= max_delay).all()):
        return sample_after_prefix(velocity, noise_BKHA, inputs.actions, delay_B, num_steps)
    mask_BH = soft_mask(delay_B, left_B, noise_BKHA.shape[2])
    return sample_guided(velocity, noise_BKHA, inputs.actions, mask_BH, num_steps)


def sample_guided(
    velocity: Velocity, noise_BKHA: Tensor, previous_BHA: Tensor, mask_BH: Tensor, num_steps: int
) -> Tensor:
    """Chunks by `num_steps` Euler steps of the guided velocity (algorithm 1, GuidedInference)."""
    x_BKHA = noise_BKHA
    for i in range(num_steps):
        x_BKHA = x_BKHA - guided_velocity(velocity, x_BKHA, 1 - i / num_steps, previous_BHA, mask_BH) / num_steps
    return x_BKHA


def sample_after_prefix(
    velocity: Velocity, noise_BKHA: Tensor, previous_BHA: Tensor, delay_B: Tensor, num_steps: int
) -> Tensor:
    """Chunks whose first `delay` steps are the previous chunk's, by a policy that was trained with such prefixes."""
    given_BKHA = previous_BHA[:, None].expand_as(noise_BKHA)
    is_given_BKH = given_steps(delay_B, noise_BKHA.shape[2])[:, None].expand(noise_BKHA.shape[:3])
    x_BKHA = noise_BKHA
    for i in range(num_steps):
        x_BKHA = torch.where(is_given_BKH[..., None], given_BKHA, x_BKHA)
        timestep_BKH = torch.where(is_given_BKH, CLEAN, 1 - i / num_steps)
        x_BKHA = x_BKHA - velocity(x_BKHA, timestep_BKH) / num_steps
    return torch.where(is_given_BKH[..., None], given_BKHA, x_BKHA)


def given_steps(delay_B: Int64[Tensor, "B"], horizon: int) -> Tensor:
    """[B, H]: which steps are committed."""
    return torch.arange(horizon, device=delay_B.device) < delay_B[:, None]


def step_timesteps(timestep_BK: Tensor, delay_B: Tensor, horizon: int) -> Float[Tensor, "B K H"]:
    """Timesteps for training: those of the committed steps are clean."""
    return torch.where(given_steps(delay_B, horizon)[:, None], CLEAN, timestep_BK[..., None])
