"""The random numbers of a training step, a pure function of (seed, step): nothing to save, nothing to restore."""

import torch
from torch import Tensor

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
