import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from manipi.errors import ConfigError
from manipi.train.config import OptimizerConfig
from manipi.train.noise import BETA_ALPHA, draw_noise
from manipi.train.optimizer import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    parameter_norm,
    update,
    update_average,
)


def test_learning_rate_at_its_corners():
    config = OptimizerConfig(lr=1.0, final_lr=0.1, warmup_steps=4, decay_steps=14)
    assert learning_rate(0, config) == pytest.approx(1 / 5)
    assert learning_rate(4, config) == 1.0
    assert learning_rate(9, config) == pytest.approx(0.55)
    assert learning_rate(14, config) == learning_rate(1000, config) == pytest.approx(0.1)
    rates = [learning_rate(step, config) for step in range(30)]
    assert rates == [*sorted(rates[:4]), *sorted(rates[4:], reverse=True)]
    assert learning_rate(0, OptimizerConfig(warmup_steps=0)) == OptimizerConfig().lr


SCHEDULES = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[2].parent / "shared")) / (
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
        assert float(clip_gradients([weight], config)) == pytest.approx(5.0 * (step + 1))
        update(optimizer, step, config)
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
        norm = clip_gradients([weight, bias], config)
        update(optimizer, step, config)
        assert float(norm) == pytest.approx(5.0 * (step + 1))
        assert weight.grad is None
        gradient /= np.linalg.norm(gradient)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        corrected = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
        value = value - 0.1 * (corrected + 0.2 * value)
        np.testing.assert_allclose(torch.cat([weight, bias]).detach().numpy(), value, rtol=1e-5)


def test_small_gradients_are_not_scaled_up():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([0.3, 0.4])
    assert float(clip_gradients([weight], OptimizerConfig())) == pytest.approx(0.5)
    np.testing.assert_allclose(weight.grad, [0.3, 0.4], rtol=1e-5)


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
