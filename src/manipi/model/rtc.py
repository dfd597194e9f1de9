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

from manipi.model.flow import integrate
from manipi.model.inputs import ModelInput

MAX_GUIDANCE = 5.0
"""β, which bounds the weight of the guidance near pure noise, where equation 2 has no bound; the paper's value."""

Velocity: TypeAlias = Callable[[Tensor, float, Tensor | None], Tensor]
"""Noisy actions [B, K, H, A], their timestep, and which steps are given clean, [B, H] or None, to a velocity
[B, K, H, A]."""


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
    with torch.enable_grad():
        x_BKHA = x_BKHA.detach().requires_grad_()
        velocity_BKHA = velocity(x_BKHA, timestep, None)
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
    assert inputs.actions is not None, "a delay needs the previous chunk"
    given_BH = trained_prefix(inputs, max_delay, noise_BKHA.shape[2])
    if given_BH is not None:
        return sample_after_prefix(velocity, noise_BKHA, inputs.actions, given_BH, num_steps)
    mask_BH = soft_mask(*_delay_and_left(inputs), noise_BKHA.shape[2])
    return sample_guided(velocity, noise_BKHA, inputs.actions, mask_BH, num_steps)


def trained_prefix(inputs: ModelInput, max_delay: int, horizon: int) -> Tensor | None:
    """Which steps [B, H] are given; None where weights that know prefixes of `max_delay` steps know no such ones."""
    delay_B, _ = _delay_and_left(inputs)
    if not max_delay or bool((delay_B > max_delay).any()):
        return None
    return given_steps(delay_B, horizon)


def _delay_and_left(inputs: ModelInput) -> tuple[Tensor, Tensor]:
    """The steps [B] that are committed, of those [B] that are left of the previous chunk."""
    assert inputs.delay is not None, "nothing to go on from"
    assert inputs.action_valid is not None, "a delay needs to know what is left of the previous chunk"
    left_B = inputs.action_valid.sum(1)
    return torch.minimum(inputs.delay, left_B), left_B


def sample_guided(
    velocity: Velocity, noise_BKHA: Tensor, previous_BHA: Tensor, mask_BH: Tensor, num_steps: int
) -> Tensor:
    """Chunks by `num_steps` Euler steps of the guided velocity (algorithm 1, GuidedInference)."""
    return integrate(lambda x, t: guided_velocity(velocity, x, t, previous_BHA, mask_BH), noise_BKHA, num_steps)


def sample_after_prefix(
    velocity: Velocity, noise_BKHA: Tensor, previous_BHA: Tensor, given_BH: Tensor, num_steps: int
) -> Tensor:
    """Chunks whose given steps are the previous chunk's, by a policy that was trained with such prefixes."""

    def with_given(x_BKHA: Tensor) -> Tensor:
        return torch.where(given_BH[:, None, :, None], previous_BHA[:, None], x_BKHA)

    return with_given(integrate(lambda x, t: velocity(with_given(x), t, given_BH), noise_BKHA, num_steps))


def given_steps(delay_B: Int64[Tensor, "B"], horizon: int) -> Tensor:
    """[B, H]: which steps are committed."""
    return torch.arange(horizon, device=delay_B.device) < delay_B[:, None]
