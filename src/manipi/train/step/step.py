"""One update of the training state: other pictures, noise, gradients, then the weights and their average.

Random changes to the pictures of a batch, per sample and camera, where they are, on the device, in training alone:

    picture ──► crop, back to full size, rotate ──► brightness, contrast, hue, saturation ──► model
                └ one resampling; black outside      └ in HSV, on a share of the pictures

Wrist cameras move with the hand, and get colours only. The order and the formulas are those of openpi's
`preprocess_observation` and of augmax 0.4.1, which it calls; there, cameras of one sample share their random numbers.

Random numbers are a pure function of (seed, step, row of the whole batch, camera slot): resumed, accumulated and
distributed runs see the same pictures.

Shape suffixes: B batch, C camera slots, N pictures (B · C), P random numbers; h, w pixel rows and columns.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from manipi.data.feed.sampler import random_bits
from manipi.errors import NonFiniteError
from manipi.model import VLA, ModelInput
from manipi.model.config import ModelConfig, Pi0FastConfig
from manipi.model.joint import TERMS
from manipi.train.config import AugmentConfig, TrainConfig
from manipi.train.parallel import ALONE, World
from manipi.train.step.optimizer import gradient_norm, learning_rate, parameter_norm, update, update_average
from manipi.train.step.state import TrainState


def train_step(state: TrainState, inputs: ModelInput, config: TrainConfig) -> tuple[dict[str, Tensor | float], Tensor]:
    """One update of the state in place. Returns what the log wants, and the loss of each sample here [B].

    Raises:
        NonFiniteError: the loss or the gradient is not finite; the weights are those before the step.
    """
    parameters, terms = list(state.parameters.values()), {}
    if getattr(config.model, "joint", None) and (state.step + 1) % config.log_every == 0:
        terms = term_gradients(state, inputs, config)
    loss, sample_loss = add_gradients(state, inputs, config)
    if loss.ndim:
        terms |= {f"loss/{name}": value for name, value in zip(TERMS, loss.tolist(), strict=True)}
        loss = weighted(loss, config.model)
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
    return {"loss": loss_value, **norms, "learning_rate": rate, **terms}, sample_loss


def term_gradients(state: TrainState, inputs: ModelInput, config: TrainConfig) -> dict[str, Tensor | float]:
    """The gradient norm of each term of a joint loss, by itself and weighted: a step of its own for each, without an
    update. The gradients are gone behind it."""
    assert not isinstance(config.model, Pi0FastConfig)
    assert config.model.joint is not None
    norms = dict[str, Tensor | float]()
    for name, weight in zip(TERMS, config.model.joint.weights, strict=True):
        if weight:
            add_gradients(state, inputs, config, term=name)
            norms[f"grad_norm/{name}"] = gradient_norm(list(state.parameters.values())).item()
            state.model.zero_grad(set_to_none=True)
    return norms


def add_gradients(state: TrainState, inputs: ModelInput, config: TrainConfig, term: str = "") -> tuple[Tensor, Tensor]:
    """Add the gradients of this step's loss to those of the parameters; of a joint loss, those of one `term` alone.

    Returns the loss of the whole batch, of a joint one each term [3]; and that of each sample here [B].
    """
    world, batch_size, draws = state.world, inputs.batch_size * state.world.size, list[Tensor]()
    if not isinstance(config.model, Pi0FastConfig):
        size = (config.model.action_horizon, config.model.action_dim)
        drawn = draw_noise(config.seed, state.step, batch_size, config.noise_draws, *size)
        draws = [world.slice(whole) for whole in drawn]
    if (fixed := config.model.fixed_codes) is not None and fixed.hidden:
        whole = draw_hidden(config.seed, state.step, batch_size, fixed.hidden)
        inputs = replace(inputs, hidden=world.slice(whole))
    if config.max_delay:
        delays = draw_delay(config.seed, state.step, batch_size, config.max_delay)
        inputs = replace(inputs, delay=world.slice(delays))
    return accumulate_gradients(state.model, inputs, draws, config.accumulate, world, term)


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


def draw_hidden(seed: int, step: int, batch: int, share: float) -> Tensor:
    """Which samples are shown none of their codes, bool [B]."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step + 2**61) % 2**63)
    return torch.rand(batch, generator=generator) < share


def accumulate_gradients(
    model: VLA, inputs: ModelInput, draws: Sequence[Tensor], parts: int, world: World = ALONE, term: str = ""
) -> tuple[Tensor, Tensor]:
    """Add the gradients of the batch's loss to those of the parameters, part after part.

    Returns the loss of the whole batch, of a joint one each term [3]; and that of each sample here [B].

    Args:
        inputs: this process's rows of the batch.
        draws: their noise and timesteps; none for π0-FAST.
        parts: how many follow each other; the rows divide by it.
        world: the processes among whom the batch is shared.
    """
    total = world.total(model.loss_weight(inputs, draws[0].shape[1] if draws else 1)).clamp(min=1)
    loss, samples = torch.zeros_like(total), []
    for part, *drawn in zip(inputs.split(parts), *(draw.chunk(parts) for draw in draws), strict=True):
        found = model(part, *drawn)
        share = found.loss * (found.weight / total)
        # Gradients are averaged over processes, although each has a share of the sum.
        (weighted(share, model.config, term) * world.size).backward()
        loss += share.detach()
        samples.append(found[1].detach().flatten(1).mean(1) if found[1].ndim > 1 else found[1].detach())
    return world.total(loss), torch.cat(samples)


def weighted(loss: Tensor, model: ModelConfig, term: str = "") -> Tensor:
    """The sum of a joint loss's terms by their weights, or one of them; another loss as it is."""
    if not loss.ndim:
        return loss
    assert not isinstance(model, Pi0FastConfig)
    assert model.joint is not None
    weights = [weight if term in ("", name) else 0.0 for name, weight in zip(TERMS, model.joint.weights, strict=True)]
    return torch.stack([one * weight for one, weight in zip(loss, weights, strict=True) if weight]).sum()


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


# Other pictures -------------------------------------------------------------------------------------------------------


NUMBERS = 8
"""Random numbers per picture: crop (y, x), rotation, brightness, contrast, hue, saturation, colours or not."""


def augment(inputs: ModelInput, config: TrainConfig, step: int, first_row: int = 0) -> ModelInput:
    """The batch with other pictures, float32 in [-1, 1]; pictures that are not valid stay as they are.

    Args:
        step: 0-based.
        first_row: of `inputs` in the whole batch, where this is a part of it.
    """
    how = config.augment
    if not how.enabled:
        return inputs
    draws_BCP = draw(config.seed, step, first_row, *inputs.image_valid.shape).to(inputs.images.device)
    change = partial(_changed, draws_BCP=draws_BCP, valid_BC=inputs.image_valid, config=config)
    past = inputs.past_images  # all frames of a camera change alike
    if past is not None:
        inputs = replace(inputs, past_images=torch.stack([change(frame) for frame in past.unbind(1)], dim=1))
    return replace(inputs, images=change(inputs.images))


def _changed(images: Tensor, draws_BCP: Tensor, valid_BC: Tensor, config: TrainConfig) -> Tensor:
    images_BChw3 = images.float() / 255 if images.dtype == torch.uint8 else images / 2 + 0.5
    how, changed_BChw3 = config.augment, images_BChw3
    moving = [slot for slot, name in enumerate(config.model.cameras) if "wrist" not in name]
    if moving and (how.crop < 1 or how.rotation):
        moved = _move(images_BChw3[:, moving].flatten(0, 1), draws_BCP[:, moving].flatten(0, 1), how)
        changed_BChw3 = images_BChw3.clone()
        changed_BChw3[:, moving] = moved.unflatten(0, (-1, len(moving)))
    if how.brightness or how.contrast or how.hue or how.saturation:
        recoloured = _recolour(changed_BChw3, draws_BCP[:, :, None, None, 3:], how)
        changed_BChw3 = torch.where(_picked(draws_BCP, how), recoloured, changed_BChw3)
    return torch.where(valid_BC[..., None, None, None], changed_BChw3, images_BChw3) * 2 - 1


def draw(seed: int, step: int, first_row: int, rows: int, cameras: int) -> Float[Tensor, "B C P"]:
    """Random numbers, uniform in [-1, 1], on the CPU."""
    bits = random_bits(f"augment/{seed}/{step}").advance(first_row * cameras * NUMBERS)
    uniform = bits.random_raw(rows * cameras * NUMBERS) / 2.0**63 - 1
    return torch.from_numpy(uniform).float().unflatten(0, (rows, cameras, NUMBERS))


def _picked(draws_BCP: Tensor, how: AugmentConfig) -> Tensor:
    return (draws_BCP[..., -1] / 2 + 0.5 < how.colour_probability)[..., None, None, None]


def _move(images_Nhw3: Tensor, draws_NP: Tensor, how: AugmentConfig) -> Tensor:
    """Crop, resize to the full size and rotate about the middle, by one bilinear resampling.

    A pixel at p, seen from the middle, comes from `scale · R(angle) · p + offset`. The crop has whole pixels, as in
    the reference; its place is any.
    """
    size = images_Nhw3.shape[1]
    scale = int(size * how.crop) / size
    offset_N2 = draws_NP[:, [1, 0]] * (1 - scale)  # x, y; the picture reaches from -1 to 1
    angle_N = torch.deg2rad(draws_NP[:, 2] * how.rotation)
    cos_N, sin_N = scale * angle_N.cos(), scale * angle_N.sin()
    matrix_N23 = torch.stack([cos_N, -sin_N, offset_N2[:, 0], sin_N, cos_N, offset_N2[:, 1]], dim=1).unflatten(
        1, (2, 3)
    )
    images_N3hw = images_Nhw3.permute(0, 3, 1, 2)
    grid = F.affine_grid(matrix_N23, list(images_N3hw.shape), align_corners=False)
    return F.grid_sample(images_N3hw, grid, align_corners=False).permute(0, 2, 3, 1)


def _recolour(rgb: Tensor, draws: Tensor, how: AugmentConfig) -> Tensor:
    """Other colours [..., h, w, 3] in HSV, by the amounts that `draws` [..., 1, 1, P'] are shares of."""
    strengths = (how.brightness, how.contrast, how.hue, how.saturation)
    brightness, contrast, hue, saturation = (draws[..., i] * strength for i, strength in enumerate(strengths))
    value, strongest = rgb.max(dim=-1)
    spread = value - rgb.amin(dim=-1)
    # Of the strongest channel: how much the next one exceeds the one after it. The hue counts in sixths of a turn.
    ahead = (rgb.roll(-1, -1) - rgb.roll(-2, -1)).gather(-1, strongest[..., None])[..., 0]
    hue_6 = 2 * strongest + torch.where(spread > 0, ahead / spread, 0.0) + 6 * hue
    purity = torch.where(value > 0, spread / value, 0.0) * (1 + saturation)
    value = adjust_contrast(adjust_brightness(value, brightness), contrast)
    k = (torch.tensor([5.0, 3.0, 1.0], device=rgb.device) + hue_6[..., None]) % 6
    away = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[..., None] * (1 - purity.clamp(max=1)[..., None] * away)


def adjust_brightness(value: Tensor, amount: Tensor) -> Tensor:
    """Towards black (-1) or white (1)."""
    return torch.where(amount < 0, value * (1 + amount), value * (1 - amount) + amount)


def adjust_contrast(value: Tensor, amount: Tensor) -> Tensor:
    """A line through the middle, as steep as tan((1 + amount) · 45°), and lines to black and white at both ends."""
    slope = torch.tan((amount + 1) * (torch.pi / 4))
    knee = slope / (2 * (1 + slope))
    low, middle, high = value / slope, slope * (value - 0.5) + 0.5, 1 - (1 - value) / slope
    return torch.where(value < knee, low, torch.where(value > 1 - knee, high, middle))
