"""Real-time chunking against numbers worked out by hand, against closed forms, and on tiny policies."""

import math
from dataclasses import replace

import pytest
import torch

from manipi.errors import ConfigError
from manipi.model import VLA, ModelInput
from manipi.model.flow import (
    guidance_weight,
    guided_velocity,
    sample_after_prefix,
    sample_guided,
    soft_mask,
)

B, H, A = 3, 5, 6
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(params=["pi0", "pi05"])
def model(request, configs, build):
    return build(configs[request.param])


@pytest.fixture
def previous(batch):
    """Four, three and no steps left, of which two, one and none are committed."""
    torch.manual_seed(5)
    left = torch.tensor([4, 3, 0])
    return replace(
        batch, actions=torch.randn(B, H, A), action_valid=torch.arange(H) < left[:, None], delay=torch.tensor([2, 1, 0])
    )


def test_the_soft_mask_by_hand():
    """H = 8, d = 2, H - s = 5: c of steps 2, 3, 4 is 3/4, 2/4, 1/4 (equation 5)."""
    fall = [c * (math.exp(c) - 1) / (math.e - 1) for c in (0.75, 0.5, 0.25)]
    expected = [1, 1, *fall, 0, 0, 0]
    torch.testing.assert_close(soft_mask(torch.tensor([2]), torch.tensor([5]), 8)[0], torch.tensor(expected))


def test_a_delay_beyond_what_is_left_commits_what_is_left():
    masks = soft_mask(torch.tensor([6, 0, 8]), torch.tensor([3, 0, 8]), 8)
    assert masks.tolist() == [[1.0] * 3 + [0.0] * 5, [0.0] * 8, [1.0] * 8]


def test_the_guidance_weight_by_hand():
    """τ = 1 - t. At τ = 0.5: r² = 0.25 / 0.5, so (1-τ)/(τ r²) = 2. At τ = 0.9: (0.01 + 0.81) / 0.09."""
    assert guidance_weight(0.5) == pytest.approx(2.0)
    assert guidance_weight(0.1, most=100) == pytest.approx(0.82 / 0.09)
    assert guidance_weight(1.0) == guidance_weight(0.999) == 5.0


def test_a_guided_step_by_hand():
    """u(x) = 2x + 1 at t = 0.5 and x = 3: u = 7, â = 3 - 3.5 = -0.5, ∂â/∂x = 1 - 0.5·2 = 0; and with u = x + 1:
    u = 4, â = 1, ∂â/∂x = 0.5, so u' = 4 - 2 · W·(y - 1) · 0.5 with y = 2: 3 where W = 1, 3.5 where W = 0.5."""
    x, y = torch.full((1, 1, 2, 1), 3.0), torch.full((1, 2, 1), 2.0)
    mask = torch.tensor([[1.0, 0.5]])
    assert guided_velocity(lambda x, t, _: 2 * x + 1, x, 0.5, y, mask).flatten().tolist() == [7.0, 7.0]
    assert guided_velocity(lambda x, t, _: x + 1, x, 0.5, y, mask).flatten().tolist() == [3.0, 3.5]


def test_the_gradient_goes_through_all_steps_of_the_model():
    """A model that mixes its steps: what binds step 0 also moves step 1, by the transposed Jacobian."""
    mix = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # u_0 = x_1

    def velocity(x, t, given):
        return torch.einsum("hg,bkga->bkha", mix, x)

    x, y, mask = torch.zeros(1, 1, 2, 1), torch.ones(1, 2, 1), torch.tensor([[1.0, 0.0]])
    # â = (I - t·mix) x = 0, the error is (1, 0), and (I - t·mix)ᵀ error = (1, -t).
    assert guided_velocity(velocity, x, 0.5, y, mask).flatten().tolist() == [-2.0, 1.0]


def test_guidance_chooses_the_mode_of_the_previous_chunk():
    """Actions are -1 or +1, whole chunks at a time. Unguided noise goes either way; guided noise goes on as before."""

    def velocity(x, timestep, given):
        t = max(timestep, 1e-3)
        a, var = 1 - t, t**2 + (1 - t) ** 2 * 0.01
        towards = torch.tanh((a * x / var).sum(dim=(2, 3), keepdim=True))  # E[mode | x]
        mean = towards + (1 - t) * 0.01 / var * (x - a * towards)  # E[actions | x]
        return (x - mean) / t

    torch.manual_seed(0)
    noise = torch.randn(64, 1, 8, 1)
    previous, left = -torch.ones(64, 8, 1), torch.full((64,), 5)
    free = sample_guided(velocity, noise, previous, torch.zeros(64, 8), 10)[:, 0, :, 0]
    held = sample_guided(velocity, noise, previous, soft_mask(torch.full((64,), 2), left, 8), 10)[:, 0, :, 0]
    assert 0.3 < (free.mean(1) > 0).float().mean() < 0.7
    assert (held[:, :2] + 1).abs().mean() < 0.1
    assert (held.mean(1) < -0.5).float().mean() > 0.95


def test_without_anything_left_guidance_changes_nothing(model, batch):
    torch.manual_seed(2)
    noise = torch.randn(B, H, A)
    nothing = {"action_valid": torch.zeros(B, H, dtype=torch.bool), "delay": torch.zeros(B, dtype=torch.long)}
    torch.testing.assert_close(model.sample(replace(batch, **nothing), noise, 4), model.sample(batch, noise, 4))


def test_guidance_brings_the_committed_steps_closer_row_by_row(model, previous, batch):
    torch.manual_seed(2)
    noise = torch.randn(B, H, A)
    free, guided = model.sample(batch, noise, 10), model.sample(previous, noise, 10)
    for row, delay in ((0, 2), (1, 1)):
        there = previous.actions[row, :delay]
        assert (guided[row, :delay] - there).norm() < 0.6 * (free[row, :delay] - there).norm()
    torch.testing.assert_close(guided[2], free[2], **CLOSE)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_of_a_batch_are_guided_as_they_are_alone(model, previous):
    torch.manual_seed(2)
    noise = torch.randn(B, H, A)
    together = model.sample(previous, noise, 3)
    for row, alone in enumerate(previous.split(B)):
        torch.testing.assert_close(model.sample(alone, noise[row : row + 1], 3)[0], together[row], **CLOSE)


def test_a_trained_prefix_stays_exactly(model, previous):
    noise = torch.randn(B, H, A)
    chunk = model.sample(previous, noise, 4, max_delay=2)
    for row, delay in enumerate((2, 1, 0)):
        assert torch.equal(chunk[row, :delay], previous.actions[row, :delay])
        assert not torch.equal(chunk[row, delay:], previous.actions[row, delay:])


def test_the_prefix_is_seen_clean_by_the_other_steps():
    seen = []

    def velocity(x, timestep, given):
        seen.append((x.flatten().tolist(), timestep, given.tolist()))
        return torch.ones_like(x)

    given = torch.tensor([[True, False, False]])
    chunk = sample_after_prefix(velocity, torch.zeros(1, 1, 3, 1), torch.full((1, 3, 1), 9.0), given, 2)
    assert seen == [([9.0, 0.0, 0.0], 1.0, given.tolist()), ([9.0, -0.5, -0.5], 0.5, given.tolist())]
    assert chunk.flatten().tolist() == [9.0, -1.0, -1.0]


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_given_steps_have_the_timestep_of_an_action(configs, build, batch, name):
    """Draw by draw and step by step beside suffixes that are all clean and all at the draw's timestep."""
    model = build(configs[name])
    for norm in (block.experts["action"].mlp_norm for block in model.gemma.blocks if name == "pi05"):
        torch.nn.init.normal_(norm.modulation.weight)
    torch.manual_seed(2)
    x, times, given = torch.randn(B, 2, H, A), torch.rand(B, 2), torch.arange(H) < torch.tensor([0, 2, 4])[:, None]

    def rows(timestep, given=None) -> torch.Tensor:
        """What depends on the timestep [B, 2, H, D]: the tokens of π0, the modulation of π0.5."""
        span = model.head.suffix(batch.state, x, timestep, torch.float32, given)
        if span.cond is None:
            return span.tokens_BTD[:, 1:].unflatten(1, (2, H))
        norm = model.gemma.blocks[0].experts["action"].mlp_norm
        made = span.cond.per_token(norm.modulation(span.cond.rows_BCD), 2 * H)
        return made.unflatten(1, (2, H))

    expected = torch.where(given[:, None, :, None], rows(torch.zeros(B, 2)), rows(times))
    torch.testing.assert_close(rows(times, given), expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(expected, rows(times), atol=1e-2)


def test_given_steps_do_not_count_in_the_loss(model, batch):
    torch.manual_seed(3)
    noise, timestep = torch.randn(B, 2, H, A), torch.rand(B, 2)
    delayed = replace(batch, delay=torch.tensor([0, 2, 4]))
    loss, plain = model(delayed, noise, timestep), model(batch, noise, timestep)
    assert loss.weight == model.loss_weight(delayed, 2) == 2 * A * (5 + 3 + 1)
    assert not loss.per_step[1, :, :2].any()
    assert not loss.per_step[2, :, :4].any()
    torch.testing.assert_close(loss.per_step[0], plain.per_step[0])
    # What is given is clean, so its noise reaches nobody, and the other steps see it.
    other = noise.clone()
    other[1, :, :2] += 1
    torch.testing.assert_close(model(delayed, other, timestep).per_step, loss.per_step)
    assert (loss.per_step[1, :, 2:] - plain.per_step[1, :, 2:]).abs().max() > 1e-3


def test_a_delay_of_nothing_is_none(model, batch):
    torch.manual_seed(3)
    noise, timestep = torch.randn(B, H, A), torch.rand(B)
    none = replace(batch, delay=torch.zeros(B, dtype=torch.long))
    torch.testing.assert_close(model(none, noise, timestep).per_step, model(batch, noise, timestep).per_step)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_it_learns_to_go_on(configs, batch, name):
    """Chunks are +1 or -1 throughout; which, only the given first step tells."""
    torch.manual_seed(0)
    model = VLA(configs[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    shown = ("images", "image_valid", "tokens", "token_valid")
    alike = {key: getattr(batch, key)[:1].repeat_interleave(4, 0) for key in shown}
    sign = torch.tensor([1.0, -1.0]).repeat(2)[:, None, None]
    one = ModelInput(**alike, state=torch.zeros(4, A), actions=sign.expand(4, H, A), delay=torch.ones(4).long())
    for _ in range(100):
        optimizer.zero_grad()
        model(one, torch.randn(4, 2, H, A), torch.rand(4, 2)).loss.backward()
        optimizer.step()
    asked = replace(one, action_valid=(torch.arange(H) < 2).expand(4, H))
    chunk = model.sample(asked, torch.randn(4, H, A), 5, max_delay=1)
    torch.testing.assert_close(chunk[:, 1:].mean(dim=(1, 2)).sign(), sign[:, 0, 0])


def test_fast_policies_have_no_delay(configs, build, batch):
    with pytest.raises(ConfigError, match="call decode_tokens instead"):
        build(configs["pi0_fast"]).sample(batch, torch.randn(B, H, A))
