"""The algorithm of π0 and π0.5: suffix, flow-matching loss, sampling, real-time chunking.

Timestep 1 is pure noise, 0 is the action chunk (the reference's direction, opposite to the papers'):

    x_t = t · noise + (1 − t) · actions            u_t = noise − actions = dx_t/dt

Several noise draws per observation share one prefix, each on its own branch:

    π0      prefix | state | actions, draw 1 | actions, draw 2 | …
    π0.5    prefix | actions, draw 1 | actions, draw 2 | …

Real-time chunking goes on from the action chunk that is being executed. While the policy computes, the robot executes
the first `delay` steps of what is left of its previous chunk. The new chunk has to begin with them, and should not turn
away abruptly behind them:

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

Shape suffixes: B batch, K noise draws, H action horizon, A action dimensions, T suffix tokens, D expert width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from manipi.model.config import Pi0Config, Pi05Config
from manipi.model.gemma import Conditioning, Gemma, KVCache, Placed, Span
from manipi.model.inputs import ModelInput
from manipi.model.layers import Linear

CLEAN = 0.0
"""The timestep of an action."""
MAX_GUIDANCE = 5.0
"""β, which bounds the weight of the guidance near pure noise, where equation 2 has no bound; the paper's value."""

Velocity: TypeAlias = Callable[[Tensor, float, Tensor | None], Tensor]
"""Noisy actions [B, K, H, A], their timestep, and which steps are given clean, [B, H] or None, to a velocity
[B, K, H, A]."""
Embedded: TypeAlias = tuple[Tensor, Tensor | None]
"""Tokens [B, T, D], and conditioning [B, C, D] where norms are adaptive."""
Continuation: TypeAlias = Literal["prefix", "guidance"] | None
"""How a chunk goes on from the previous one; None: there is none."""


# The suffix ----------------------------------------------------------------------------------------------------------


class FlowHead(nn.Module):
    """What π0 and π0.5 have in common. They differ in where the state and the timestep go, which is `embed`."""

    def __init__(self, width: int, action_dim: int):
        super().__init__()
        self.action_in = Linear(action_dim, width)
        self.action_out = Linear(width, action_dim)

    def suffix(
        self,
        state_BA: Tensor,
        x_BKHA: Tensor,
        timestep_BK: Tensor,
        dtype: torch.dtype,
        given_BH: Bool[Tensor, "B H"] | None = None,
    ) -> Span:
        """The action expert's tokens: what precedes the draws is one block on the trunk, each draw is one block on its
        own branch. The head's own layers compute in float32, as in the reference.

        Args:
            given_BH: steps that are clean in every draw.
        """
        num_draws, horizon = x_BKHA.shape[1:3]
        tokens_BTD, cond_BCD = self.embed(state_BA, x_BKHA, timestep_BK, given_BH)
        b, t, _ = tokens_BTD.shape
        first_action = t - num_draws * horizon
        starts_T = torch.zeros(t, dtype=torch.bool, device=tokens_BTD.device)
        starts_T[0] = True
        starts_T[first_action::horizon] = True
        branch_T = (torch.arange(t, device=tokens_BTD.device) - first_action).div(horizon, rounding_mode="floor") + 1
        clean_BT = None if given_BH is None else given_BH.repeat(1, num_draws)
        return Span(
            tokens_BTD=tokens_BTD.to(dtype),
            valid_BT=torch.ones_like(starts_T).expand(b, t),
            starts_block_BT=starts_T.expand(b, t),
            branch_BT=branch_T.expand(b, t),
            cond=None if cond_BCD is None else Conditioning(cond_BCD.to(dtype), clean_BT),
            all_valid=True,
            one_block=first_action == 0 and num_draws == 1,
        )

    def suffix_at(
        self, state_BA: Tensor, x_BKHA: Tensor, timestep: float, dtype: torch.dtype, given_BH: Tensor | None
    ) -> Span:
        """`suffix` in sampling, where all draws are at one timestep. An engine has tables for these."""
        # One row for all draws: adaptive norms then have one modulation, and not one for each token.
        timestep_BK = torch.full((), timestep, device=x_BKHA.device).expand(len(x_BKHA), 1)
        return self.suffix(state_BA, x_BKHA, timestep_BK, dtype, given_BH)

    def embed(self, state_BA: Tensor, x_BKHA: Tensor, timestep_BK: Tensor, given_BH: Tensor | None) -> Embedded:
        """The tokens in float32, and the rows of their `Conditioning`."""
        raise NotImplementedError

    def velocity(self, out_BTD: Tensor, num_draws: int, action_horizon: int) -> Tensor:
        """Velocity [B, K, H, A] from the expert's output at the action tokens, in float32."""
        velocity_BTA = self.action_out(out_BTD[:, -num_draws * action_horizon :].float())
        return velocity_BTA.reshape(-1, num_draws, action_horizon, velocity_BTA.shape[-1])


class Pi0Head(FlowHead):
    """The state is one token on the trunk; an MLP mixes the timestep into every action token."""

    def __init__(self, width: int, action_dim: int):
        super().__init__(width, action_dim)
        self.state_in = Linear(action_dim, width)
        self.time_mlp_in = Linear(2 * width, width)
        self.time_mlp_out = Linear(width, width)

    def embed(self, state_BA: Tensor, x_BKHA: Tensor, timestep_BK: Tensor, given_BH: Tensor | None) -> Embedded:
        actions_BKHD = self.action_in(x_BKHA)
        time_BKHD = timestep_embedding(timestep_BK[..., None], actions_BKHD.shape[-1])
        if given_BH is not None:
            clean_D = timestep_embedding(timestep_BK.new_tensor(CLEAN), actions_BKHD.shape[-1])
            time_BKHD = torch.where(given_BH[:, None, :, None], clean_D, time_BKHD)
        mixed_BKHD = self.time_mlp_in(torch.cat([actions_BKHD, time_BKHD.expand_as(actions_BKHD)], dim=-1))
        mixed_BKHD = self.time_mlp_out(F.silu(mixed_BKHD))
        return torch.cat([self.state_in(state_BA)[:, None], mixed_BKHD.flatten(1, 2)], dim=1), None


class Pi05Head(FlowHead):
    """The state is in the prompt; the timestep conditions the action expert's norms."""

    def __init__(self, width: int, action_dim: int):
        super().__init__(width, action_dim)
        self.time_mlp_in = Linear(width, width)
        self.time_mlp_out = Linear(width, width)

    def embed(self, state_BA: Tensor, x_BKHA: Tensor, timestep_BK: Tensor, given_BH: Tensor | None) -> Embedded:
        if given_BH is not None:
            timestep_BK = F.pad(timestep_BK, (0, 1), value=CLEAN)
        tokens_BTD = self.action_in(x_BKHA).flatten(1, 2)
        return tokens_BTD, self.condition(timestep_embedding(timestep_BK, tokens_BTD.shape[-1]))

    def condition(self, time_BCD: Tensor) -> Tensor:
        """What modulates the norms, from embedded timesteps."""
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time_BCD))))


def timestep_embedding(
    timestep: Float[Tensor, "*batch"], width: int, min_period: float = 4e-3, max_period: float = 4.0
) -> Float[Tensor, "*batch width"]:
    """Sine and cosine features `[sin(2πt/p_i) | cos(2πt/p_i)]` with `p_i = min · (max/min)^(i / (width/2 − 1))`.

    float32: the fastest feature turns 250 times while t runs from 0 to 1.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, device=timestep.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = timestep.float()[..., None] * (1.0 / period * 2 * math.pi)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


# The loss ------------------------------------------------------------------------------------------------------------


class FlowLoss(NamedTuple):
    """The flow-matching loss; a tuple, because sharding hooks look for gradients inside those."""

    loss: Float[Tensor, ""]
    """Mean over the elements that count."""
    per_step: Tensor
    """[B, H], or [B, K, H] for K draws: mean over the dimensions that count; zero for steps that do not."""
    weight: Float[Tensor, ""]
    """How many elements count, to average over batches exactly."""


def flow_loss(
    gemma: Gemma,
    head: FlowHead,
    prefix: Span,
    inputs: ModelInput,
    noise_BKHA: Float[Tensor, "B K H A"],
    timestep_BK: Float[Tensor, "B K"],
    masks: tuple[Tensor, Tensor],
) -> FlowLoss:
    """Squared error of the velocity, averaged over the steps and dimensions that are real.

    Every real element counts the same, so an episode's last chunk weighs less than a full one.

    Args:
        inputs: with `actions`; with `delay`, so many first steps are given clean.
        masks: `action_masks` of the inputs.
    """
    num_draws, horizon = noise_BKHA.shape[1:3]
    suffix, target_BKHA = noisy_suffix(head, inputs, noise_BKHA, timestep_BK, prefix.tokens_BTD.dtype)
    out = gemma({"vlm": prefix, "action": suffix}, outputs=("action",), last=num_draws * horizon)
    return velocity_error(head.velocity(out["action"], num_draws, horizon), target_BKHA, masks)


def noisy_suffix(
    head: FlowHead, inputs: ModelInput, noise_BKHA: Tensor, timestep_BK: Tensor, dtype: torch.dtype
) -> tuple[Span, Float[Tensor, "B K H A"]]:
    """The action expert's tokens in training, and the velocities that it shall predict there."""
    assert inputs.actions is not None, "training needs actions"
    x_BKHA, target_BKHA = interpolate(noise_BKHA, inputs.actions, timestep_BK)
    given_BH = None if inputs.delay is None else given_steps(inputs.delay, noise_BKHA.shape[2])
    if given_BH is not None:
        x_BKHA = torch.where(given_BH[:, None, :, None], inputs.actions[:, None], x_BKHA)
    return head.suffix(inputs.state, x_BKHA, timestep_BK, dtype, given_BH), target_BKHA


def velocity_error(velocity_BKHA: Tensor, target_BKHA: Tensor, masks: tuple[Tensor, Tensor]) -> FlowLoss:
    """The loss of predicted velocities, where `masks` say that steps and dimensions are real."""
    step_valid_BH, dim_valid_BA = masks
    real_BKHA = (step_valid_BH[:, None, :, None] & dim_valid_BA[:, None, None]).expand_as(target_BKHA)
    squared_BKHA = torch.where(real_BKHA, velocity_BKHA - target_BKHA, 0.0).square()
    weight = real_BKHA.sum()
    per_step_BKH = squared_BKHA.sum(-1) / real_BKHA.sum(-1).clamp(min=1)
    return FlowLoss(squared_BKHA.sum() / weight.clamp(min=1), per_step_BKH, weight.float())


def interpolate(noise_BKHA: Tensor, actions_BHA: Tensor, timestep_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy actions x_t and their velocity u_t, each [B, K, H, A]."""
    t, actions = timestep_BK[..., None, None], actions_BHA[:, None]
    return t * noise_BKHA + (1 - t) * actions, noise_BKHA - actions


def action_masks(inputs: ModelInput, config: Pi0Config | Pi05Config) -> tuple[Tensor, Tensor]:
    """Which steps [B, H] and which dimensions [B or 1, A] are real."""
    b, h, a = inputs.batch_size, config.action_horizon, config.action_dim
    step_valid, dim_valid = inputs.action_valid, inputs.action_dim_valid
    if step_valid is None or config.compat.unmasked_loss:
        step_valid = torch.ones(b, h, dtype=torch.bool, device=inputs.state.device)
    if inputs.delay is not None:
        step_valid = step_valid & ~given_steps(inputs.delay, h)
    if dim_valid is None or config.compat.unmasked_loss:
        dim_valid = torch.ones(a, dtype=torch.bool, device=inputs.state.device)
    return step_valid, dim_valid.expand(1 if dim_valid.ndim == 1 else b, a)


def given_steps(delay_B: Int64[Tensor, "B"], horizon: int) -> Tensor:
    """[B, H]: which steps are committed."""
    return torch.arange(horizon, device=delay_B.device) < delay_B[:, None]


# Sampling ------------------------------------------------------------------------------------------------------------


def sample(
    velocity: Velocity, inputs: ModelInput, noise_BKHA: Tensor, num_steps: int, continuation: Continuation
) -> Float[Tensor, "B K H A"]:
    """Action chunks by `num_steps` Euler steps from timestep 1 to 0.

    Args:
        velocity: `velocity_field`.
        continuation: with `delay`, `actions` and `action_valid` among the inputs.
    """
    if continuation is None:
        return integrate(lambda x, t: velocity(x, t, None), noise_BKHA, euler_times(num_steps))
    assert inputs.actions is not None, "a delay needs the previous chunk"
    delay_B, left_B = _delay_and_left(inputs)
    if continuation == "prefix":
        given_BH = given_steps(delay_B, noise_BKHA.shape[2])
        return sample_after_prefix(velocity, noise_BKHA, inputs.actions, given_BH, num_steps)
    mask_BH = soft_mask(delay_B, left_B, noise_BKHA.shape[2])
    return sample_guided(velocity, noise_BKHA, inputs.actions, mask_BH, num_steps)


def velocity_field(
    gemma: Gemma,
    head: FlowHead,
    cache: KVCache,
    inputs: ModelInput,
    noise_BKHA: Tensor,
    dim_valid_BA: Tensor,
    dtype: torch.dtype,
) -> Velocity:
    """The velocity at any noisy actions, after the prefix that is in the cache.

    Padded dimensions follow their true velocity, which is their noise because their action is zero: the model sees
    there what it saw in training, although the loss never taught it to predict them.

    Args:
        cache: of the prefix.
        dim_valid_BA: dimensions that the robot has.
        dtype: of the suffix's tokens.
    """
    placed: Placed | None = None

    def velocity(x_BKHA: Tensor, timestep: float, given_BH: Tensor | None) -> Tensor:
        nonlocal placed  # at the same place in every step
        spans = {"action": head.suffix_at(inputs.state, x_BKHA, timestep, dtype, given_BH)}
        placed = gemma.place(spans, cache, {}) if placed is None else placed
        velocity_BKHA = head.velocity(gemma(spans, cache, placed=placed)["action"], *noise_BKHA.shape[1:3])
        return torch.where(dim_valid_BA[:, None, None], velocity_BKHA, noise_BKHA)

    return velocity


def euler_times(num_steps: int) -> list[float]:
    """From 1 down by equal parts, subtracted in float32 one after the other as in the reference."""
    return np.subtract.accumulate(np.array([1.0, *[1.0 / num_steps] * (num_steps - 1)], np.float32)).tolist()


def integrate(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, times: Sequence[float]) -> Tensor:
    """Actions from noise by Euler steps of `velocity(x, timestep)` at equally spaced times from 1 on, down to 0."""
    x = noise
    for timestep in times:
        x = x - velocity(x, timestep) / len(times)
    return x


def bend(velocities_TBHA: Sequence[Tensor], real_BHA: Bool[Tensor, "B H A"]) -> Float[Tensor, "B"]:
    """How far an integrated path is from a straight line: p · Σ ‖v_t - v_{t-1}‖ / Σ ‖v_t‖ (arXiv 2607.27933).

    Over the first p velocities, all but the last one, whose errors are those of the steps' size. The endpoint of a
    straight path is certain; the more it bends, the more the chunks differ that other noise gives.

    Args:
        velocities_TBHA: of each of the steps.
        real_BHA: which of the elements count.
    """
    first = torch.stack(list(velocities_TBHA[: max(2, len(velocities_TBHA) - 1)])).float()
    first_pBX = torch.where(real_BHA, first, 0.0).flatten(2)
    turned_B, length_B = (x.norm(dim=-1).sum(0) for x in (first_pBX.diff(dim=0), first_pBX))
    return len(first) * turned_B / length_B


# Real-time chunking --------------------------------------------------------------------------------------------------


def continuation(inputs: ModelInput, max_delay: int) -> Continuation:
    """How weights that know prefixes of `max_delay` steps go on from the previous chunk; waits for a GPU."""
    if inputs.delay is None:
        return None
    delay_B, _ = _delay_and_left(inputs)
    return "guidance" if not max_delay or bool((delay_B > max_delay).any()) else "prefix"


def _delay_and_left(inputs: ModelInput) -> tuple[Tensor, Tensor]:
    """The steps [B] that are committed, of those [B] that are left of the previous chunk."""
    assert inputs.delay is not None, "nothing to go on from"
    assert inputs.action_valid is not None, "a delay needs to know what is left of the previous chunk"
    left_B = inputs.action_valid.sum(1)
    return torch.minimum(inputs.delay, left_B), left_B


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


def sample_guided(
    velocity: Velocity, noise_BKHA: Tensor, previous_BHA: Tensor, mask_BH: Tensor, num_steps: int
) -> Tensor:
    """Chunks by `num_steps` Euler steps of the guided velocity (algorithm 1, GuidedInference)."""
    times = [1 - i / num_steps for i in range(num_steps)]
    return integrate(lambda x, t: guided_velocity(velocity, x, t, previous_BHA, mask_BH), noise_BKHA, times)


def sample_after_prefix(
    velocity: Velocity, noise_BKHA: Tensor, previous_BHA: Tensor, given_BH: Tensor, num_steps: int
) -> Tensor:
    """Chunks whose given steps are the previous chunk's, by a policy that was trained with such prefixes."""

    def with_given(x_BKHA: Tensor) -> Tensor:
        return torch.where(given_BH[:, None, :, None], previous_BHA[:, None], x_BKHA)

    times = [1 - i / num_steps for i in range(num_steps)]
    return with_given(integrate(lambda x, t: velocity(with_given(x), t, given_BH), noise_BKHA, times))
