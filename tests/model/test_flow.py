import math
from dataclasses import replace

import pytest
import torch

from manipi.errors import ConfigError
from manipi.model.config import Compat
from manipi.model.flow import timestep_embedding

B, K, H, A = 3, 4, 5, 6
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(params=["pi0", "pi05"])
def model(request, configs, build):
    return build(configs[request.param])


@pytest.fixture
def draws():
    torch.manual_seed(3)
    return torch.randn(B, K, H, A), torch.rand(B, K)


def test_draws_on_branches_equal_separate_forwards(model, batch, draws):
    noise, timestep = draws
    together = model(batch, noise, timestep)
    for k in range(K):
        alone = model(batch, noise[:, k], timestep[:, k])
        torch.testing.assert_close(together.per_step[:, k], alone.per_step, **CLOSE)
        assert torch.equal(model(batch, noise[:, k : k + 1], timestep[:, k : k + 1]).per_step[:, 0], alone.per_step)


def test_every_draw_reaches_the_gradient_like_separate_forwards(model, batch, draws):
    noise, timestep = draws
    model(batch, noise, timestep).loss.backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for k in range(K):
        (model(batch, noise[:, k], timestep[:, k]).loss / K).backward()
    for name, grad in together.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, atol=2e-5, rtol=1e-3, msg=name)


def test_gradients_reach_everything_but_the_last_vlm_residuals(model, batch, draws):
    model(batch, *draws).loss.backward()
    dead = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    last = {n for n, _ in model.named_parameters() if n.startswith("gemma.blocks.2.experts.vlm.")}
    keys_values = {n for n in last if any(part in n for part in ("k_proj", "v_proj", "attention_norm"))}
    # The image encoder's key bias shifts all logits of a query alike, so its gradient is zero up to rounding.
    expected = (last - keys_values) | {"gemma.final_norms.vlm.scale"}
    assert dead - {"vision.blocks.0.k_proj.bias"} == expected


def test_the_action_mask_reaches_the_loss(model, batch, draws):
    noise, timestep = draws[0][:, 0], draws[1][:, 0]
    valid = torch.arange(H) < torch.tensor([5, 3, 1])[:, None]
    full = model(batch, noise, timestep)
    masked = model(replace(batch, action_valid=valid), noise, timestep)
    torch.testing.assert_close(masked.per_step[valid], full.per_step[valid])
    assert not masked.per_step[~valid].any()
    torch.testing.assert_close(masked.loss, full.per_step[valid].mean())
    assert masked.weight == valid.sum() * A


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_dimension_mask_reaches_the_loss(model, batch, draws, per_sample):
    noise, timestep = draws[0][:, 0], draws[1][:, 0]
    dim_valid = torch.tensor([True] * 4 + [False] * 2)
    inputs = replace(batch, action_dim_valid=dim_valid.expand(B, A) if per_sample else dim_valid)
    loss = model(inputs, noise, timestep)
    assert loss.weight == B * H * 4
    loss.loss.backward()
    assert not model.head.action_out.bias.grad[4:].any()
    assert model.head.action_out.bias.grad[:4].all()


def test_unmasked_loss_ignores_the_masks(configs, build, batch, draws):
    noise, timestep = draws[0][:, 0], draws[1][:, 0]
    model = build(replace(configs["pi05"], compat=Compat(unmasked_loss=True)))
    masks = {"action_valid": torch.zeros(B, H, dtype=torch.bool), "action_dim_valid": torch.arange(A) < 2}
    masked, plain = (model(inputs, noise, timestep) for inputs in (replace(batch, **masks), batch))
    assert torch.equal(masked.per_step, plain.per_step)
    torch.testing.assert_close(masked.loss, plain.per_step.mean())


def test_padded_dimensions_follow_their_noise_to_zero(model, batch, draws):
    dim_valid = torch.arange(A) < 4
    actions = model.sample(replace(batch, action_dim_valid=dim_valid), draws[0][:, 0], num_steps=5)
    torch.testing.assert_close(actions[..., 4:], torch.zeros(B, H, 2), atol=1e-6, rtol=0)
    assert actions[..., :4].abs().min() > 1e-6


def test_sampled_draws_equal_separate_samples(model, batch, draws):
    together = model.sample(batch, draws[0], num_steps=3)
    for k in range(K):
        torch.testing.assert_close(together[:, k], model.sample(batch, draws[0][:, k], num_steps=3), **CLOSE)


def test_one_euler_step_is_noise_minus_the_velocity_that_the_loss_sees(model, batch, draws):
    noise = draws[0][:, 0]
    step = model.sample(batch, noise, num_steps=1)
    # With these targets the velocity is right exactly when the loss is zero.
    loss = model(replace(batch, actions=step), noise, torch.ones(B))
    torch.testing.assert_close(loss.loss, torch.zeros(()), atol=1e-8, rtol=0)


def test_missing_cameras_and_padded_tokens_do_not_matter(model, batch, draws):
    other = replace(
        batch,
        images=torch.where(batch.image_valid[..., None, None, None], batch.images, 255 - batch.images),
        tokens=torch.where(batch.token_valid, batch.tokens, 5),
    )
    assert torch.equal(model(other, *draws).per_step, model(batch, *draws).per_step)
    present = replace(batch, image_valid=torch.ones_like(batch.image_valid))
    assert not torch.equal(model(present, *draws).per_step[1], model(batch, *draws).per_step[1])


def test_state_is_a_token_of_pi0_only(configs, build, batch, draws):
    moved = replace(batch, state=batch.state + 1)
    for name, sees_state in (("pi0", True), ("pi05", False)):
        model = build(configs[name])
        same = torch.equal(model(moved, *draws).per_step, model(batch, *draws).per_step)
        assert same is not sees_state


def test_uint8_pictures_equal_scaled_ones(model, batch, draws):
    scaled = replace(batch, images=batch.images.float() / 255 * 2 - 1)
    torch.testing.assert_close(model(scaled, *draws).loss, model(batch, *draws).loss)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_it_learns_one_batch_from_scratch(configs, batch, name):
    from manipi.model import VLA

    torch.manual_seed(0)
    model = VLA(configs[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    noise, timestep = torch.randn(B, K, H, A), torch.rand(B, K)
    losses = []
    for _ in range(60):
        losses.append(model(batch, noise, timestep).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_tokens_are_not_decoded_from_a_flow_policy(model, batch):
    with pytest.raises(ConfigError, match="call sample instead"):
        model.decode_tokens(batch)


def test_timestep_embedding_is_the_formula():
    t, width = torch.tensor([0.0, 0.001, 0.25, 1.0]), 32
    features = timestep_embedding(t, width)
    for i in range(width // 2):
        angle = 2 * math.pi * t.double() / (4e-3 * 1000 ** (i / (width // 2 - 1)))
        expected = torch.stack([angle.sin(), angle.cos()], dim=1)
        torch.testing.assert_close(features[:, [i, i + width // 2]].double(), expected, atol=4e-4, rtol=0)
