"""The flow-matching head of π0 and π0.5: noisy actions into suffix tokens, suffix tokens into a velocity.

Timestep 1 is pure noise, 0 is the action chunk (the reference's direction, opposite to the papers'):

    x_t = t · noise + (1 − t) · actions            u_t = noise − actions = dx_t/dt

Several noise draws per observation share one prefix, each on its own branch:

    π0      prefix | state | actions, draw 1 | actions, draw 2 | …
    π0.5    prefix | actions, draw 1 | actions, draw 2 | …

Shape suffixes: B batch, K noise draws, H action horizon, A action dimensions, T suffix tokens, D expert width.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from manipi.model.gemma import Span
from manipi.model.layers import Linear

CLEAN = 0.0
"""The timestep of an action."""


class FlowLoss(NamedTuple):
    """The flow-matching loss; a tuple, because sharding hooks look for gradients inside those."""

    loss: Float[Tensor, ""]
    """Mean over the elements that count."""
    per_step: Tensor
    """[B, H], or [B, K, H] for K draws: mean over the dimensions that count; zero for steps that do not."""
    weight: Float[Tensor, ""]
    """How many elements count, to average over batches exactly."""


Embedded: TypeAlias = tuple[Tensor, Tensor | None]
"""Tokens [B, T, D], and conditioning [B, C, D] where norms are adaptive."""


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
        """The action expert's tokens. The head's own layers compute in float32, as in the reference.

        Args:
            given_BH: steps that are clean in every draw.
        """
        num_draws, action_horizon = x_BKHA.shape[1:3]
        tokens_BTD, cond_BCD = self.embed(state_BA, x_BKHA, timestep_BK, given_BH)
        clean_BT = None if cond_BCD is None or given_BH is None else given_BH.repeat(1, num_draws)
        span = _span(tokens_BTD.to(dtype), num_draws, action_horizon, cond_BCD)
        return replace(span, clean_BT=clean_BT)

    def embed(self, state_BA: Tensor, x_BKHA: Tensor, timestep_BK: Tensor, given_BH: Tensor | None) -> Embedded:
        """The tokens in float32, and the rows of `Span.cond_BCD`."""
        raise NotImplementedError

    def velocity(self, out_BTD: Tensor, num_draws: int, action_horizon: int) -> Tensor:
        """Velocity [B, K, H, A] from the expert's output at the action tokens, in float32."""
        return self.action_out(out_BTD[:, -num_draws * action_horizon :].float()).unflatten(
            1, (num_draws, action_horizon)
        )


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


def _span(tokens_BTD: Tensor, num_draws: int, action_horizon: int, cond: Tensor | None) -> Span:
    """The suffix: what precedes the draws is one block on the trunk, each draw is one block on its own branch."""
    b, t, _ = tokens_BTD.shape
    first_action = t - num_draws * action_horizon
    starts_T = torch.zeros(t, dtype=torch.bool, device=tokens_BTD.device)
    starts_T[0] = True
    starts_T[first_action::action_horizon] = True
    branch_T = (torch.arange(t, device=tokens_BTD.device) - first_action).div(action_horizon, rounding_mode="floor") + 1
    return Span(
        tokens_BTD=tokens_BTD,
        valid_BT=torch.ones_like(starts_T).expand(b, t),
        starts_block_BT=starts_T.expand(b, t),
        branch_BT=branch_T.expand(b, t),
        cond_BCD=cond,
        plain=first_action == 0 and num_draws == 1,
    )


def interpolate(noise_BKHA: Tensor, actions_BHA: Tensor, timestep_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy actions x_t and their velocity u_t, each [B, K, H, A]."""
    t, actions = timestep_BK[..., None, None], actions_BHA[:, None]
    return t * noise_BKHA + (1 - t) * actions, noise_BKHA - actions


def integrate(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, num_steps: int) -> Tensor:
    """Actions from noise by `num_steps` Euler steps of `velocity(x, timestep)`, from timestep 1 to 0."""
    x = noise
    for i in range(num_steps):
        x = x - velocity(x, 1 - i / num_steps) / num_steps
    return x


def flow_loss(
    velocity_BKHA: Tensor,
    target_BKHA: Tensor,
    action_valid: Bool[Tensor, "B H"],
    action_dim_valid: Bool[Tensor, "#B A"],
) -> FlowLoss:
    """Squared error of the velocity, averaged over the steps and dimensions that are real.

    Every real element counts the same, so an episode's last chunk weighs less than a full one.
    """
    real_BKHA = (action_valid[:, None, :, None] & action_dim_valid[:, None, None]).expand_as(target_BKHA)
    squared_BKHA = torch.where(real_BKHA, velocity_BKHA - target_BKHA, 0.0).square()
    weight = real_BKHA.sum()
    per_step_BKH = squared_BKHA.sum(-1) / real_BKHA.sum(-1).clamp(min=1)
    return FlowLoss(squared_BKHA.sum() / weight.clamp(min=1), per_step_BKH, weight.float())


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
