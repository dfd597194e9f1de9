import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from manipi.errors import ConfigError
from manipi.train.config import LRScale, OptimizerConfig
from manipi.train.step.optimizer import (
    clip_scale,
    gradient_norm,
    learning_rate,
    make_optimizer,
    parameter_norm,
    round_stochastically,
    step_seed,
    update,
    update_average,
)
from manipi.train.step.step import BETA_ALPHA, draw_delay, draw_noise


def test_learning_rate_at_its_corners():
    config = OptimizerConfig(lr=1.0, final_lr=0.1, warmup_steps=4, decay_steps=14)
    assert learning_rate(0, config) == pytest.approx(1 / 5)
    assert learning_rate(4, config) == 1.0
    assert learning_rate(9, config) == pytest.approx(0.55)
    assert learning_rate(14, config) == learning_rate(1000, config) == pytest.approx(0.1)
    rates = [learning_rate(step, config) for step in range(30)]
    assert rates == [*sorted(rates[:4]), *sorted(rates[4:], reverse=True)]
    assert learning_rate(0, OptimizerConfig(warmup_steps=0)) == OptimizerConfig().lr


SCHEDULES = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[3].parent / "shared")) / (
    "golden/transforms/schedules.json"
)


@pytest.mark.skipif(not SCHEDULES.is_file(), reason=f"no golden schedules at {SCHEDULES}; set MANIPI_SHARED")
def test_the_reference_schedules():
    names = {"peak_lr": "lr", "decay_lr": "final_lr"}
    cases = json.loads(SCHEDULES.read_text())
    assert {case["kind"] for case in cases} == {"cosine", "rsqrt"}
    for case in cases:
        settings = {names.get(key, key): value for key, value in case["args"].items()}
        config = OptimizerConfig(schedule=case["kind"], **settings)
        found = [learning_rate(step, config) for step, _ in case["values"]]
        wanted = [value for _, value in case["values"]]
        # The reference computes the warm-up as a difference from the peak, in float32.
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7 * config.lr, err_msg=str(case["args"]))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov):
    """Sutskever et al. 2013: velocity = momentum * velocity + gradient. Neither decay nor clipping."""
    config = OptimizerConfig(
        kind="sgd", lr=0.1, final_lr=0.1, warmup_steps=0, momentum=0.5, nesterov=nesterov, weight_decay=1.0, clip_norm=0
    )
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = make_optimizer([weight], config)
    value, velocity = np.array([3.0, -2.0]), np.zeros(2)
    for step in range(3):
        gradient = np.array([3.0, 4.0]) * (step + 1)
        weight.grad = torch.tensor(gradient).float()
        norm = gradient_norm([weight])
        assert float(norm) == pytest.approx(5.0 * (step + 1))
        update(optimizer, step, config, norm)
        velocity = 0.5 * velocity + gradient
        value = value - 0.1 * (gradient + 0.5 * velocity if nesterov else velocity)
        np.testing.assert_allclose(weight.detach().numpy(), value, rtol=1e-6, atol=1e-6)


def test_nesterov_needs_momentum():
    with pytest.raises(ConfigError, match="above 0 for nesterov"):
        OptimizerConfig(kind="sgd", nesterov=True, momentum=0.0)


def test_three_updates_by_hand():
    """AdamW after Loshchilov and Hutter (2019), algorithm 2, with the gradient clipped by its global norm."""
    config = OptimizerConfig(lr=0.1, final_lr=0.1, warmup_steps=0, weight_decay=0.2, clip_norm=1.0, eps=1e-8)
    weight, bias = torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.tensor([0.5]))
    optimizer = make_optimizer([weight, bias], config)
    value, m, v = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3)
    for step in range(3):
        gradient = np.array([3.0, 0.0, 4.0]) * (step + 1)
        weight.grad, bias.grad = torch.tensor(gradient[:2]).float(), torch.tensor(gradient[2:]).float()
        norm = gradient_norm([weight, bias])
        update(optimizer, step, config, norm)
        assert float(norm) == pytest.approx(5.0 * (step + 1))
        assert weight.grad is None
        gradient /= np.linalg.norm(gradient)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        corrected = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
        value = value - 0.1 * (corrected + 0.2 * value)
        np.testing.assert_allclose(torch.cat([weight, bias]).detach().numpy(), value, rtol=1e-5)


def test_small_gradients_are_not_scaled_up():
    assert clip_scale(torch.tensor(0.5), OptimizerConfig()) == 1.0
    assert clip_scale(torch.tensor(0.5), OptimizerConfig(clip_norm=0.0)) is None


def naive_update(optimizer, step, config, parameters, average, decay) -> None:
    """What the fused step stands for, one thing after the other: the oracle."""
    torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    with torch.no_grad():
        for mean, parameter in zip(average, parameters, strict=True):
            mean.copy_(decay * mean + (1 - decay) * parameter)


def test_the_fused_step_is_the_naive_one():
    config = OptimizerConfig(lr=0.01, warmup_steps=3, decay_steps=20, weight_decay=0.1)
    torch.manual_seed(0)
    start, gradients = [torch.randn(33, 7), torch.randn(5)], [[torch.randn(33, 7), torch.randn(5)] for _ in range(12)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    average, oracle = ([p.clone() for p in start] for _ in range(2))
    fused, naive = (
        make_optimizer(ours, config),
        torch.optim.AdamW(theirs, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False, fused=False),
    )
    for step, gradient in enumerate(gradients):
        scale = 3.0 if step % 2 else 0.01  # with and without clipping
        for one in (ours, theirs):
            for parameter, value in zip(one, gradient, strict=True):
                parameter.grad = scale * value
        update(fused, step, config, gradient_norm(ours))
        update_average(average, ours, 0.9)
        naive_update(naive, step, config, theirs, oracle, 0.9)
    for found, wanted in zip([*ours, *average], [*theirs, *oracle], strict=True):
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_sharded_parameters(kind, dtype, mesh):
    """Every operation of an update has its rule for DTensors, and gives the bits of plain tensors."""
    config = OptimizerConfig(kind=kind, lr=0.01, warmup_steps=0, weight_decay=0.1)
    torch.manual_seed(0)
    start, gradients = torch.randn(16, 8), torch.randn(3, 16, 8)

    def shard(value: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(value, mesh, [Shard(0)])

    found = []
    for place in (shard, torch.clone):
        weight = torch.nn.Parameter(place(start.to(dtype)))
        average, optimizer = place(start), make_optimizer([weight], config, seed=1)
        for step, gradient in enumerate(gradients):
            weight.grad = place(gradient.to(dtype))
            norm = gradient_norm([weight])
            update(optimizer, step, config, norm)
            update_average([average], [weight], 0.9)
        found.append((norm, weight.detach(), average))
    for sharded, plain in zip(*found, strict=True):
        assert torch.equal(sharded.full_tensor() if isinstance(sharded, DTensor) else sharded, plain)


def test_multipliers_of_the_learning_rate(tiny):
    config = OptimizerConfig(lr=0.1, final_lr=0.1, warmup_steps=0, weight_decay=0.0)
    whole, tenth = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer([{"params": [whole], "lr_scale": 1.0}, {"params": [tenth], "lr_scale": 0.1}], config)
    whole.grad, tenth.grad = torch.ones(2), torch.ones(2)
    update(optimizer, 0, config, torch.tensor(0.1))
    torch.testing.assert_close(tenth.detach(), 0.1 * whole.detach())
    with pytest.raises(ConfigError, match="set --trained"):
        tiny(optimizer=OptimizerConfig(lr_scale=LRScale(vision=0.0)))


# ---- rounding at random


def test_noise_and_rounding_have_streams_of_their_own():
    """Of one another, of other steps and of other seeds; and the noise is what it has always been."""
    places = [(seed, step) for seed in (0, 1, 42, 2**40) for step in range(-1, 300)]
    drawn = {"noise": [], "delay": [], "rounding": [step_seed(*place) for place in places]}
    seeded = torch.Generator.manual_seed

    class Recorded(torch.Generator):
        def manual_seed(self, seed):
            drawn[name].append(seed)
            return seeded(self, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", Recorded)
        for place in places:
            name = "noise"
            draw_noise(*place, 1, 1, 1, 1)
            name = "delay"
            draw_delay(*place, 1, 1)
    assert all(len(seeds) == len(places) for seeds in drawn.values())
    assert len(set().union(*drawn.values())) == 3 * len(places)
    noise, timesteps = draw_noise(42, 7, 2, 3, 4, 5)
    assert noise.flatten()[:3].tolist() == [-0.3135215640068054, -0.5665296316146851, 0.36278149485588074]
    assert timesteps.flatten()[:3].tolist() == [0.9998884797096252, 0.30570536851882935, 0.7584753036499023]
    assert draw_delay(42, 7, 6, 3).tolist() == [2, 2, 3, 3, 1, 0]


def test_rounding_at_random_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0, 1.001, -1.001, 3e-5, 1.0 + 2**-10, -2.7e8])
    rounded = torch.stack([round_stochastically(values, generator) for _ in range(20_000)])
    below, above = rounded.float().min(0).values, rounded.float().max(0).values
    assert (below <= values).all()
    assert (values <= above).all()
    assert torch.equal(rounded[:, 0], torch.ones(20_000, dtype=torch.bfloat16))  # what bfloat16 has stays
    # A mean of n results lies within 5 standard deviations, which are half a gap at most.
    spread = 5 * 0.5 * (above - below) / math.sqrt(20_000)
    assert ((rounded.float().mean(0) - values).abs() <= spread).all()
    special = torch.tensor([math.inf, -math.inf, math.nan])
    assert str(round_stochastically(special, generator).float()) == str(special)


def test_tiny_updates_are_not_lost():
    """A rate of a thousandth of the gap between two numbers of bfloat16: rounding to the nearest would never move."""
    config = OptimizerConfig(lr=2**-7 / 1000, final_lr=2**-7 / 1000, warmup_steps=0, weight_decay=0.0)
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = make_optimizer([weight], config, seed=3)
    for step in range(100):
        weight.grad = -torch.ones_like(weight)
        update(optimizer, step, config, torch.tensor(1.0))
    assert float(weight.detach().float().mean()) - 1 == pytest.approx(100 * config.lr, rel=0.2)
    assert {p.dtype for p in optimizer.state[weight].values() if p.ndim} == {torch.bfloat16}


def test_the_random_bits_follow_seed_and_step():
    config = OptimizerConfig(lr=0.01, warmup_steps=0)

    def run(seed: int, steps: int) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 999).bfloat16())
        optimizer = make_optimizer([weight], config, seed=seed)
        for step in range(steps):
            torch.manual_seed(step)  # neither reads nor disturbs torch's own generator
            weight.grad = torch.full_like(weight, 0.01 * (step + 1))
            update(optimizer, step, config, torch.tensor(0.1))
        return weight.detach()

    assert torch.equal(run(1, 3), run(1, 3))
    assert not torch.equal(run(1, 3), run(2, 3))


def test_the_average_of_the_weights():
    average, weight = [torch.tensor([1.0]), torch.tensor([[2.0]])], [torch.tensor([0.0]), torch.tensor([[4.0]])]
    update_average(average, weight, 0.75)
    assert [float(a) for a in average] == [0.75, 2.5]


def test_parameter_norm_counts_matrices_alone():
    assert float(parameter_norm([torch.ones(3, 3), torch.full((4, 1), 2.0), torch.full((100,), 9.0)])) == 5.0


def test_noise_is_a_function_of_seed_and_step():
    noise, timestep = draw_noise(1, 5, 3, 2, 4, 6)
    assert noise.shape == (3, 2, 4, 6)
    assert timestep.shape == (3, 2)
    again = draw_noise(1, 5, 3, 2, 4, 6)
    assert torch.equal(noise, again[0])
    assert torch.equal(timestep, again[1])
    for other in (draw_noise(1, 6, 3, 2, 4, 6), draw_noise(2, 5, 3, 2, 4, 6)):
        assert not torch.equal(noise, other[0])
        assert not torch.equal(timestep, other[1])


def test_the_distributions():
    noise, timestep = draw_noise(0, 0, 2000, 10, 2, 2)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    assert 0.001 <= float(timestep.min()) < 0.01
    assert 0.99 < float(timestep.max()) <= 1
    # Beta(1.5, 1) has P(t < x) = x^1.5; the largest gap of 20 000 draws stays below 1.63/√n in 99 of 100 cases.
    t = np.sort(((timestep.numpy().ravel() - 0.001) / 0.999).clip(0, 1))
    gap = np.abs(np.arange(1, len(t) + 1) / len(t) - t**BETA_ALPHA).max()
    assert gap < 1.63 / math.sqrt(len(t))
