import math

import numpy as np
import pytest
import torch

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
